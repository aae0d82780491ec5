"""What is particular to ViT, in all the backbones that have its blocks."""
import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import METHODS, calibrate, perturb, with_method
from families import (TOGETHER, Sum, blocks_of, builders, check_bare,
                      check_gradients, check_joined, check_layer_decay,
                      check_merged, check_methods, check_recognised,
                      check_skipped, classifier, image_of, loss_of, near, run,
                      scope_of, stream_of)
from mmengine.registry import MODELS

from mmpeft.backbones import find_family
from mmpeft.counting import count_params
from mmpeft.errors import MergeError, PEFTError, SiteError
from mmpeft.injection import PEFTBackbone, inject
from mmpeft.merging import merged_state_dict
from mmpeft.state import attached_modules

pytest.importorskip('mmpretrain')

ARCH = dict(embed_dims=16, num_layers=3, num_heads=2, feedforward_channels=64)
BASE = dict(
    type='mmpretrain.VisionTransformer',
    arch=ARCH,
    img_size=32,
    patch_size=8,
    out_type='featmap',
    drop_path_rate=.2)
VARIANTS = {
    'two outputs':
    dict(out_indices=(0, 2)),
    'not the last':
    dict(out_indices=(0, 1)),
    'no class token':
    dict(with_cls_token=False),
    'class token':
    dict(out_type='cls_token'),
    'raw':
    dict(out_type='raw', final_norm=False),
    'average':
    dict(out_type='avg_featmap', final_norm=False),
    'DINOv2':
    dict(
        layer_scale_init_value=1e-1, layer_cfgs=dict(ffn_type='swiglu_fused')),
    'CLIP':
    dict(pre_norm=True, layer_cfgs=dict(act_cfg=dict(type='GELU'))),
    'three layers':
    dict(layer_cfgs=dict(num_fcs=3)),
    'DeiT':
    dict(type='mmpretrain.DistilledVisionTransformer'),
    'DeiT, tokens':
    dict(type='mmpretrain.DistilledVisionTransformer', out_type='cls_token'),
    'MoCoV3':
    dict(type='mmpretrain.MoCoV3ViT'),
    'MAE':
    dict(type='mmpretrain.MAEViT'),
    'MaskFeat':
    dict(type='mmpretrain.MaskFeatViT'),
    'DeiT3':
    dict(type='mmpretrain.DeiT3', out_indices=(0, 2)),
    'DeiT3, token':
    dict(type='mmpretrain.DeiT3', out_type='cls_token'),
}


def cfg_of(variant, **kwargs):
    return {**BASE, **VARIANTS.get(variant, {}), **kwargs}


stock_of, peft_of = builders(cfg_of)
scope = scope_of('mmpretrain')
image = image_of(37, 28)


@pytest.mark.parametrize('variant', VARIANTS)
def test_stock_forward(variant, image):
    """Drop-path, LayerScale, SwiGLU."""
    check_bare(stock_of(variant), image)


@pytest.mark.parametrize('variant', VARIANTS)
def test_methods(variant, image):
    check_methods(*peft_of(variant, '+'.join(TOGETHER)), image)


@pytest.mark.parametrize('variant', ['CLIP', 'average', 'no class token'])
@pytest.mark.parametrize('method', ['SSF', 'LNTune', 'BitFit'])
def test_norms(variant, method, image):
    stock, peft = peft_of(variant, method)
    check_gradients(perturb(peft).eval(), image)
    parts = {m.site.block
             for m in attached_modules(peft)
             } - {b.path
                  for b in blocks_of(peft)}
    norms = dict(
        CLIP={'pre_norm', 'ln1'}, average={'ln2'}).get(variant, {'ln1'})
    if method == 'SSF':
        assert parts == {'patch_embed.projection'} | norms
    if variant == 'CLIP' and method == 'SSF':
        # Its stem has no bias to take the shift.
        with pytest.raises(MergeError, match='patch_embed.projection has no'):
            merged_state_dict(peft)
        return
    check_merged(stock, peft, image)


