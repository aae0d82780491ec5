import pytest
import torch

from mmpeft.errors import MergeError, PEFTError
from mmpeft.merging import merged_state_dict
from mmpeft.methods import BAPAT, AdaptFormer
from . import reference as ref
from .checks import check_block, check_module, check_released_module
from .recorded import tensor
from .reference_prompts import attention
from .swins import LIBRARIES, NO_LAYOUT, site, swin, trained

DTYPES = (torch.float32, torch.float64)
SMALL = dict(type='BAPAT', dim=8, adaptformer_dim=8)


def added(x, p, targets=('k', 'v'), scale=.8, prefix=''):
    """What comes to queries, keys and values; nothing where no target is."""
    t = ref.linear(x, p[prefix + 'down.weight'], p[prefix + 'down.bias'])
    t = 1 - 2 / (torch.exp(2 * t) + 1)
    t = scale * ref.linear(t, p[prefix + 'up.weight'], p[prefix + 'up.bias'])
    dims = x.shape[-1]
    own = [part for part in 'qkv' if part in targets]
    found = {n: t[..., i * dims:i * dims + dims] for i, n in enumerate(own)}
    zero = torch.zeros_like(x)
    return torch.cat([found.get(part, zero) for part in 'qkv'], dim=-1)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('dims,dim,scale,targets,shape', [
    (12, 4, .8, ('k', 'v'), (2, 15)),
    (12, 24, .2, ('v', 'q'), (3, 1)),
    (9, 5, 2., ['q', 'k'], (1, 7)),
    (8, 3, .8, ['q', 'k', 'v'], (4, 2, 3)),
    (8, 8, .8, ['v'], (2, 3)),
])
def test_formula(dims, dim, scale, targets, shape, dtype):
    module = BAPAT(site('qkv', dims), dim=dim, scale=scale, targets=targets)

    def formula(x, y, p):
        return y + added(x, p, targets, scale)

    check_module(module, formula, tensor('x', *shape, dims),
                 tensor('y', *shape, 3 * dims), NO_LAYOUT, dtype)


@pytest.mark.parametrize('library', LIBRARIES)
@pytest.mark.parametrize('adaptformer_dim', [8, None])
def test_in_the_projection_and_beside_the_mlp(library, adaptformer_dim):
    """Pad tokens of windows pass it, too; the AdaptFormer has the input of
    the MLP and lies inside drop-path."""

    def block(x, p, _, mlp, drop):
        branch, _ = attention(
            x, (7, 5),
            p,
            2,
            4,
            2,
            added=lambda t: added(t, p, prefix='peft.bapat.qkv.'))
        x = x + drop(branch)
        branch = mlp(x)
        if adaptformer_dim is not None:
            at = 'peft.bapat.ffn_parallel.'
            z = ref.layer_norm(x, p['norm2.weight'], p['norm2.bias'])
            t = ref.relu(
                ref.linear(z, p[at + 'down.weight'], p[at + 'down.bias']))
            branch = branch + .1 * ref.linear(t, p[at + 'up.weight'],
                                              p[at + 'up.bias'])
        return x + drop(branch)

    check_block(library, dict(SMALL, adaptformer_dim=adaptformer_dim), block,
                0.5)


@pytest.mark.parametrize('dtype', DTYPES)
def test_released_block(dtype):
    block = swin('mmdet', SMALL, depths=(2, )).stages[0].blocks[1]
    check_released_module('released_bapat', block, lambda m, x: m(x, (7, 5)),
                          (2, 35, 16), dtype)


def test_init():
    """The attention's part as any linear layer, the AdaptFormer's at zero."""
    backbone = swin('mmdet', SMALL)
    backbone.init_weights()
    peft = backbone.stages[1].blocks[0].peft.bapat
    assert type(peft.ffn_parallel) is AdaptFormer
    for linear in (peft.qkv.down, peft.qkv.up):
        bound = linear.in_features**-.5
        assert .8 * bound < linear.weight.abs().max() <= bound
        assert .5 * bound < linear.bias.abs().max() <= bound
    assert (peft.ffn_parallel.up.weight == 0).all()
    assert (peft.ffn_parallel.up.bias == 0).all()


def attention_count(d, parts, a):
    return d * a + a + parts * (a * d + d)


@pytest.mark.parametrize('kwargs,of_width', [
    ({}, lambda d: attention_count(d, 2, 8) + 2 * 8 * d + 8 + d),
    (dict(adaptformer_dim=None), lambda d: attention_count(d, 2, 8)),
    (dict(targets=['q', 'k', 'v'], dim=9, adaptformer_dim=3),
     lambda d: attention_count(d, 3, 9) + 2 * 3 * d + 3 + d),
])
def test_count(kwargs, of_width):
    backbone = swin('mmdet', dict(SMALL, **kwargs))
    expected = sum(2 * of_width(d) for d in (16, 32))
    assert sum(p.numel() for p in trained(backbone).values()) == expected


def test_defaults_are_those_of_the_released_command():
    backbone = swin(
        'mmdet', 'BAPAT', embed_dims=64, depths=(2, ), num_heads=(2, ))
    peft = backbone.stages[0].blocks[0].peft.bapat
    assert peft.qkv.down.out_features == 128
    assert peft.ffn_parallel.down.out_features == 64
    assert (peft.qkv.scale, peft.ffn_parallel.scale) == (.8, .1)
    assert peft.ffn_parallel.dropout.p == 0


def test_merge_is_refused_with_a_reason():
    with pytest.raises(MergeError, match='BAPAT .*non-linearity'):
        merged_state_dict(swin('mmdet', SMALL))


@pytest.mark.parametrize('kwargs,message', [
    (dict(dim=0), 'dim must be a whole number'),
    (dict(dim=33), 'dim=33 is larger than the width 32'),
    (dict(adaptformer_dim=17), 'BAPAT: adaptformer_dim=17 is larger'),
    (dict(adaptformer_dim=0), 'adaptformer_dim must be a whole number'),
    (dict(scale=0.), 'scale must be'),
    (dict(targets=['q', 'w']), "targets=.*'w'.*at least one of q, k, v"),
    (dict(targets=[]), 'at least one of q, k, v'),
    (dict(targets='kv'), 'must be a list'),
    (dict(mode='patt_kv'), "no argument 'mode'"),
])
def test_arguments(kwargs, message):
    with pytest.raises(PEFTError, match=message):
        swin('mmdet', dict(SMALL, **kwargs))
