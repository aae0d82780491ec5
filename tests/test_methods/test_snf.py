import pytest
import torch

from mmpeft.errors import MergeError, PEFTError
from mmpeft.merging import merged_state_dict
from mmpeft.methods import SNF
from .checks import check_block, check_module, check_released_module
from .recorded import tensor
from .swins import LIBRARIES, NO_LAYOUT, site, swin, trained

DTYPES = (torch.float32, torch.float64)


def flow(x, p, prefix=''):
    """An affine map, then planar ones."""
    z = p[prefix + 'mu'] + torch.exp(p[prefix + 'sigma']) * x
    w, u, b = (p[prefix + n] for n in 'wub')
    for k in range(len(b)):
        z = z + u[k] * torch.tanh((z * w[k]).sum(-1, keepdim=True) + b[k])
    return z


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('dims,num_flows,shape', [
    (12, 5, (2, 15)),
    (8, 1, (3, 1)),
    (10, 16, (1, 7)),
])
def test_formula(dims, num_flows, shape, dtype):
    module = SNF(site('attn_shortcut', dims), num_flows=num_flows)
    check_module(module, lambda x, y, p: flow(y, p), tensor('x', *shape, dims),
                 tensor('y', *shape, dims), NO_LAYOUT, dtype)


@pytest.mark.parametrize('library', LIBRARIES)
@pytest.mark.parametrize('drop_path_rate', [0., 0.5])
def test_in_the_place_of_the_shortcuts(library, drop_path_rate):

    def block(x, p, attention, mlp, drop):
        # The branches read the stream as it was.
        x = flow(x, p, 'peft.snf.attn_shortcut.') + drop(attention(x))
        return flow(x, p, 'peft.snf.ffn_shortcut.') + drop(mlp(x))

    check_block(library, dict(type='SNF', num_flows=3), block, drop_path_rate)


@pytest.mark.parametrize('dtype', DTYPES)
def test_released_module(dtype):
    check_released_module('released_snf', SNF(site('attn_shortcut', 32)),
                          lambda m, x: m(x, x, NO_LAYOUT), (2, 15, 32), dtype)


def test_starts_near_the_identity():
    module = SNF(site('attn_shortcut', 400))
    for tensor_ in (module.mu, module.sigma):
        assert (tensor_ == 0).all()
    for tensor_ in (module.u, module.w):
        assert .0095 < tensor_.abs().max() <= .01
    assert 0 < module.b.abs().max() <= .01
    y = tensor('y', 2, 5, 400, dtype=torch.float32)
    change = (module(y, y, NO_LAYOUT) - y).abs().max()
    assert 0 < change < .05


@pytest.mark.parametrize('num_flows', [1, 5])
def test_count(num_flows):
    backbone = swin('mmdet', dict(type='SNF', num_flows=num_flows))
    expected = sum(4 * (2 * d + num_flows * (2 * d + 1)) for d in (16, 32))
    assert sum(p.numel() for p in trained(backbone).values()) == expected


def test_merge_is_refused_with_a_reason():
    with pytest.raises(MergeError, match='SNF .*non-linearity'):
        merged_state_dict(swin('mmdet', 'SNF'))


@pytest.mark.parametrize('kwargs,message', [
    (dict(num_flows=0), 'num_flows must be a whole number'),
    (dict(num_flows=2.), 'num_flows must be a whole number'),
    (dict(flow_length=16), "no argument 'flow_length'"),
])
def test_arguments(kwargs, message):
    with pytest.raises(PEFTError, match=message):
        swin('mmdet', dict(type='SNF', **kwargs))
