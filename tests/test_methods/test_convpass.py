import math

import pytest
import torch

from mmpeft.errors import MergeError, PEFTError
from mmpeft.merging import merged_state_dict
from mmpeft.methods import Convpass
from mmpeft.sites import TokenLayout
from . import reference as ref
from .checks import check_block, check_module, check_released_module
from .recorded import fill, tensor
from .swins import LIBRARIES, site, swin, trained

DTYPES = (torch.float32, torch.float64)


def gelu(x):
    return x / (1 + torch.exp(-1.702 * x))


def convolve(t, weight, bias):
    """(B, C, H, W) -> (B, C, H, W), tap by tap."""
    height, width = t.shape[-2:]
    wide = t.new_zeros(*t.shape[:2], height + 2, width + 2)
    wide[:, :, 1:-1, 1:-1] = t
    out = 0
    for i in range(3):
        for j in range(3):
            seen = wide[:, :, i:i + height, j:j + width]
            out = out + torch.einsum('oc,bchw->bohw', weight[:, :, i, j], seen)
    return out + bias[:, None, None]


def branch(x, p, hw, extra=0, scale=1., prefix=''):
    """The bottleneck, the map and each extra token by itself."""
    t = gelu(ref.linear(x, p[prefix + 'down.weight'], p[prefix + 'down.bias']))
    batch, _, dim = t.shape
    maps = [(t[:, i:i + 1], (1, 1)) for i in range(extra)]
    outs = []
    for tokens, (height, width) in maps + [(t[:, extra:], hw)]:
        grid = tokens.reshape(batch, height, width, dim).permute(0, 3, 1, 2)
        grid = convolve(grid, p[prefix + 'conv.weight'],
                        p[prefix + 'conv.bias'])
        outs.append(grid.permute(0, 2, 3, 1).reshape(batch, -1, dim))
    return scale * ref.linear(
        gelu(torch.cat(outs, 1)), p[prefix + 'up.weight'],
        p[prefix + 'up.bias'])


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('dims,dim,hw,extra,scale', [
    (12, 4, (3, 5), 0, 1.),
    (8, 8, (1, 1), 0, .1),
    (10, 3, (2, 4), 1, 10.),
    (10, 3, (2, 4), 5, 1.),
])
def test_formula(dims, dim, hw, extra, scale, dtype):
    module = Convpass(
        site('attn_parallel', dims), dim=dim, scale=scale, drop_rate=0.)

    def formula(x, y, p):
        return y + branch(x, p, hw, extra, scale)

    num = extra + hw[0] * hw[1]
    check_module(module, formula, tensor('x', 2, num, dims),
                 tensor('y', 2, num, dims), TokenLayout(hw, extra), dtype)


@pytest.mark.parametrize('library', LIBRARIES)
@pytest.mark.parametrize('placement', ['block', 'attn'])
@pytest.mark.parametrize('drop_path_rate', [0., 0.5])
def test_parallel_to_both_branches(library, placement, drop_path_rate):

    def block(x, p, attention, mlp, drop):
        # Fed by the stream after its norm, inside drop-path.
        normed = ref.layer_norm(x, p['norm1.weight'], p['norm1.bias'])
        prefix = 'peft.convpass.attn_parallel.'
        beside = branch(normed, p, (7, 5), 0, .5, prefix)
        x = x + drop(attention(x) + beside)
        if placement == 'attn':
            return x + drop(mlp(x))
        normed = ref.layer_norm(x, p['norm2.weight'], p['norm2.bias'])
        prefix = 'peft.convpass.ffn_parallel.'
        beside = branch(normed, p, (7, 5), 0, .5, prefix)
        return x + drop(mlp(x) + beside)

    method = dict(
        type='Convpass', dim=4, scale=.5, drop_rate=0., placement=placement)
    check_block(library, method, block, drop_path_rate)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('case,layout', [
    ('convpass', TokenLayout((3, 3), 1)),
    ('convpass_swin', TokenLayout((4, 4))),
])
def test_released_module(case, layout, dtype):
    module = Convpass(site('attn_parallel', 24), scale=.5, drop_rate=0.)
    num = layout.num_extra_tokens + layout.hw_shape[0] * layout.hw_shape[1]
    check_released_module(f'released_{case}', module,
                          lambda m, x: m(x, torch.zeros_like(x), layout),
                          (2, num, 24), dtype)


@pytest.mark.parametrize('conv_init', ['xavier', 'delta'])
def test_starts_at_the_identity(conv_init):
    module = Convpass(site('attn_parallel', 16), conv_init=conv_init)
    x, y = (tensor(n, 2, 6, 16, dtype=torch.float32) for n in 'xy')
    assert torch.equal(module(x, y, TokenLayout((2, 3))), y)
    bound = math.sqrt(6 / (16 + 8))
    assert .9 * bound < module.down.weight.abs().max() <= bound
    if conv_init == 'delta':
        t = tensor('t', 1, 8, 3, 4, dtype=torch.float32)
        assert torch.equal(module.conv(t), t)
    else:
        bound = math.sqrt(6 / (9 * 8 + 9 * 8))
        assert .9 * bound < module.conv.weight.abs().max() <= bound


@pytest.mark.parametrize('placement,sites', [('block', 2), ('attn', 1)])
def test_count(placement, sites):
    backbone = swin('mmdet', dict(type='Convpass', placement=placement))
    expected = sum(2 * sites * (2 * d * 8 + 8 + d + 9 * 8**2 + 8)
                   for d in (16, 32))
    assert sum(p.numel() for p in trained(backbone).values()) == expected


def test_dropout_acts_in_training_only():
    module = Convpass(site('attn_parallel', 8), dim=4, drop_rate=.5)
    fill(module)
    x, y = (tensor(n, 2, 6, 8, dtype=torch.float32) for n in 'xy')
    layout = TokenLayout((2, 3))
    assert not torch.equal(module(x, y, layout), module(x, y, layout))
    module.eval()
    assert torch.equal(module(x, y, layout), module(x, y, layout))


def test_merge_is_refused_with_a_reason():
    with pytest.raises(MergeError, match='Convpass .*non-linearity'):
        merged_state_dict(swin('mmdet', 'Convpass'))


@pytest.mark.parametrize('kwargs,message', [
    (dict(dim=-1), 'dim must be a whole number'),
    (dict(dim=17), 'dim=17 is larger than the width 16'),
    (dict(scale=0.), 'scale must be'),
    (dict(drop_rate=2), r'drop_rate .*\[0, 1\)'),
    (dict(conv_init='zero'), "unknown conv_init 'zero'.*xavier, delta"),
    (dict(placement='mlp'), "unknown placement 'mlp'.*block, attn"),
])
def test_arguments(kwargs, message):
    with pytest.raises(PEFTError, match=message):
        swin('mmdet', dict(type='Convpass', **kwargs))
