"""What is particular to the ViT of mmseg, and to nn.MultiheadAttention."""
import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import perturb, with_method
from families import (TOGETHER, Sum, blocks_of, builders, check_bare,
                      check_joined, check_looked_at, check_methods,
                      check_skipped, equal, image_of, near, rates_of, run,
                      scope_of, stream_of)
from mmengine.config import Config
from mmengine.registry import MODELS
from test_sites import MAP_SITES, Look

from mmpeft.backbones import find_family
from mmpeft.config import add_method, find_backbones
from mmpeft.errors import MergeError, PEFTError, SiteError
from mmpeft.injection import inject
from mmpeft.merging import merge, merged_state_dict
from mmpeft.state import attached_modules

pytest.importorskip('mmseg')

BASE = dict(
    type='mmseg.VisionTransformer',
    img_size=32,
    patch_size=8,
    embed_dims=16,
    num_layers=3,
    num_heads=2,
    patch_bias=True,
    drop_path_rate=.2)
VARIANTS = {
    '':
    dict(),
    'two outputs':
    dict(out_indices=(0, 2), final_norm=True),
    'not the last':
    dict(out_indices=(0, 1), final_norm=True),
    'no class token':
    dict(with_cls_token=False, out_indices=[1]),
    # As the image encoder of SAN.
    'class token too':
    dict(
        output_cls_token=True,
        out_origin=True,
        out_indices=(0, 2),
        pre_norm=True,
        patch_bias=False,
        norm_eval=True),
    'norms':
    dict(pre_norm=True, patch_norm=True, final_norm=True),
    'dropout':
    dict(drop_rate=.1, attn_drop_rate=.3, num_fcs=3),
    'no bias':
    dict(qkv_bias=False, interpolate_mode='bilinear'),
}


def cfg_of(variant, **kwargs):
    return copy.deepcopy({**BASE, **VARIANTS[variant], **kwargs})


stock_of, peft_of = builders(cfg_of, frozen=True)
scope = scope_of('mmseg')
image = image_of(37, 28)


@pytest.mark.parametrize('variant', VARIANTS)
def test_stock_forward(variant, image):
    """Dropout and drop-path in the same order."""
    check_bare(stock_of(variant), image)


@pytest.mark.parametrize('variant', VARIANTS)
def test_attention_through_layers(variant, image):
    stock, peft = peft_of(variant, dict(type=Look, at=MAP_SITES))
    assert all(
        type(b.module.attn.attn).__name__ == 'PEFTMultiheadAttention'
        for b in blocks_of(peft) if len(getattr(b.module, 'peft', ())))
    check_looked_at(stock, peft, image)
    # What looks at the stream alone leaves the stock attention there.
    _, peft = peft_of(variant, 'Mona:dim=4')
    assert type(peft.layers[0].attn.attn) is torch.nn.MultiheadAttention


@pytest.mark.parametrize('variant', VARIANTS)
def test_methods(variant, image):
    stock, peft = peft_of(variant, '+'.join(TOGETHER))
    # The output of the stem is made of nothing that is attached.
    check_methods(stock, peft, image, first=2 if peft.out_origin else 0)


# -------------------------------------------------------- the packed weights
def test_no_fused_path(image, monkeypatch):
    """torch's fused attention reads the weights and calls nothing."""

    def fused(*args, **kwargs):
        raise AssertionError('the fused path was taken')

    monkeypatch.setattr(torch, '_native_multi_head_attention', fused)
    stock, peft = peft_of('', 'LoRA:rank=2,targets=[q,k,v,proj]')
    perturb(peft).eval(), stock.eval()
    for block in blocks_of(peft):
        # Even if another wrapper than mmcv's asked for it.
        block.module.attn.attn.batch_first = True
    with torch.no_grad():
        assert not equal(run(peft, image), run(stock, image))
        x = torch.randn(2, 5, 16)
        inner = stock.layers[0].attn.attn
        inner.batch_first = True
        with pytest.raises(AssertionError, match='fused path was taken'):
            inner(x, x, x)


def test_a_mask_is_refused():
    _, peft = peft_of('', 'LoRA:rank=2')
    x = torch.randn(2, 5, 16)
    with pytest.raises(SiteError, match='no attention mask'):
        peft.layers[0].attn(x, attn_mask=torch.zeros(5, 5))


