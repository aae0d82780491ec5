import pytest
import torch

from mmpeft.errors import MergeError, PEFTError
from mmpeft.merging import merged_state_dict
from mmpeft.methods import Adapter
from . import reference as ref
from .checks import (check_block, check_module, check_released_backbone,
                     check_released_module)
from .recorded import tensor
from .swins import LIBRARIES, NO_LAYOUT, site, swin, trained

DTYPES = (torch.float32, torch.float64)


def adapter(y, p, prefix=''):
    """``y + W2 gelu(W1 y + b1) + b2``."""
    t = ref.linear(y, p[prefix + 'down.weight'], p[prefix + 'down.bias'])
    return y + ref.linear(
        ref.gelu(t), p[prefix + 'up.weight'], p[prefix + 'up.bias'])


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('name', ['attn_branch', 'ffn_branch'])
@pytest.mark.parametrize('dims,dim,shape', [(12, 4, (2, 15)), (8, 8, (3, 1))])
def test_formula(name, dims, dim, shape, dtype):
    module = Adapter(site(name, dims), dim=dim)
    check_module(module, lambda x, y, p: adapter(y, p),
                 tensor('x', *shape, dims), tensor('y', *shape, dims),
                 NO_LAYOUT, dtype)


@pytest.mark.parametrize('library', LIBRARIES)
@pytest.mark.parametrize('drop_path_rate', [0., 0.5])
def test_houlsby_inside_both_residuals(library, drop_path_rate):

    def block(x, p, attention, mlp, drop):
        x = x + drop(adapter(attention(x), p, 'peft.adapter.attn_branch.'))
        return x + drop(adapter(mlp(x), p, 'peft.adapter.ffn_branch.'))

    check_block(library, dict(type='Adapter', dim=4), block, drop_path_rate)


@pytest.mark.parametrize('library', LIBRARIES)
def test_pfeiffer_after_the_mlp_only(library):

    def block(x, p, attention, mlp, drop):
        x = x + drop(attention(x))
        return x + drop(adapter(mlp(x), p, 'peft.adapter.ffn_branch.'))

    check_block(library, dict(type='Adapter', dim=4, placement='pfeiffer'),
                block, 0.5)


@pytest.mark.parametrize('dtype', DTYPES)
def test_released_module(dtype):
    module = Adapter(site('ffn_branch', 64), dim=64)
    check_released_module('released_adapter', module,
                          lambda m, x: m(torch.zeros_like(x), x, NO_LAYOUT),
                          (2, 15, 64), dtype)


@pytest.mark.parametrize('library,dtype', [
    ('mmdet', torch.float32),
    ('mmdet', torch.float64),
    ('mmseg', torch.float64),
    ('mmpretrain', torch.float64),
])
def test_released_backbone(library, dtype):
    check_released_backbone(
        'released_adapter_swin',
        library,
        dict(type='Adapter', dim=64),
        dtype,
        embed_dims=64)


def test_starts_near_the_identity():
    torch.manual_seed(0)
    module = Adapter(site('ffn_branch', 96), dim=48)
    y = tensor('y', 2, 15, 96, dtype=torch.float32)
    out = module(y, y, NO_LAYOUT)
    assert not torch.equal(out, y)
    assert (out - y).abs().max() < 1e-3 * y.abs().max()


@pytest.mark.parametrize('init_std', [1e-3, .02])
def test_init_is_a_normal_cut_at_two_deviations(init_std):
    torch.manual_seed(0)
    module = Adapter(site('ffn_branch', 96), dim=48, init_std=init_std)
    for linear in (module.down, module.up):
        assert linear.weight.abs().max() <= 2.001 * init_std
        # A normal cut at two deviations has 0.88 of the deviation.
        assert linear.weight.std().item() == pytest.approx(
            .88 * init_std, rel=.05)
        assert (linear.bias == 0).all()


def test_both_matrices_get_gradients_at_first():
    backbone = swin('mmdet', dict(type='Adapter', dim=4))
    backbone.train()
    image = tensor('image', 1, 3, 36, 28, dtype=torch.float32)
    sum((out**2).mean() for out in backbone(image)).backward()
    assert all(p.grad.abs().max() > 0 for p in trained(backbone).values())


@pytest.mark.parametrize('placement,modules', [('houlsby', 2),
                                               ('pfeiffer', 1)])
def test_count(placement, modules):
    backbone = swin('mmdet', dict(type='Adapter', dim=4, placement=placement))
    expected = sum(modules * 2 * (2 * d * 4 + 4 + d) for d in (16, 32))
    assert sum(p.numel() for p in trained(backbone).values()) == expected


def test_dropout_in_training_only():
    module = Adapter(site('ffn_branch', 8), dim=4, drop_rate=.5, init_std=.5)
    y = tensor('y', 1, 6, 8, dtype=torch.float32)
    assert not torch.equal(module(y, y, NO_LAYOUT), module(y, y, NO_LAYOUT))
    module.eval()
    assert torch.equal(module(y, y, NO_LAYOUT), module(y, y, NO_LAYOUT))


def test_merge_is_refused_with_a_reason():
    backbone = swin('mmdet', dict(type='Adapter', dim=4))
    with pytest.raises(MergeError, match='Adapter .*non-linearity'):
        merged_state_dict(backbone)


@pytest.mark.parametrize('kwargs,message', [
    (dict(dim=0), 'dim must be a whole number'),
    (dict(dim='4'), 'dim must be a whole number'),
    (dict(dim=17), 'dim=17 is larger than the width 16'),
    (dict(placement='parallel'), "unknown placement 'parallel'.*houlsby"),
    (dict(drop_rate=1), r'drop_rate .*\[0, 1\)'),
    (dict(drop_rate=None), r'drop_rate .*\[0, 1\)'),
    (dict(init_std=0.), 'init_std must be'),
    (dict(init_std=-1.), 'init_std must be'),
    (dict(scale=.1), "no argument 'scale'"),
])
def test_arguments(kwargs, message):
    with pytest.raises(PEFTError, match=message):
        swin('mmdet', dict(type='Adapter', **dict(dict(dim=4), **kwargs)))