@pytest.mark.parametrize('name', METHODS)
def test_deit3(name, image):
    """Every method that it takes, in evaluation and training."""
    # Four groups of blocks.
    kwargs = dict(
        arch=dict(ARCH, num_layers=4),
        out_indices=(0, 3)) if name == 'ViTAdapter' else {}
    _, peft = peft_of('DeiT3', METHODS[name], **kwargs)
    calibrate(peft, image.shape)
    perturb(peft)
    outs = run(peft, image)
    if any(o.requires_grad for o in outs):
        sum((o**2).mean() for o in outs).backward()
    trained = {n for n, p in peft.named_parameters() if p.requires_grad}
    with_grad = {n for n, p in peft.named_parameters() if p.grad is not None}
    # The norm that the stock block leaves out; Full trains all there is.
    idle = {n for n in trained if '.ln2.' in n and 'peft' not in n}
    assert with_grad == trained - idle and (not idle or name == 'Full')


@pytest.mark.parametrize('name', ['SSF', 'HST:dims=[4,6,8],num_heads=[1,2,2]'])
def test_the_one_norm_of_deit3(name, image):
    """It is called before both branches, and the other one is not."""
    stock, peft = peft_of('DeiT3', name)
    trained = [n for n, p in peft.named_parameters() if p.requires_grad]
    assert any(n.startswith('layers.0.ln1.') for n in trained) == (
        name != 'SSF')
    assert not any('.ln2.' in n for n in trained)
    if name == 'SSF':
        assert set(
            peft.layers[0].peft.ssf) == {'norm1', 'qkv', 'proj', 'fc1', 'fc2'}
        norm = stock.layers[0].ln1
        perturb(peft).eval(), stock.eval()
        own = peft.layers[0].peft.ssf['norm1']
        with torch.no_grad():
            norm.weight.mul_(own.scale)
            norm.bias.mul_(own.scale).add_(own.shift)
        x = torch.randn(2, 10, norm.normalized_shape[0])
        assert near([peft.layers[0].ln1(x)], [norm(x)])
        check_merged(stock, peft, image)


# ---------------------------------------------------------------- prompts
def blocks_by_hand(stock, x, before, after):
    """The stock stream with something done around each block."""
    for i, layer in enumerate(stock.layers):
        x = after(layer(before(i, x)))
    return stock.ln1(x)


@pytest.mark.parametrize('method', ['VPTShallow', 'VPTDeep'])
def test_prompts_are_tokens_of_the_sequence(method, image):
    """As in the paper: [class, prompts, patches] through stock blocks."""
    stock, peft = peft_of('', f'{method}:num_tokens=3')
    stock.eval(), peft.eval()
    x, *_ = stream_of(stock, image)

    def before(i, x):
        if method == 'VPTShallow':
            prompts = peft.peft.vpt_shallow.weight
            if i:
                return x
        else:
            prompts = peft.layers[i].peft['vpt_deep']['tokens'].prompts.weight
            x = torch.cat([x[:, :1], x[:, 4:]], 1) if i else x
        prompts = prompts.expand(len(x), -1, -1)
        return torch.cat([x[:, :1], prompts, x[:, 1:]], dim=1)

    y = blocks_by_hand(stock, x, before, lambda x: x)[:, 4:]
    out = run(peft, image)[0].flatten(2).transpose(1, 2)
    assert (out - y).abs().max() < 1e-5


def test_prefix_joins_keys_and_values(image):
    _, peft = peft_of('', 'PrefixTuning:num_tokens=3,init_std=1.')
    attn = peft.layers[0].attn
    seen = {}
    attn.register_forward_hook(
        lambda m, args, out: seen.update(x=args[0], y=out))
    peft.eval()
    run(peft, image)
    prefix = peft.layers[0].peft['prefix_tuning']['attn_kv']
    x = seen['x']
    q, k, v = F.linear(x, attn.qkv.weight, attn.qkv.bias).chunk(3, -1)
    k, v = (torch.cat([own.expand(2, -1, -1), t], 1)
            for own, t in zip(prefix.prefix(), (k, v)))
    q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (q, k, v))
    y = (q @ k.transpose(-2, -1) / 8**.5).softmax(-1) @ v
    y = F.linear(
        y.transpose(1, 2).flatten(2), attn.proj.weight, attn.proj.bias)
    assert (y - seen['y']).abs().max() < 1e-5