def test_merge_into_packed_weights(image):
    stock, peft = peft_of('', 'LoRA:rank=2,targets=[k,proj]')
    perturb(peft)
    before = stock.state_dict()
    merged = merged_state_dict(peft)
    changed = {k for k in before if not torch.equal(before[k], merged[k])}
    assert changed == {
        f'layers.{i}.attn.attn.{name}'
        for i in range(3)
        for name in ('in_proj_weight', 'out_proj.weight')
    }
    key = 'layers.0.attn.attn.in_proj_weight'
    rows = (merged[key] != before[key]).any(1)
    assert rows.tolist() == [False] * 16 + [True] * 16 + [False] * 16
    lora = peft.layers[0].peft['lora']['qkv']
    update = lora.lora_B.double() @ lora.lora_A.double()
    assert torch.equal(merged[key][16:32],
                       (before[key][16:32].double() + update).float())
    expected = run(peft.eval(), image)
    assert merge(peft) is peft
    assert near(run(peft, image), expected)


def test_merge_without_biases():
    for variant, where in (('no bias', 'in_proj_weight'),
                           ('class token too', 'patch_embed.projection')):
        _, peft = peft_of(variant, 'SSF')
        with pytest.raises(MergeError, match=f'{where} has no bias'):
            merged_state_dict(peft)
        merged_state_dict(peft_of(variant, 'DoRA:rank=2')[1])


def test_lengths_of_packed_rows():
    """DoRA starts from weights that arrive after it was built."""
    stock, peft = peft_of('', 'DoRA:rank=2,targets=[v]')
    peft.peft.loaded.clear()
    state = {k: 2 * v for k, v in stock.state_dict().items()}
    peft.load_state_dict(state, strict=False)
    run(peft, torch.zeros(1, 3, 16, 16))
    rows = stock.layers[1].attn.attn.in_proj_weight[32:]
    magnitude = peft.layers[1].peft['dora']['qkv'].magnitude
    assert torch.allclose(magnitude, 2 * rows.norm(dim=1))


# ----------------------------------------------------------------- prompts
@pytest.mark.parametrize('method', ['VPTShallow', 'VPTDeep'])
@pytest.mark.parametrize('variant', ['', 'no class token'])
def test_prompts_are_tokens_of_the_sequence(method, variant, image):
    """As in the paper: [..., patches, prompts] through stock blocks."""
    stock, peft = peft_of(variant, f'{method}:num_tokens=3')
    stock.eval(), peft.eval()
    x, *_ = stream_of(stock, image)
    for i, layer in enumerate(stock.layers[:max(stock.out_indices) + 1]):
        if method == 'VPTDeep':
            prompts = peft.layers[i].peft['vpt_deep']['tokens'].prompts.weight
        elif i == 0:
            prompts = peft.peft.vpt_shallow.weight
        if method == 'VPTDeep' or i == 0:
            prompts = prompts.expand(len(x), -1, -1)
        y = layer(torch.cat([x, prompts], dim=1))
        x, prompts = y[:, :-3], y[:, -3:]
    out = run(peft, image)[-1].flatten(2).transpose(1, 2)
    assert (out - x[:, -out.shape[1]:]).abs().max() < 1e-5


def test_prefix_joins_keys_and_values(image):
    _, peft = peft_of('', 'PrefixTuning:num_tokens=3,init_std=1.')
    attention = peft.layers[0].attn.attn
    seen = {}
    attention.register_forward_hook(
        lambda m, args, kwargs, out: seen.update(x=kwargs['query'], y=out[0]),
        with_kwargs=True)
    run(peft.eval(), image)
    prefix = peft.layers[0].peft['prefix_tuning']['attn_kv'].prefix()
    x = seen['x'].transpose(0, 1)
    q, k, v = F.linear(x, attention.in_proj_weight,
                       attention.in_proj_bias).chunk(3, -1)
    k, v = (torch.cat([own.expand(2, -1, -1), t], 1)
            for own, t in zip(prefix, (k, v)))
    q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    y = F.linear(y, attention.out_proj.weight, attention.out_proj.bias)
    assert (y.transpose(0, 1) - seen['y']).abs().max() < 1e-5


