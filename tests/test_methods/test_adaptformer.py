import pytest
import torch

from mmpeft.errors import MergeError, PEFTError
from mmpeft.merging import merged_state_dict
from mmpeft.methods import AdaptFormer
from . import reference as ref
from .checks import (check_block, check_module, check_released_backbone,
                     check_released_module)
from .recorded import tensor
from .swins import LIBRARIES, NO_LAYOUT, site, swin, trained

DTYPES = (torch.float32, torch.float64)
# What the code released with Mona does, apart from its initialisation.
RELEASED = dict(scale=.1, act='gelu', drop_rate=0.)


def branch(x, p, prefix='', scale=.1, act=ref.relu, norm=False):
    """``scale * (W2 relu(W1 x + b1) + b2)``."""
    if norm:
        x = ref.layer_norm(x, p[prefix + 'norm.weight'],
                           p[prefix + 'norm.bias'])
    t = act(ref.linear(x, p[prefix + 'down.weight'], p[prefix + 'down.bias']))
    return scale * ref.linear(t, p[prefix + 'up.weight'],
                              p[prefix + 'up.bias'])


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('dims,dim,shape,act,scale,norm', [
    (12, 4, (2, 15), 'relu', .1, False),
    (8, 8, (3, 1), 'gelu', 1., False),
    (10, 3, (1, 7), 'relu', 4., True),
])
def test_formula(dims, dim, shape, act, scale, norm, dtype):
    module = AdaptFormer(
        site('ffn_residual', dims),
        dim=dim,
        scale=scale,
        drop_rate=0.,
        act=act,
        norm=norm)

    def formula(x, y, p):
        return y + branch(x, p, scale=scale, act=getattr(ref, act), norm=norm)

    check_module(module, formula, tensor('x', *shape, dims),
                 tensor('y', *shape, dims), NO_LAYOUT, dtype)


@pytest.mark.parametrize('library', LIBRARIES)
@pytest.mark.parametrize('drop_path_rate', [0., 0.5])
def test_parallel_to_the_mlp_outside_drop_path(library, drop_path_rate):

    def block(x, p, attention, mlp, drop):
        x = x + drop(attention(x))
        # Fed by the stream before its norm.
        return x + drop(mlp(x)) + branch(x, p,
                                         'peft.adaptformer.ffn_residual.')

    check_block(library, dict(type='AdaptFormer', dim=4, drop_rate=0.), block,
                drop_path_rate)


@pytest.mark.parametrize('dtype', DTYPES)
def test_released_module(dtype):
    module = AdaptFormer(site('ffn_residual', 64), dim=64, **RELEASED)
    check_released_module('released_adaptformer', module,
                          lambda m, x: m(x, torch.zeros_like(x), NO_LAYOUT),
                          (2, 15, 64), dtype)


@pytest.mark.parametrize('library,dtype', [
    ('mmdet', torch.float32),
    ('mmdet', torch.float64),
    ('mmseg', torch.float64),
    ('mmpretrain', torch.float64),
])
def test_released_backbone(library, dtype):
    check_released_backbone(
        'released_adaptformer_swin',
        library,
        dict(type='AdaptFormer', dim=64, **RELEASED),
        dtype,
        embed_dims=64)


def test_starts_at_the_identity():
    module = AdaptFormer(site('ffn_residual', 16), dim=4)
    x, y = (tensor(n, 2, 5, 16, dtype=torch.float32) for n in 'xy')
    assert torch.equal(module(x, y, NO_LAYOUT), y)
    bound = 1 / 4
    assert 0.8 * bound < module.down.weight.abs().max() <= bound


def test_released_init_is_no_identity():
    torch.manual_seed(0)
    module = AdaptFormer(site('ffn_residual', 96), dim=48, init_std=.02)
    for linear in (module.down, module.up):
        assert linear.weight.std().item() == pytest.approx(.02, rel=.1)
        assert (linear.bias == 0).all()


@pytest.mark.parametrize('norm', [False, True])
def test_count(norm):
    backbone = swin('mmdet', dict(type='AdaptFormer', dim=4, norm=norm))
    expected = sum(2 * (2 * d * 4 + 4 + d + 2 * d * norm) for d in (16, 32))
    assert sum(p.numel() for p in trained(backbone).values()) == expected


def test_merge_is_refused_with_a_reason():
    backbone = swin('mmdet', dict(type='AdaptFormer', dim=4))
    with pytest.raises(MergeError, match='AdaptFormer .*non-linearity'):
        merged_state_dict(backbone)


@pytest.mark.parametrize('kwargs,message', [
    (dict(dim=-1), 'dim must be a whole number'),
    (dict(dim=17), 'dim=17 is larger than the width 16'),
    (dict(act='swish'), "unknown act 'swish'.*relu, gelu"),
    (dict(drop_rate=2), r'drop_rate .*\[0, 1\)'),
    (dict(init_std=0.), 'init_std must be'),
    (dict(scale=0.), 'scale must be'),
    (dict(scale='big'), 'scale must be'),
    (dict(placement='houlsby'), "no argument 'placement'"),
])
def test_arguments(kwargs, message):
    with pytest.raises(PEFTError, match=message):
        swin('mmdet', dict(type='AdaptFormer', **dict(dict(dim=4), **kwargs)))
