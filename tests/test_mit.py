"""What is particular to MiT: reduced keys, convolutions in the MLP, norms of
outputs that stand in the stream."""
import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import perturb, with_method
from families import (TOGETHER, Sum, blocks_of, builders, check_bare,
                      check_looked_at, check_methods, check_skipped, equal,
                      image_of, run, scope_of)
from mmengine.registry import MODELS
from test_sites import MAP_SITES, Look

from mmpeft.config import add_method, find_backbones, load_config
from mmpeft.counting import count_params
from mmpeft.errors import PEFTError, SiteError
from mmpeft.merging import merged_state_dict
from mmpeft.methods.side import TrunkBlock
from mmpeft.methods.windows import attention_beside
from mmpeft.sites import TokenLayout
from mmpeft.state import attached_modules

pytest.importorskip('mmseg')

BASE = dict(
    type='mmseg.MixVisionTransformer',
    embed_dims=8,
    num_stages=3,
    num_layers=(2, 1, 1),
    num_heads=(1, 2, 4),
    patch_sizes=(7, 3, 3),
    strides=(4, 2, 2),
    sr_ratios=(4, 2, 1),
    out_indices=(0, 1, 2),
    drop_path_rate=.2)
VARIANTS = {
    '': dict(),
    'not the last': dict(out_indices=(0, 1)),
    'some outputs': dict(out_indices=(0, 2)),
    'dropout': dict(drop_rate=.1, attn_drop_rate=.3),
    'no bias': dict(qkv_bias=False, act_cfg=dict(type='ReLU')),
    'other strides': dict(strides=(4, 2, 4), patch_sizes=(7, 2, 5)),
}


def cfg_of(variant, **kwargs):
    return {**BASE, **VARIANTS[variant], **kwargs}


stock_of, peft_of = builders(cfg_of, frozen=True)
scope = scope_of('mmseg')
image = image_of(52, 37)


@pytest.mark.parametrize('variant', VARIANTS)
def test_stock_forward(variant, image):
    """Dropout and drop-path in the same order."""
    check_bare(stock_of(variant), image)


@pytest.mark.parametrize('variant', VARIANTS)
def test_attention_through_layers(variant, image):
    check_looked_at(*peft_of(variant, dict(type=Look, at=MAP_SITES)), image)


@pytest.mark.parametrize('variant', VARIANTS)
def test_methods(variant, image):
    check_methods(*peft_of(variant, '+'.join(TOGETHER)), image)


