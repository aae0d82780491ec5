import math

import pytest
import torch

from mmpeft.errors import PEFTError
from mmpeft.merging import merged_state_dict
from mmpeft.methods import RepAdapter
from mmpeft.sites import Site
from . import reference as ref
from .checks import check_block, check_module, check_released_module
from .recorded import fill, tensor
from .swins import LIBRARIES, NO_LAYOUT, swin, trained
from .test_lora_merge import check_merge

DTYPES = (torch.float32, torch.float64)
LAYERS = dict(qkv='attn.w_msa.qkv', fc1='ffn.layers.0.0')


def place(dims):
    return Site('qkv_input', dims, dims)


def adapt(x, p, groups, scale, prefix=''):
    """The bottleneck, group by group."""
    hidden = ref.linear(x, p[prefix + 'down.weight'], p[prefix + 'down.bias'])
    up, size = p[prefix + 'up_weight'], hidden.shape[-1] // groups
    rows = up.shape[0] // groups
    parts = [
        ref.linear(hidden[..., i * size:i * size + size],
                   up[i * rows:i * rows + rows], None) for i in range(groups)
    ]
    return x + scale * (torch.cat(parts, -1) + p[prefix + 'up_bias'])


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('dims,dim,groups,shape,scale', [
    (12, 8, 2, (2, 15), 1.),
    (12, 6, 3, (3, 1), .1),
    (10, 3, 1, (1, 2, 7), 10.),
])
def test_formula(dims, dim, groups, shape, scale, dtype):
    module = RepAdapter(
        place(dims), dim=dim, groups=groups, scale=scale, drop_rate=0.)

    def formula(x, y, p):
        return adapt(y, p, groups, scale)

    check_module(module, formula, tensor('x', *shape, dims),
                 tensor('y', *shape, dims), NO_LAYOUT, dtype)


@pytest.mark.parametrize('library', LIBRARIES)
@pytest.mark.parametrize('placement', ['block', 'attn'])
def test_in_front_of_attention_and_mlp(library, placement):
    """In a block whose windows are padded: pad tokens pass through it."""

    def block(x, p, attention, mlp, drop):
        p = dict(p)
        for name, layer in LAYERS.items():
            prefix = f'peft.rep_adapter.{name}_input.'
            if prefix + 'up_bias' not in p:
                assert (placement, name) == ('attn', 'fc1')
                continue
            weight, bias = p[f'{layer}.weight'], p[f'{layer}.bias']
            unit = torch.eye(weight.shape[1]).to(weight)
            offset = adapt(0 * unit[:1], p, 2, .5, prefix)
            matrix = adapt(unit, p, 2, .5, prefix) - offset
            p[f'{layer}.weight'] = weight @ matrix.t()
            p[f'{layer}.bias'] = bias + weight @ offset[0]
        x = x + drop(attention(x, p))
        return x + drop(mlp(x, p))

    method = dict(
        type='RepAdapter', dim=4, scale=.5, drop_rate=0., placement=placement)
    check_block(library, method, block, .5)


@pytest.mark.parametrize('dtype', DTYPES)
def test_released_module(dtype):
    module = RepAdapter(place(32), scale=.5, drop_rate=0.)
    check_released_module('released_rep_adapter', module,
                          lambda m, x: m(x, x, NO_LAYOUT), (2, 15, 32), dtype)


def test_where_nothing_is_padded_it_is_after_the_norm():
    """The paper's place, on a map that the windows divide."""
    backbone = swin('mmdet', dict(type='RepAdapter', dim=4, layers=0))
    fill(backbone.eval())
    block = backbone.stages[0].blocks[0]
    module = block.peft['rep_adapter']['qkv_input']
    x = tensor('x', 2, 8 * 8, 16, dtype=torch.float32)
    with torch.no_grad():
        here = block.attn(x, (8, 8))
        there = module(x, x, NO_LAYOUT)
        del block.peft['rep_adapter']['qkv_input']
        there = block.attn(there, (8, 8))
    assert torch.allclose(here, there, atol=1e-5)


def test_starts_at_the_identity():
    module = RepAdapter(place(16))
    y = tensor('y', 2, 5, 16, dtype=torch.float32)
    assert torch.equal(module(y, y, NO_LAYOUT), y)
    bound = math.sqrt(6 / (16 + 8))
    assert .9 * bound < module.down.weight.abs().max() <= bound


@pytest.mark.parametrize('groups', [1, 2, 4])
def test_count(groups):
    backbone = swin('mmdet', dict(type='RepAdapter', groups=groups))
    expected = sum(4 * (d * 8 + 8 + d * 8 // groups + d) for d in (16, 32))
    assert sum(p.numel() for p in trained(backbone).values()) == expected


@pytest.mark.parametrize('library', LIBRARIES)
@pytest.mark.parametrize('size', [(36, 28), (33, 50), (64, 64)])
def test_merge(library, size):
    backbone = swin(library, dict(type='RepAdapter', dim=4, scale=.25))
    fill(backbone)
    backbone.eval()
    check_merge(library, backbone, size)


@pytest.mark.parametrize('names', [('first', 'second'), ('second', 'first')])
def test_merge_of_two_and_of_what_is_at_the_layer(names):
    """The one in front folds in last, whatever the order of the list."""
    methods = [
        dict(type='RepAdapter', dim=4, scale=.25, name=names[0]),
        dict(type='LoRA', rank=3, alpha=1, targets=['q', 'fc1']),
        dict(type='SSF'),
        dict(type='RepAdapter', dim=8, scale=.25, name=names[1]),
    ]
    backbone = swin('mmdet', methods)
    fill(backbone)
    backbone.eval()
    check_merge('mmdet', backbone)


def test_merge_leaves_other_layers_alone():
    backbone = swin('mmdet', dict(type='RepAdapter', dim=4))
    fill(backbone)
    before, merged = backbone.state_dict(), merged_state_dict(backbone)
    changed = {k for k in merged if not torch.equal(merged[k], before[k])}
    assert changed == {
        k
        for k in merged
        if 'blocks' in k and any(n in k for n in LAYERS.values())
    }


@pytest.mark.parametrize('kwargs,message', [
    (dict(dim=0), 'dim must be a whole number'),
    (dict(dim=18), 'dim=18 is larger than the width 16'),
    (dict(groups=3), 'groups=3 does not divide dim=8 and the width 16'),
    (dict(dim=9, groups=3), 'groups=3 does not divide dim=9 and the width 16'),
    (dict(groups=0), 'groups must be a whole number'),
    (dict(scale=0), 'scale must be'),
    (dict(drop_rate=-1), r'drop_rate .*\[0, 1\)'),
    (dict(placement='mlp'), "unknown placement 'mlp'.*block, attn"),
])
def test_arguments(kwargs, message):
    with pytest.raises(PEFTError, match=message):
        swin('mmdet', dict(type='RepAdapter', **kwargs))