# ------------------------------------------------------------------- grid
def test_grid_methods_skip_the_last_block_of_a_class_token(image):
    stock, peft = peft_of('class token', 'Mona:dim=4+LoRA:rank=2')
    assert [list(layer.peft) for layer in peft.layers] == [['mona', 'lora'],
                                                           ['mona', 'lora'],
                                                           ['lora']]
    assert peft.peft.gridless == {'mona': ['layers.2']}
    assert peft.peft.skipped == []
    one = sum(p.numel() for p in peft.layers[0].peft['mona'].parameters())
    lora = sum(p.numel() for p in peft.layers[0].peft['lora'].parameters())
    assert count_params(peft)['backbone_added'] == 2 * one + 3 * lora
    # Everywhere else the grid of the last block is an output.
    for variant in ('two outputs', 'raw', 'average', 'DeiT'):
        assert peft_of(variant, 'Mona:dim=4')[1].peft.gridless == {}
    with pytest.raises(SiteError, match='layers.2 no output depends on it'):
        peft_of('class token', dict(type='Mona', dim=4, layers=-1))


def test_grid_methods_would_not_train_there(image, monkeypatch):
    family = blocks_of(stock_of('class token'))[0].family
    monkeypatch.setattr(family, 'grid_ends', lambda block: False)
    _, peft = peft_of('class token', 'Mona:dim=4+Convpass:dim=4')
    loss_of(perturb(peft), image).backward()
    zero = {
        name: all(p.grad.abs().sum() == 0 for p in modules.parameters())
        for name, modules in peft.layers[2].peft.items()
    }
    # Convpass changes the class token, too.
    assert zero == dict(mona=True, convpass=False)


def test_convpass_stays_with_a_class_token():
    _, peft = peft_of('class token', 'Convpass:dim=4')
    assert peft.peft.gridless == {} and len(attached_modules(peft)) == 6


def test_grid_follows_the_image_and_the_copy(image):
    _, peft = peft_of('DeiT', 'Mona:dim=4')
    grid = peft.layers[0].peft.grid
    run(peft, image)
    assert grid.hw_shape == (5, 4) and grid.num_extra_tokens == 2
    twin = copy.deepcopy(peft)
    run(twin, torch.randn(1, 3, 16, 64))
    assert grid.hw_shape == (5, 4)
    assert {id(layer.peft.grid)
            for layer in twin.layers} == {id(twin.layers[0].peft.grid)}
    assert twin.layers[0].peft.grid.hw_shape == (2, 8)


def test_masked_images(image):
    """Pre-training of MAE drops tokens: fine without a grid."""
    image = torch.randn(2, 3, 32, 32)
    _, peft = peft_of('MAE', 'LoRA:rank=2+VPTDeep:num_tokens=2')
    assert peft(image, True)[0].shape == (2, 1 + 4, 16)
    _, peft = peft_of('MAE', 'Mona:dim=4')
    with pytest.raises(SiteError, match='needs the whole grid.*5 tokens'):
        peft(image, True)
    assert torch.isfinite(run(peft, image)[0]).all()


# ---------------------------------------------------------------- outputs
def test_blocks_behind_the_last_output(image):
    for method in ('Mona:dim=4', 'LNTune', 'BitFit', 'SSF', 'LST:reduction=4',
                   'Partial'):
        _, peft = peft_of('not the last', method)
        check_skipped(peft, image, ['layers.2'], ('layers.2.', 'ln1.'))


@pytest.mark.parametrize('variant', VARIANTS)
def test_side_networks_join_each_output_once(variant, image):
    """Against the stock blocks and ``_format_output``, by hand."""
    stock, peft = peft_of(variant, dict(type=Sum))
    stock.eval(), peft.eval()
    expected, shapes = [], []
    stock.patch_embed.register_forward_hook(
        lambda m, args, out: shapes.append(out[1]))
    _, *ys = stream_of(stock, image)
    for i in sorted(stock.out_indices):
        out = ys[i] + sum(ys[:i + 1])
        if i == len(ys) - 1 and stock.final_norm:
            out = stock.ln1(out)
        out = stock._format_output(out, shapes[0])
        expected += out if isinstance(out, tuple) else [out]
    check_joined(stock, peft, image, expected)


def test_side_network_beside_some_blocks(image):
    stock, peft = peft_of('two outputs', dict(type=Sum, layers=[1]))
    (first, last), (a, b) = run(peft, image), run(stock, image)
    assert torch.equal(first, a) and not torch.equal(last, b)


