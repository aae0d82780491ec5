"""What is particular to BEiT, in all the backbones that have its blocks."""
import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import with_method
from families import (TOGETHER, Sum, blocks_of, builders, check_bare,
                      check_joined, check_layer_decay, check_merged,
                      check_methods, check_recognised, check_skipped,
                      classifier, equal, image_of, loss_of, run, scope_of,
                      stream_of)
from mmengine.registry import MODELS

from mmpeft.backbones import find_family
from mmpeft.errors import MergeError, SiteError
from mmpeft.merging import merged_state_dict

pytest.importorskip('mmpretrain')
pytest.importorskip('mmseg')

ARCH = dict(embed_dims=16, num_layers=3, num_heads=2, feedforward_channels=64)
CLASSIFY = dict(
    type='mmpretrain.BEiTViT',
    arch=ARCH,
    img_size=32,
    patch_size=8,
    out_type='featmap',
    drop_path_rate=.2)
SEGMENT = dict(
    type='mmseg.BEiT',
    img_size=32,
    patch_size=8,
    embed_dims=16,
    num_layers=3,
    num_heads=2,
    drop_path_rate=.2)
ABSOLUTE = dict(use_rel_pos_bias=False, use_abs_pos_emb=True)
VARIANTS = {
    '':
    dict(),
    'average':
    dict(out_type='avg_featmap', out_indices=[0, 2]),
    'class token':
    dict(out_type='cls_token', final_norm=True),
    'shared':
    dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=True),
    'absolute':
    dict(bias=True, **ABSOLUTE),
    'bare':
    dict(
        bias=False, layer_scale_init_value=0, with_cls_token=False,
        **ABSOLUTE),
    'pre-training':
    dict(type='mmpretrain.BEiTPretrainViT'),
    'CAE':
    dict(type='mmpretrain.CAEPretrainViT', layer_scale_init_value=.1),
    'mmseg':
    dict(SEGMENT, out_indices=(0, 2)),
    'mmseg, norm':
    dict(SEGMENT, out_indices=(1, 2), final_norm=True, qv_bias=False),
    'mmseg, not the last':
    dict(SEGMENT, out_indices=(0, 1), final_norm=True),
    'MAE':
    dict(SEGMENT, type='mmseg.MAE'),
}


def cfg_of(variant, **kwargs):
    """Anew: the stock constructor counts negative outputs in place."""
    cfg = copy.deepcopy(VARIANTS[variant])
    base = {} if cfg.get('type', '').startswith('mmseg') else CLASSIFY
    return {**base, **cfg, **kwargs}


stock_of, peft_of = builders(cfg_of)
scope = scope_of('mmpretrain')
image = image_of(32, 32)


@pytest.mark.parametrize('variant', VARIANTS)
def test_stock_forward(variant, image):
    """Gradients of both biases included."""
    stock = stock_of(variant)
    bare = check_bare(stock, image)
    assert [vars(b.module.attn).keys() for b in blocks_of(bare)
            ] == [vars(b.module.attn).keys() for b in blocks_of(stock)]


@pytest.mark.parametrize('variant', VARIANTS)
def test_methods(variant, image):
    check_methods(*peft_of(variant, '+'.join(TOGETHER)), image)


# ------------------------------------------------------------ the two biases
@pytest.mark.parametrize('variant', ['', 'mmseg'])
def test_what_the_projection_returns(variant, image):
    """Its site sees the bias, which is none of its parameters."""
    stock, peft = peft_of(variant, 'LoRA:rank=2')
    attn, seen = peft.layers[1].attn, []
    attn.qkv.register_forward_hook(lambda m, args, y: seen.append(
        (args[0], y)))
    run(peft, image)
    (x, y), = seen
    bias = torch.cat([attn.q_bias, torch.zeros(16), attn.v_bias])
    assert bias.abs().sum() > 0
    assert torch.equal(y, F.linear(x, attn.qkv.weight, bias))
    assert 'bias' not in dict(attn.qkv.named_parameters())


