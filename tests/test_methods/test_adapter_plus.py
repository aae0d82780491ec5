import pytest
import torch

from mmpeft.errors import MergeError, PEFTError
from mmpeft.merging import merged_state_dict
from mmpeft.methods import AdapterPlus
from mmpeft.sites import Site
from . import reference as ref
from .checks import check_block, check_module, check_released_module
from .recorded import fill, tensor
from .swins import LIBRARIES, NO_LAYOUT, site, swin, trained

DTYPES = (torch.float32, torch.float64)
SMALL = dict(type='AdapterPlus', dim=4)


def adapter(y, p, prefix=''):
    """``scale * (W2 gelu(W1 y + b1) + b2)``"""
    t = ref.linear(y, p[prefix + 'down.weight'], p[prefix + 'down.bias'])
    t = ref.linear(ref.gelu(t), p[prefix + 'up.weight'], p[prefix + 'up.bias'])
    return p[prefix + 'scale'] * t


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('dims,dim,shape', [(12, 4, (2, 15)), (8, 8, (3, 1)),
                                            (10, 1, (1, 7))])
def test_formula(dims, dim, shape, dtype):
    module = AdapterPlus(
        site('ffn_residual', dims), dim=dim, drop_path_rate=0.)

    def formula(x, y, p):
        return y + adapter(y, p)

    check_module(module, formula, tensor('x', *shape, dims),
                 tensor('y', *shape, dims), NO_LAYOUT, dtype)


@pytest.mark.parametrize('library', LIBRARIES)
@pytest.mark.parametrize('drop_path_rate', [0., 0.5])
def test_behind_the_block(library, drop_path_rate):

    def block(x, p, attention, mlp, drop):
        x = x + drop(attention(x))
        x = x + drop(mlp(x))
        return x + adapter(x, p, 'peft.adapter_plus.ffn_residual.')

    check_block(library, dict(SMALL, drop_path_rate=0.), block, drop_path_rate)


@pytest.mark.parametrize('dtype', DTYPES)
def test_released_module(dtype):
    module = AdapterPlus(site('ffn_residual', 64), drop_path_rate=0.)
    check_released_module('released_adapter_plus', module,
                          lambda m, x: m(torch.zeros_like(x), x, NO_LAYOUT),
                          (2, 15, 64), dtype)


def test_drop_path_takes_whole_samples():
    module = AdapterPlus(site('ffn_residual', 8), dim=4, drop_path_rate=.4)
    fill(module)
    x, y = (tensor(n, 500, 3, 8, dtype=torch.float32) for n in 'xy')
    torch.manual_seed(0)
    moved = (module(x, y, NO_LAYOUT) - y).flatten(1)
    full = (module.eval()(x, y, NO_LAYOUT) - y).flatten(1)
    kept = moved.abs().sum(1) > 0
    assert kept.float().mean().item() == pytest.approx(.6, abs=.07)
    torch.testing.assert_close(
        moved[kept], full[kept] / .6, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('rate,expected', [(.1, .1), (None, .3), (0., 0.)])
def test_rate_of_drop_path(rate, expected):
    place = Site('ffn_residual', 8, 8, drop_path=.3)
    module = AdapterPlus(place, dim=4, drop_path_rate=rate)
    assert module.drop_path_rate == expected


def test_takes_over_the_rates_of_the_blocks():
    backbone = swin(
        'mmdet', dict(SMALL, drop_path_rate=None), drop_path_rate=.3)
    rates = [
        block.peft.adapter_plus.ffn_residual.drop_path_rate
        for stage in backbone.stages for block in stage.blocks
    ]
    assert rates == pytest.approx([0., .1, .2, .3])


def test_starts_near_the_identity():
    backbone = swin('mmdet', SMALL, embed_dims=64)
    backbone.init_weights()
    module = backbone.stages[0].blocks[0].peft.adapter_plus.ffn_residual
    for linear in (module.down, module.up):
        assert linear.weight.std().item() == pytest.approx(.0088, rel=.15)
        assert linear.weight.abs().max() <= .02
        assert (linear.bias == 0).all()
    assert (module.scale == 1).all()
    x = tensor('x', 2, 5, 64, dtype=torch.float32)
    module.eval()
    torch.testing.assert_close(module(x, x, NO_LAYOUT), x, rtol=0, atol=5e-3)


def test_keeps_the_precision_of_the_stream_under_autocast():
    module = AdapterPlus(site('ffn_residual', 8), dim=4)
    x = tensor('x', 2, 5, 8, dtype=torch.bfloat16)
    with torch.autocast('cpu', torch.bfloat16):
        assert module(x, x, NO_LAYOUT).dtype is torch.bfloat16


@pytest.mark.parametrize('dim', [1, 8])
def test_count(dim):
    backbone = swin('mmdet', dict(type='AdapterPlus', dim=dim))
    expected = sum(2 * (2 * dim * d + dim + 2 * d) for d in (16, 32))
    assert sum(p.numel() for p in trained(backbone).values()) == expected


def test_merge_is_refused_with_a_reason():
    with pytest.raises(MergeError, match='AdapterPlus .*non-linearity'):
        merged_state_dict(swin('mmdet', SMALL))


@pytest.mark.parametrize('kwargs,message', [
    (dict(dim=0), 'dim must be a whole number'),
    (dict(dim=17), 'dim=17 is larger than the width 16'),
    (dict(drop_path_rate=1.), r'drop_path_rate .*\[0, 1\)'),
    (dict(init_std=0.), 'init_std must be'),
    (dict(position='pre'), "no argument 'position'"),
])
def test_arguments(kwargs, message):
    with pytest.raises(PEFTError, match=message):
        swin('mmdet', dict(SMALL, **kwargs))