@pytest.mark.parametrize('variant,trained', [('two outputs', {'ln1'}),
                                             ('not the last', set()),
                                             ('raw', set()),
                                             ('average', {'ln2'})])
def test_e3va_trains_the_norms_of_outputs(variant, trained):
    _, peft = peft_of(variant, 'E3VA:rank=2')
    norms = {
        n.split('.')[0]
        for n, p in peft.named_parameters()
        if p.requires_grad and 'peft' not in n
    }
    assert norms == trained


def test_final_norm():
    _, peft = peft_of('', 'Partial:final_norm=True')
    assert peft.ln1.weight.requires_grad
    _, peft = peft_of('average', 'Partial:final_norm=True')
    assert peft.ln2.weight.requires_grad
    with pytest.raises(PEFTError, match='no norm behind its last output'):
        peft_of('raw', 'Partial:final_norm=True')


# ------------------------------------------------- the rest of the stock API
def test_layer_decay():
    """Added parameters get the depth of their block."""
    import mmpretrain.engine.optimizers  # noqa: F401
    method = 'Mona:dim=4+SSF+LST:reduction=4+VPTShallow:num_tokens=2'
    model = MODELS.build(
        classifier(with_method(cfg_of('class token'), method)))
    backbone = model.backbone
    for name, parameter in backbone.named_parameters():
        depth, layers = backbone.get_layer_depth(name)
        assert layers == 5
        if name.startswith('layers.'):
            assert depth == int(name.split('.')[1]) + 1
        elif name.startswith('patch_embed.'):
            assert depth == 0
    check_layer_decay(
        model,
        constructor='mmpretrain.LearningRateDecayOptimWrapperConstructor',
        paramwise_cfg=dict(layer_decay_rate=.5))


def test_configs_are_recognised():
    for variant in ('two outputs', 'DeiT', 'MoCoV3', 'MAE', 'DeiT3'):
        check_recognised(classifier(cfg_of(variant)))


def test_blocks_elsewhere_are_left_alone(image):
    """The decoder of MAE has blocks of the same class."""
    model = MODELS.build(
        dict(
            type='mmpretrain.MAE',
            backbone=with_method(cfg_of('MAE'), 'LoRA:rank=2'),
            neck=dict(
                type='mmpretrain.MAEPretrainDecoder',
                num_patches=16,
                patch_size=8,
                embed_dim=16,
                decoder_embed_dim=16,
                decoder_depth=1,
                decoder_num_heads=2),
            head=dict(
                type='mmpretrain.MAEPretrainHead',
                patch_size=8,
                loss=dict(
                    type='mmpretrain.PixelReconstructionLoss',
                    criterion='L2'))))
    assert {host for host, _ in find_family(model)} == {'backbone'}
    counts = count_params(model)
    assert counts['backbone_added'] == 3 * 2 * 4 * 16
    with pytest.raises(SiteError, match='has no block mmpeft knows'):
        inject(model.neck, 'LoRA:rank=2')


def test_checkpoint_of_another_size(image):
    """Stock resizes the positions while it loads; that is loaded."""
    _, peft = peft_of('', 'LoRA:rank=2')
    peft.peft.base_checked = False
    state = stock_of('', img_size=48).state_dict()
    peft.load_state_dict(state, strict=False)
    run(peft, image)
    assert peft.peft.base_checked
    peft = PEFTBackbone(BASE['type'], 'LoRA:rank=2', **{
        k: v
        for k, v in BASE.items() if k != 'type'
    })
    with pytest.raises(PEFTError, match='never loaded'):
        run(peft, image)


def test_swiglu_layers(image):
    _, peft = peft_of('DINOv2', 'LoRA:rank=2,targets=[fc1,fc2]')
    sites = {m.site.name: m.site for m in attached_modules(peft)}
    ffn = peft.layers[0].ffn
    assert sites['fc1'].out_dims == ffn.w12.out_features
    assert sites['fc2'].in_dims == ffn.w3.in_features
    # A hidden width of 24 is no multiple of 16.
    with pytest.raises(PEFTError, match='FacT'):
        peft_of(
            'DINOv2',
            'FacTTT:rank=2',
            arch=dict(ARCH, feedforward_channels=36))
    assert torch.isfinite(run(peft, image)[0]).all()