@pytest.mark.parametrize('variant', ['', 'shared', 'mmseg'])
@pytest.mark.parametrize('method', ['SSF', 'RepAdapter:dim=4', 'IA3'])
def test_merge_into_two_biases(variant, method, image):
    """What the keys are shifted by, softmax takes away again."""
    stock, peft = peft_of(variant, method)
    if method == 'SSF':
        for layer in peft.layers:
            layer.peft.ssf.qkv.shift.data[16:32] += 2
    check_merged(stock, peft, image)
    merged = merged_state_dict(peft)
    attn = peft.layers[0].attn
    assert not torch.equal(merged['layers.0.attn.v_bias'], attn.v_bias)
    if method == 'SSF':
        ssf = peft.layers[0].peft.ssf.qkv
        q_bias = attn.q_bias * ssf.scale[:16] + ssf.shift[:16]
        assert torch.allclose(merged['layers.0.attn.q_bias'], q_bias)


def test_keys_that_need_a_bias(image):
    """Where the softmax is of something else, the merge is refused."""
    _, peft = peft_of('', 'SSF')
    peft.layers[0].attn.qkv.keys_need_no_bias = False
    with pytest.raises(MergeError, match='no bias of the keys in the stock'):
        merged_state_dict(peft)


@pytest.mark.parametrize('variant', ['bare', 'mmseg, norm'])
def test_no_bias_at_all(variant, image):
    _, peft = peft_of(variant, 'SSF')
    with pytest.raises(MergeError, match='qkv has no bias in the stock'):
        merged_state_dict(peft)
    stock, peft = peft_of(variant, 'LoRA:rank=2+IA3')
    check_merged(stock, peft, image)


def test_bitfit(image):
    _, peft = peft_of('', 'BitFit')
    trained = {n for n, p in peft.named_parameters() if p.requires_grad}
    for leaf in ('q_bias', 'v_bias', 'relative_position_bias_table'):
        assert f'layers.1.attn.{leaf}' in trained
    loss_of(peft, image).backward()
    assert all(p.grad is not None for p in peft.parameters()
               if p.requires_grad)


# ---------------------------------------------------------------- prompts
@pytest.mark.parametrize('method', ['VPTShallow', 'VPTDeep'])
def test_prompts_are_tokens_without_a_bias(method, image):
    """[prompts, class, patches] through stock blocks, which take the bias
    of all tokens from outside."""
    stock, peft = peft_of('shared', f'{method}:num_tokens=3')
    stock.eval(), peft.eval()
    x, *_ = stream_of(stock, image)
    bias = F.pad(stock.rel_pos_bias(), (3, 0, 3, 0))
    for i, layer in enumerate(stock.layers):
        if method == 'VPTDeep':
            prompts = peft.layers[i].peft['vpt_deep']['tokens'].prompts.weight
        else:
            prompts = peft.peft.vpt_shallow.weight
        if not i or method == 'VPTDeep':
            x = x[:, 3:] if i else x
            x = torch.cat([prompts.expand(2, -1, -1), x], dim=1)
        x = layer(x, bias)
    out = run(peft, image)[0].flatten(2).transpose(1, 2)
    assert (out - x[:, 4:]).abs().max() < 1e-5


@pytest.mark.parametrize('method',
                         TOGETHER[1:3] + ['VPTDeep:num_tokens=2,norm=False'])
def test_own_tables_are_as_a_shared_one(method, image):
    _, own = peft_of('', method)
    _, shared = peft_of('shared', method)
    state = own.state_dict()
    table = state['layers.0.attn.relative_position_bias_table']
    for key in state:
        if 'relative_position_bias_table' in key:
            state[key] = table
    own.load_state_dict(state)
    state = {k: v for k, v in state.items() if 'relative_position' not in k}
    state['rel_pos_bias.relative_position_bias_table'] = table
    assert not shared.load_state_dict(state, strict=False).unexpected_keys
    own.eval(), shared.eval()
    for a, b in zip(run(own, image), run(shared, image)):
        assert (a - b).abs().max() < 1e-5