# --------------------------------------------------------------- linear layers
def test_what_the_projection_sees(image):
    """Queries of the map, keys and values of the reduced one."""
    _, peft = peft_of('', dict(type=Look, at=('qkv', 'qkv_input', 'fc1')))
    run(peft.eval(), image)
    for block, (height, width), ratio in zip(
        (0, 2, 3), ((13, 10), (7, 5), (4, 3)), (4, 2, 1)):
        block = blocks_of(peft)[block]
        x, y, _ = block.module.peft['look']['qkv'].seen
        size = height * width
        keys = 0 if ratio == 1 else (height // ratio) * (width // ratio)
        dims = block.module.attn.embed_dims
        assert x.shape == (size + keys, 2, dims)
        attention = block.module.attn.attn
        stock = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
        queries, others = y[..., :dims], y[..., dims:]
        assert torch.allclose(queries[:size], stock[:size, ..., :dims], 0,
                              1e-5)
        first = size if keys else 0
        assert torch.allclose(others[first:], stock[first:, ..., dims:], 0,
                              1e-5)
        assert queries[size:].abs().sum() == others[:first].abs().sum() == 0
        x, y, _ = block.module.peft['look']['fc1'].seen
        assert x.shape == (2, height, width, dims)
        assert y.shape == (2, height, width, 4 * dims)


def test_merge_into_convolutions():
    stock, peft = peft_of('', 'LoRA:rank=2,targets=[fc2]')
    perturb(peft)
    before, merged = stock.state_dict(), merged_state_dict(peft)
    changed = {k for k in before if not torch.equal(before[k], merged[k])}
    assert changed == {
        f'{b.path}.ffn.layers.4.weight'
        for b in blocks_of(stock)
    }
    lora = peft.layers[0][1][0].peft['lora']['fc2']
    key = 'layers.0.1.0.ffn.layers.4.weight'
    update = lora.lora_B.double() @ lora.lora_A.double()
    expected = before[key].double() + update[:, :, None, None]
    assert torch.equal(merged[key], expected.float())


@pytest.mark.parametrize(
    'method',
    ['DoRA:rank=2,targets=[fc1,fc2]', 'LoRA:rank=2,init=pissa,targets=[fc1]'])
def test_start_from_convolutions(method, image):
    stock, peft = peft_of('', method)
    for a, b in zip(run(stock.eval(), image), run(peft.eval(), image)):
        assert (a - b).abs().max() < 1e-5
    module = peft.layers[0][1][0].peft[method.split(':')[0].lower()]['fc1']
    weight = stock.layers[0][1][0].ffn.layers[0].weight.flatten(1)
    if 'DoRA' in method:
        assert torch.allclose(module.magnitude, weight.norm(dim=1))
    else:
        product = module.lora_B @ module.lora_A
        assert torch.linalg.matrix_rank(weight - product) == 8 - 2


# --------------------------------------------------------------------- prompts
def test_prompts_join_behind_the_reduction(image):
    """Through all blocks and stages, against stock parts run by hand."""
    stock, peft = peft_of('', 'VPTShallow:num_tokens=3')
    stock.eval(), peft.eval()
    x, prompts = image, peft.peft.vpt_shallow.weight.expand(2, -1, -1)
    outs = []
    for stage, (stem, layers, norm) in enumerate(stock.layers):
        x, (height, width) = stem(x)
        if stage:
            # Copies of a prompt everywhere, far from the margin.
            copies = prompts.transpose(1, 2)[..., None, None]
            prompts = torch.stack([
                stem(copies[:, :, i].expand(-1, -1, 9, 9))[0].unflatten(
                    1, (5, 5))[:, 2, 2] for i in range(3)
            ], 1)
        for block in layers:
            attn, n = block.attn, height * width
            normed, asked = block.norm1(x), block.norm1(prompts)
            keys = normed
            if attn.sr_ratio > 1:
                keys = normed.transpose(1, 2).unflatten(2, (height, width))
                keys = attn.norm(attn.sr(keys).flatten(2).transpose(1, 2))
            q = torch.cat([normed, asked], 1).transpose(0, 1)
            kv = torch.cat([keys, asked], 1).transpose(0, 1)
            y = attn.attn(q, kv, kv)[0].transpose(0, 1)
            x, prompts = x + y[:, :n], prompts + y[:, n:]
            x = block.ffn(block.norm2(x), (height, width), identity=x)
            up, middle, _, _, down, _ = block.ffn.layers
            # Of a map of one token the middle of the kernel sees it.
            h = F.linear(block.norm2(prompts), up.weight.flatten(1), up.bias)
            h = h * middle.weight[:, 0, 1, 1] + middle.bias
            prompts = prompts + F.linear(
                F.gelu(h), down.weight.flatten(1), down.bias)
        x, prompts = norm(x), norm(prompts)
        x = x.transpose(1, 2).unflatten(2, (height, width))
        outs.append(x)
    for a, b in zip(run(peft, image), outs):
        assert (a - b).abs().max() < 1e-5


# --------------------------------------------------------------------- outputs
@pytest.mark.parametrize('ssf', [False, True])
@pytest.mark.parametrize('variant', ['', 'not the last', 'some outputs'])
def test_side_networks_leave_the_stream(variant, ssf, image):
    """Outputs composed by hand from stock modules; beside SSF, whose norms
    are part of the stream."""
    plain, peft = peft_of(variant, [dict(type=Sum)] + ['SSF'] * ssf)
    if ssf:
        plain = copy.deepcopy(peft)
        plain.peft.sum.weight.data.zero_()
    plain.eval(), peft.eval()
    ys = []
    for block in blocks_of(plain):
        block.module.register_forward_hook(lambda m, args, y: ys.append(
            (y, args[1])))
    outs = run(plain, image)
    u, hw, expected, done = 0, None, [], 0
    for stage, (stem, layers, norm) in enumerate(plain.layers):
        if stage:
            last = plain.layers[stage - 1][2]
            u = stem(last(u).transpose(1, 2).unflatten(2, hw))[0]
        for _ in layers:
            y, hw = ys[done]
            u, done = u + y, done + 1
        if stage in plain.out_indices:
            expected.append(norm(y + u).transpose(1, 2).unflatten(2, hw))
    asked = []
    handle = blocks_of(peft)[-1].module.register_forward_hook(
        lambda m, args, y: asked.append(y.requires_grad))
    found = run(peft, image)
    assert asked == [ssf] and all(o.requires_grad for o in found)
    handle.remove()
    twin = copy.deepcopy(peft)
    peft.peft.sum.weight.data.zero_()
    assert equal(run(peft, image), outs)
    for a, b, c in zip(found, expected, run(twin, image)):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()
        assert torch.equal(a, c)


def test_keys_of_networks_beside_are_reduced():
    """A map of 128 x 128 tokens would have 268 million products."""
    torch.manual_seed(0)
    qkv, layout = torch.randn(2, 7 * 5, 12), TokenLayout((7, 5))
    block = TrunkBlock(0, 0, '', 4, 2, 8, key_stride=2)
    q, k, v = qkv.chunk(3, -1)
    k, v = (
        F.avg_pool2d(layout.to_grid(t), 2).flatten(2).transpose(1, 2)
        for t in (k, v))
    q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in (q, k, v))
    expected = F.scaled_dot_product_attention(q, k, v)
    found = attention_beside(qkv, 2, block, layout)
    assert torch.allclose(
        found, expected.transpose(1, 2).flatten(2), atol=1e-6)
    _, peft = peft_of('', 'LAST:rank=2')
    strides = [b.key_stride for b in peft.peft.last.trunk.blocks]
    assert strides == [4, 4, 2, 1]


