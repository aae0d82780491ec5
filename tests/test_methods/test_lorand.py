import pytest
import torch

from mmpeft.errors import MergeError, PEFTError
from mmpeft.merging import merged_state_dict
from mmpeft.methods import LoRand
from . import reference as ref
from .checks import check_block, check_module, check_released_module
from .recorded import tensor
from .swins import LIBRARIES, NO_LAYOUT, site, swin, trained

DTYPES = (torch.float32, torch.float64)
SMALL = dict(type='LoRand', rank=3)


def matrix(p, prefix, name, kernel):
    """``sum_i P_i K_i Q_i``, one product after the other."""
    left, right = p[f'{prefix}{name}_left'], p[f'{prefix}{name}_right']
    total = 0.
    for i in range(len(left)):
        total = total + left[i] @ kernel[i] @ right[i]
    return total


def adapter(y, p, prefix=''):
    """``gelu(y W1 + b1) W2 + b2``"""
    kernel = p[prefix + 'down_kernel']
    t = y @ matrix(p, prefix, 'down', kernel) + p[prefix + 'down_bias']
    kernel = p.get(prefix + 'up_kernel', kernel)
    return ref.gelu(t) @ matrix(p, prefix, 'up', kernel) + p[prefix +
                                                             'up_bias']


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('dims,shape,kwargs', [
    (12, (2, 15), dict(rank=4)),
    (16, (3, 1), dict(rank=8, dim=16)),
    (10, (1, 7), dict(rank=2, dim=3, num_branches=1)),
    (12, (2, 15), dict(rank=3, num_branches=4, share_kernel=False)),
])
def test_formula(dims, shape, kwargs, dtype):
    module = LoRand(site('attn_add', dims), **kwargs)

    def formula(x, y, p):
        return y + adapter(y, p)

    check_module(module, formula, tensor('x', *shape, dims),
                 tensor('y', *shape, dims), NO_LAYOUT, dtype)


@pytest.mark.parametrize('library', LIBRARIES)
@pytest.mark.parametrize('share_kernel', [True, False])
def test_on_both_branches_behind_drop_path(library, share_kernel):

    def block(x, p, attention, mlp, drop):
        for name, branch in (('attn_add', attention), ('ffn_add', mlp)):
            y = drop(branch(x))
            x = x + y + adapter(y, p, f'peft.lorand.{name}.')
        return x

    check_block(library, dict(SMALL, share_kernel=share_kernel), block, 0.5)


@pytest.mark.parametrize('dtype', DTYPES)
def test_released_module(dtype):
    module = LoRand(site('attn_add', 64), num_branches=4, share_kernel=False)
    check_released_module('released_lorand', module,
                          lambda m, x: m(torch.zeros_like(x), x, NO_LAYOUT),
                          (2, 15, 64), dtype)


def test_init():
    """Every factor by itself, the biases as for the matrices they go with."""
    backbone = swin(
        'mmdet',
        dict(type='LoRand', num_branches=40, share_kernel=False),
        embed_dims=64)
    backbone.init_weights()
    module = backbone.stages[0].blocks[0].peft.lorand.attn_add
    bounds = dict(
        down_left=8,
        down_kernel=8,
        down_right=32,
        down_bias=64,
        up_left=8,
        up_kernel=8,
        up_right=64,
        up_bias=32)
    assert set(bounds) == {n for n, _ in module.named_parameters()}
    for name, parameter in module.named_parameters():
        bound = bounds[name]**-.5
        assert .8 * bound < parameter.abs().max() <= bound, name
        assert abs(parameter.mean()) < .3 * bound, name


@pytest.mark.parametrize('kwargs,kernels', [
    (dict(rank=3), 1),
    (dict(rank=3, num_branches=4, share_kernel=False), 2),
    (dict(rank=2, dim=5), 1),
])
def test_count(kwargs, kernels):
    backbone = swin('mmdet', dict(type='LoRand', **kwargs))
    expected = 0
    for d in (16, 32):
        a, b = kwargs.get('num_branches', 2), kwargs['rank']
        m = kwargs.get('dim', d // 2)
        expected += 2 * 2 * (2 * a * b * (d + m) + kernels * a * b**2 + d + m)
    assert sum(p.numel() for p in trained(backbone).values()) == expected


def test_merge_is_refused_with_a_reason():
    with pytest.raises(MergeError, match='LoRand .*non-linearity'):
        merged_state_dict(swin('mmdet', SMALL))


@pytest.mark.parametrize('kwargs,message', [
    (dict(rank=0), 'rank must be a whole number'),
    (dict(rank=9), 'rank=9 is larger than the width 8'),
    (dict(dim=17), 'dim=17 is larger than the width 16'),
    (dict(num_branches=0), 'num_branches must be a whole number'),
    (dict(beta=8), "no argument 'beta'"),
])
def test_arguments(kwargs, message):
    with pytest.raises(PEFTError, match=message):
        swin('mmdet', dict(SMALL, **kwargs))