# ------------------------------------------------------------------- grid
def test_grid_methods_skip_the_last_block_of_a_class_token(image):
    _, peft = peft_of('class token', 'Mona:dim=4')
    assert peft.peft.gridless == {'mona': ['layers.2']}
    for variant in ('', 'average', 'pre-training', 'mmseg', 'MAE'):
        assert peft_of(variant, 'Mona:dim=4')[1].peft.gridless == {}


def test_masked_images(image):
    """BEiT puts a token in the place of a masked patch, CAE drops it."""
    mask = torch.zeros(2, 4, 4)
    mask[:, 1:3] = 1
    _, peft = peft_of('pre-training', 'Mona:dim=4+LoRA:rank=2')
    assert peft(image, mask)[0].shape == (2, 17, 16)
    mask = mask.flatten(1).bool()
    _, peft = peft_of('CAE', 'LoRA:rank=2+VPTDeep:num_tokens=2')
    assert peft(image, mask).shape == (2, 9, 16)
    _, peft = peft_of('CAE', 'Mona:dim=4')
    with pytest.raises(SiteError, match='needs the whole grid.*9 tokens'):
        peft(image, mask)


def test_other_sizes_of_images():
    """Without relative positions any size will do."""
    _, peft = peft_of('absolute', 'Mona:dim=4+VPTDeep:num_tokens=2')
    assert run(peft, torch.randn(1, 3, 40, 21))[0].shape == (1, 16, 5, 3)


# ---------------------------------------------------------------- outputs
def test_blocks_behind_the_last_output(image):
    for method in ('Mona:dim=4', 'LNTune', 'BitFit', 'SSF', 'LST:reduction=4'):
        _, peft = peft_of('mmseg, not the last', method)
        check_skipped(peft, image, ['layers.2'], ('layers.2.', 'ln1.'))


@pytest.mark.parametrize('variant', VARIANTS)
def test_side_networks_join_each_output_once(variant, image):
    """Against what the stock blocks give, by hand."""
    stock, peft = peft_of(variant, dict(type=Sum))
    stock.eval(), peft.eval()
    (_, *ys), expected = stream_of(stock, image), []
    for i in sorted(stock.out_indices):
        out = ys[i] + sum(ys[:i + 1])
        if i == len(ys) - 1 and stock.final_norm:
            out = stock.ln1(out)
        if hasattr(stock, '_format_output'):
            out = stock._format_output(out, (4, 4))
        else:
            out = out[:, 1:].transpose(1, 2).contiguous()
            out = out.view(2, 16, 4, 4)
        expected.append(out)
    assert [o.stride()
            for o in run(peft, image)] == [o.stride() for o in expected]
    check_joined(stock, peft, image, expected)
    assert not peft._forward_hooks and not peft.layers[0]._forward_hooks


# ------------------------------------------------- the rest of the stock API
def segmentor(backbone):
    return dict(
        type='mmseg.EncoderDecoder',
        backbone=backbone,
        decode_head=dict(
            type='mmseg.FCNHead',
            in_channels=16,
            in_index=0,
            channels=8,
            num_convs=1,
            num_classes=3),
        test_cfg=dict(mode='whole'))


DECAY = 'Mona:dim=4+SSF+LST:reduction=4+VPTShallow:num_tokens=2'


@pytest.mark.parametrize('variant,constructor,paramwise', [
    ('class token', 'mmpretrain.LearningRateDecayOptimWrapperConstructor',
     dict(layer_decay_rate=.5)),
    ('mmseg', 'mmseg.LearningRateDecayOptimizerConstructor',
     dict(num_layers=3, decay_rate=.5, decay_type='layer_wise')),
    ('MAE', 'mmseg.LayerDecayOptimizerConstructor',
     dict(num_layers=3, layer_decay_rate=.5)),
])
def test_layer_decay(variant, constructor, paramwise):
    import mmpretrain.engine.optimizers  # noqa: F401
    import mmseg.engine.optimizers  # noqa: F401
    model = classifier if 'mmpretrain' in constructor else segmentor
    model = MODELS.build(model(with_method(cfg_of(variant), DECAY)))
    rates = check_layer_decay(
        model, constructor=constructor, paramwise_cfg=paramwise)
    stem = model.backbone.patch_embed.projection.peft
    assert {rates[id(p)] for p in stem.parameters()} == {.5**4}