def test_maps_that_are_not_halved(image):
    with pytest.raises(SiteError, match='stage 1 does not halve the map'):
        peft_of('other strides', 'LST:reduction=4')
    stock, peft = peft_of('other strides', 'VPTShallow:num_tokens=2')
    assert not equal(run(peft, image), run(stock, image))


def test_stages_behind_the_last_output(image):
    for method in ('Mona:dim=4', 'LNTune', 'BitFit', 'SSF', 'LST:reduction=4',
                   'Partial', 'E3VA:rank=2'):
        _, peft = peft_of('not the last', method)
        check_skipped(peft, image, ['layers.2.1.0'], ('layers.2.', ))


def test_parts():
    _, peft = peft_of('some outputs', 'SSF')
    blocks = {b.path for b in blocks_of(peft)}
    found = {m.site.block: m.site.name for m in attached_modules(peft)}
    assert {
        k: v
        for k, v in found.items() if k not in blocks
    } == {
        'layers.0.0.projection': 'patch_embed',
        'layers.0.0.norm': 'patch_norm',
        'layers.0.2': 'out_norm',
        'layers.1.0.projection': 'patch_embed',
        'layers.1.0.norm': 'merge_norm',
        'layers.2.0.projection': 'patch_embed',
        'layers.2.0.norm': 'merge_norm',
        'layers.2.2': 'out_norm',
    }
    _, peft = peft_of('some outputs', 'Partial:num_stages=1,final_norm=True')
    trained = {n for n, p in peft.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in peft.named_parameters() if 'rs.2.' in n}


# ------------------------------------------------- the rest of the stock API
def test_configs_are_recognised():
    name = 'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py'
    cfg = load_config(name)
    assert list(find_backbones(cfg)) == ['model.backbone']
    changed, at = add_method(cfg, 'LoRA:rank=8')
    changed.model.backbone.init_cfg = None
    peft = MODELS.build(changed.model.backbone)
    # Of q and v in 2 blocks of each stage.
    counts = count_params(peft)
    widths = (32, 64, 160, 256)
    assert counts['backbone_added'] == sum(2 * 2 * 2 * 8 * w for w in widths)
    assert counts['by_stage'] == {str(i): 64 * w for i, w in enumerate(widths)}
    assert counts['backbone_total'] == sum(
        numel_of_stage(*args)
        for args in zip((3, *widths), widths, (7, 3, 3, 3), (8, 4, 2, 1)))
    assert peft.layers[0][1][0].attn.sr_ratio == 8


def numel_of_stage(before, d, patch, ratio):
    """Weights of one stage of two blocks."""
    block = 12 * d**2 + 13 * d + 4 * d * (9 + 1)
    if ratio > 1:
        block += d**2 * ratio**2 + 3 * d
    return before * d * patch**2 + d + 2 * d + 2 * block + 2 * d


def test_weights_that_were_never_loaded(image):
    peft = MODELS.build(with_method(BASE, 'LoRA:rank=2'))
    with pytest.raises(PEFTError, match='never loaded'):
        run(peft, image)
    peft.load_state_dict(stock_of('').state_dict(), strict=False)
    run(peft, image)