# ----------------------------------------------------------------- outputs
@pytest.mark.parametrize('variant', VARIANTS)
def test_side_networks_join_each_output_once(variant, image):
    """Against stock blocks and outputs composed by hand."""
    stock, peft = peft_of(variant, dict(type=Sum))
    stock.eval(), peft.eval()
    _, *ys = stream_of(stock, image)
    outs = run(stock, image)
    expected = outs[:2] if stock.out_origin else []
    for i in sorted(stock.out_indices):
        x = ys[i] + sum(ys[:i + 1])
        if i == len(ys) - 1 and stock.final_norm:
            x = stock.norm1(x)
        grid = x[:, int(stock.with_cls_token):].transpose(1, 2)
        expected.append(grid.reshape(outs[0].shape))
        if stock.output_cls_token:
            expected.append(x[:, 0])
    check_joined(stock, peft, image, expected)


def test_blocks_behind_the_last_output(image):
    for method in ('Mona:dim=4', 'LNTune', 'BitFit', 'SSF', 'LST:reduction=4',
                   'Partial', 'E3VA:rank=2'):
        _, peft = peft_of('not the last', method)
        check_skipped(peft, image, ['layers.2'], ('layers.2.', 'ln1.'))


def test_parts():
    """Norms where the config has them."""
    expected = {
        '': set(),
        'two outputs': {'ln1'},
        'class token too': {'ln_pre'},
        'norms': {'patch_embed.norm', 'ln_pre', 'ln1'},
    }
    for variant, norms in expected.items():
        _, peft = peft_of(variant, 'SSF')
        blocks = {b.path for b in blocks_of(peft)}
        parts = {m.site.block for m in attached_modules(peft)} - blocks
        assert parts == norms | {'patch_embed.projection'}
    assert peft_of('norms',
                   'Partial:final_norm=True')[1].ln1.weight.requires_grad
    with pytest.raises(PEFTError, match='no norm behind its last output'):
        peft_of('', 'Partial:final_norm=True')


# ------------------------------------------------- the rest of the stock API
def test_configs_are_recognised():
    """SAN has the backbone under another name; heads have such blocks."""
    plain = Config(
        dict(
            default_scope='mmseg',
            model=dict(
                type='EncoderDecoder',
                backbone=dict(cfg_of('two outputs'), type='VisionTransformer'),
                decode_head=dict(
                    type='SegmenterMaskTransformerHead',
                    in_channels=16,
                    channels=16,
                    num_classes=3,
                    num_layers=1,
                    num_heads=2,
                    embed_dims=16))))
    changed, at = add_method(plain, 'LoRA:rank=2')
    assert at == 'model.backbone'
    model = MODELS.build(changed.model)
    assert {host for host, _ in find_family(model)} == {'backbone'}
    assert not any('peft' in n for n, _ in model.decode_head.named_modules())
    with pytest.raises(SiteError, match='has no block mmpeft knows'):
        inject(model.decode_head, 'LoRA:rank=2')
    encoder = dict(cfg_of(''), type='mmseg.VisionTransformer')
    cfg = Config(dict(model=dict(type='X', image_encoder=encoder)))
    assert list(find_backbones(cfg)) == ['model.image_encoder']


def test_checkpoint_of_another_size(image, tmp_path):
    """Stock resizes the positions while it loads init_cfg; that is loaded."""
    for variant in ('', 'no bias'):
        file = str(tmp_path / 'base.pth')
        torch.save(stock_of(variant, img_size=48).state_dict(), file)
        peft = MODELS.build(
            with_method(
                cfg_of(variant),
                'LoRA:rank=2',
                init_cfg=dict(type='Pretrained', checkpoint=file)))
        with pytest.raises(PEFTError, match='never loaded'):
            run(peft, image)
        peft.init_weights()
        run(peft, image)
        assert peft.peft.base_checked
        assert peft.pos_embed.shape == (1, 17, 16)


def test_optimizers():
    """Layer-wise decay of mmseg knows BEiT, MAE and ConvNeXt alone, and says
    so for a stock ViT, too; ``custom_keys`` reach what is attached."""
    import mmseg.engine.optimizers  # noqa: F401
    stock, peft = peft_of('', 'LoRA:rank=2')
    decay = dict(num_layers=3, decay_rate=.5)
    for backbone in (stock.requires_grad_(), peft):
        model = torch.nn.Module()
        model.backbone = backbone
        with pytest.raises(NotImplementedError):
            rates_of(
                model,
                constructor='mmseg.LearningRateDecayOptimizerConstructor',
                paramwise_cfg=dict(decay))
    rates = rates_of(
        model, paramwise_cfg=dict(custom_keys={'layers.1': dict(lr_mult=.5)}))
    for i, layer in enumerate(peft.layers):
        for parameter in layer.peft.parameters():
            assert rates[id(parameter)] == (.5 if i == 1 else 1.)