def test_configs_are_recognised():
    for variant, model in (('average', classifier), ('pre-training',
                                                     classifier),
                           ('mmseg', segmentor), ('MAE', segmentor)):
        backbone = check_recognised(model(cfg_of(variant)))
        assert backbone.layers[0].peft


def test_blocks_elsewhere_are_left_alone():
    """The necks of CAE and BEiT v2 have blocks of the same class."""
    neck = MODELS.build(
        dict(
            type='mmpretrain.BEiTV2Neck',
            num_layers=1,
            early_layers=1,
            backbone_arch='base',
            drop_path_rate=0.,
            layer_scale_init_value=.1))
    assert not find_family(neck)
    model = nn.ModuleDict(dict(neck=neck, backbone=stock_of('')))
    assert {host for host, _ in find_family(model)} == {'backbone'}


# ------------------------------------------------------------- checkpoints
def train_step(peft, image):
    peft.train()
    return torch.isfinite(run(peft, image)[0]).all()


def test_positions_of_another_size(image):
    """Stock resizes them while it loads; that is loaded."""
    _, peft = peft_of('absolute', 'LoRA:rank=2')
    peft.peft.base_checked = False
    state = stock_of('absolute', img_size=48).state_dict()
    peft.load_state_dict(state, strict=False)
    assert train_step(peft, image) and peft.peft.base_checked


@pytest.mark.parametrize('variant', ['MAE', 'mmseg'])
def test_pretrained_by_mmseg(variant, image, tmp_path):
    """MAE's checkpoints have no tables: those start at zero, and stay."""
    file = str(tmp_path / 'weights.pth')
    size = 48 if variant == 'MAE' else 32
    state = stock_of(variant, img_size=size).state_dict()
    if variant == 'MAE':
        state = {k: v for k, v in state.items() if 'relative' not in k}
    torch.save(state, file)
    peft = MODELS.build(
        with_method(
            cfg_of(variant),
            'LoRA:rank=2',
            init_cfg=dict(type='Pretrained', checkpoint=file)))
    peft.init_weights()
    attn = peft.layers[1].attn
    assert torch.equal(attn.qkv.weight, state['layers.1.attn.qkv.weight'])
    assert attn.relative_position_bias_table.any() == (variant == 'mmseg')
    assert train_step(peft, image)
    # Random tables would be refused.
    attn.relative_position_bias_table.data.normal_()
    peft.peft.base_checked = False
    if variant == 'MAE':
        with pytest.raises(ValueError, match='1 of .*position_bias_table'):
            run(peft, image)


@pytest.mark.parametrize('variant', ['', 'mmseg'])
def test_tables_of_another_size(variant, image, tmp_path, monkeypatch):
    """By the stock code, which needs a function that SciPy 1.14 removed; in
    its place what SciPy recommends instead."""
    from scipy import interpolate

    def interp2d(x, y, z, kind):
        assert kind == 'cubic'
        spline = interpolate.RectBivariateSpline(x, y, z.T)
        return lambda x, y: spline(x, y).T

    monkeypatch.setattr(interpolate, 'interp2d', interp2d)
    file = str(tmp_path / 'weights.pth')
    torch.save(stock_of(variant, img_size=48).state_dict(), file)
    given = dict(init_cfg=dict(type='Pretrained', checkpoint=file))
    stock = MODELS.build(cfg_of(variant, **given))
    peft = MODELS.build(with_method(cfg_of(variant), 'LoRA:rank=2', **given))
    stock.init_weights(), peft.init_weights()
    assert train_step(peft, image)
    for name, parameter in stock.named_parameters():
        assert torch.equal(peft.get_parameter(name), parameter), name
    stock.eval(), peft.eval()
    assert equal(run(stock, image), run(peft, image))
