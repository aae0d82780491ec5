import pytest
import torch
import torch.nn.functional as F

from mmpeft.errors import MergeError, PEFTError
from mmpeft.merging import merged_state_dict
from mmpeft.methods import Mona
from mmpeft.sites import TokenLayout
from . import reference as ref
from .checks import (check_block, check_module, check_released_backbone,
                     check_released_module)
from .recorded import tensor
from .swins import LIBRARIES, site, swin

DTYPES = (torch.float32, torch.float64)


def mona(y, hw, p, prefix='', extra=0):
    """``y + W2 gelu(op(W1 (gamma LN(y) + gammax y)))``, see the paper."""
    get = lambda name: p[prefix + name]  # noqa: E731
    first, y = y[:, :extra], y[:, extra:]
    u = ref.layer_norm(y, get('norm.weight'), get('norm.bias'))
    u = u * get('gamma') + y * get('gammax')
    t = ref.linear(u, get('project1.weight'), get('project1.bias'))
    t = t.reshape(t.shape[0], *hw, -1).permute(0, 3, 1, 2)
    convs = [
        ref.depthwise(t, get(f'adapter_conv.conv{i}.weight'),
                      get(f'adapter_conv.conv{i}.bias')) for i in (1, 2, 3)
    ]
    t = sum(convs) / 3 + t
    weight = get('adapter_conv.projector.weight')
    t = t + F.conv2d(t, weight) + get('adapter_conv.projector.bias')[:, None,
                                                                     None]
    t = ref.gelu(t.permute(0, 2, 3, 1).reshape(y.shape[0], -1, t.shape[1]))
    y = y + ref.linear(t, get('project2.weight'), get('project2.bias'))
    return torch.cat([first, y], 1)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('dims,dim,hw,extra', [
    (12, 4, (3, 5), 0),
    (8, 8, (9, 2), 0),
    (16, 6, (1, 7), 1),
    (10, 3, (4, 6), 5),
])
def test_formula(dims, dim, hw, extra, dtype):
    module = Mona(site('ffn_residual', dims), dim=dim, drop_rate=0.)
    tokens = extra + hw[0] * hw[1]
    check_module(module, lambda x, y, p: mona(y, hw, p, extra=extra),
                 tensor('x', 2, tokens, dims), tensor('y', 2, tokens, dims),
                 TokenLayout(hw, extra), dtype)


@pytest.mark.parametrize('library', LIBRARIES)
@pytest.mark.parametrize('drop_path_rate', [0., 0.5])
@pytest.mark.parametrize('dtype', DTYPES)
def test_after_each_residual_add_outside_drop_path(library, drop_path_rate,
                                                   dtype):
    hw, prefix = (7, 5), 'peft.mona.{}_residual.'

    def block(x, p, attention, mlp, drop):
        x = mona(x + drop(attention(x)), hw, p, prefix.format('attn'))
        return mona(x + drop(mlp(x)), hw, p, prefix.format('ffn'))

    check_block(library, dict(type='Mona', dim=4, drop_rate=0.), block,
                drop_path_rate, dtype)


@pytest.mark.parametrize('dtype', DTYPES)
def test_released_module(dtype):
    module = Mona(site('attn_residual', 64), dim=64, drop_rate=0.)
    check_released_module(
        'released_mona', module,
        lambda m, x: m(torch.zeros_like(x), x, TokenLayout(
            (3, 5))), (2, 15, 64), dtype)


@pytest.mark.parametrize('library,dtype', [
    ('mmdet', torch.float32),
    ('mmdet', torch.float64),
    ('mmseg', torch.float64),
    ('mmpretrain', torch.float64),
])
def test_released_backbone(library, dtype):
    check_released_backbone(
        'released_mona_swin',
        library,
        dict(type='Mona', dim=64, drop_rate=0.),
        dtype,
        embed_dims=64)


def test_init_is_that_of_the_released_code():
    torch.manual_seed(0)
    module = Mona(site('attn_residual', 96), dim=48)
    for _ in range(2):
        assert (module.gamma == 1e-6).all() and (module.gammax == 1).all()
        assert (module.norm.weight == 1).all()
        assert (module.norm.bias == 0).all()
        for linear in (module.project1, module.project2):
            assert linear.weight.std().item() == pytest.approx(.02, rel=.1)
            assert (linear.bias == 0).all()
        bound = 1 / 3
        assert 0.9 * bound < module.adapter_conv.conv1.weight.abs().max() \
            <= bound
        for parameter in module.parameters():
            torch.nn.init.constant_(parameter, 7.)
        module.reset_parameters()


@pytest.mark.parametrize('dims,dim', [(12, 4), (8, 8), (128, 64)])
def test_count(dims, dim):
    module = Mona(site('attn_residual', dims), dim=dim)
    expected = 2 * dims * dim + dim + 5 * dims + 86 * dim + dim**2 + dim
    assert sum(p.numel() for p in module.parameters()) == expected


def test_dropout_acts_on_the_bottleneck_in_training_only():
    module = Mona(site('attn_residual', 8), dim=4, drop_rate=.5)
    x = tensor('x', 1, 6, 8, dtype=torch.float32)
    layout = TokenLayout((2, 3))
    assert not torch.equal(module(x, x, layout), module(x, x, layout))
    module.eval()
    assert torch.equal(module(x, x, layout), module(x, x, layout))


def test_merge_is_refused_with_a_reason():
    backbone = swin('mmdet', dict(type='Mona', dim=4))
    with pytest.raises(MergeError, match='Mona .*non-linearity'):
        merged_state_dict(backbone)


@pytest.mark.parametrize('kwargs,message', [
    (dict(dim=0), 'dim must be a whole number'),
    (dict(dim=2.5), 'dim must be a whole number'),
    (dict(dim=True), 'dim must be a whole number'),
    (dict(dim=17), 'dim=17 is larger than the width 16'),
    (dict(drop_rate=1.), r'drop_rate .*\[0, 1\)'),
    (dict(drop_rate=-.1), r'drop_rate .*\[0, 1\)'),
    (dict(drop_rate=float('nan')), r'drop_rate .*\[0, 1\)'),
    (dict(dims=8), "no argument 'dims'.*did you mean 'dim'"),
])
def test_arguments(kwargs, message):
    with pytest.raises(PEFTError, match=message):
        swin('mmdet', dict(type='Mona', **dict(dict(dim=4), **kwargs)))
