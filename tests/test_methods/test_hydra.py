import math

import pytest
import torch
import torch.nn as nn

from mmpeft.errors import PEFTError
from mmpeft.methods import Hydra
from mmpeft.sites import Site
from . import reference as ref
from .checks import check_block, check_module, check_released_module
from .recorded import fill, tensor
from .swins import LIBRARIES, NO_LAYOUT, site, swin, trained
from .test_lora_merge import check_merge

DTYPES = (torch.float32, torch.float64)
LAYERS = dict(proj='attn.w_msa.proj', fc2='ffn.layers.1')


def low_rank(x, p, prefix):
    """``up(down(x))`` with both offsets."""
    for part in ('down', 'up'):
        name = f'{prefix}_{part}'
        x = ref.linear(x, p[f'{name}.weight'], p[f'{name}.bias'])
    return x


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('name,dims,rank,shape,scale', [
    ('proj', 12, 2, (2, 15), 1.),
    ('fc2', 8, 3, (3, 1), .1),
    ('fc2', 10, 10, (1, 7), 4.5),
])
def test_formula(name, dims, rank, shape, scale, dtype):
    place = site(name, dims)
    module = Hydra(place, rank=rank, scale=scale, drop_rate=0.)

    def formula(x, y, p):
        return y + scale * low_rank(x, p, 'parallel') + scale * low_rank(
            y, p, 'sequential')

    check_module(module, formula, tensor('x', *shape, place.in_dims),
                 tensor('y', *shape, place.out_dims), NO_LAYOUT, dtype)


@pytest.mark.parametrize('library', LIBRARIES)
def test_inside_the_block_is_another_weight(library):
    """W + s (P + Q W), written out."""

    def block(x, p, attention, mlp, drop):
        p = dict(p)
        for name, layer in LAYERS.items():
            weight, bias = p[f'{layer}.weight'], p[f'{layer}.bias']
            prefix = f'peft.hydra.{name}.'
            own = {
                n[len(prefix):]: t
                for n, t in p.items() if n.startswith(prefix)
            }
            zero = torch.zeros(1, weight.shape[1]).to(weight)
            # Columns of the update are what unit vectors give.
            unit = torch.eye(weight.shape[1]).to(weight)

            def layer_of(x):
                y = ref.linear(x, weight, bias)
                return y + .5 * (
                    low_rank(x, own, 'parallel') +
                    low_rank(y, own, 'sequential'))

            p[f'{layer}.bias'] = layer_of(zero)[0]
            p[f'{layer}.weight'] = (layer_of(unit) - layer_of(zero)).t()
        x = x + drop(attention(x, p))
        return x + drop(mlp(x, p))

    check_block(library, dict(type='Hydra', scale=.5, drop_rate=0.), block, .5)


@pytest.mark.parametrize('dtype', DTYPES)
def test_released_module(dtype):
    layer = nn.Module()
    layer.layer = nn.Linear(32, 16).requires_grad_(False)
    layer.hydra = Hydra(Site('fc2', 32, 16), scale=.5, drop_rate=0.)
    check_released_module('released_hydra', layer,
                          lambda m, x: m.hydra(x, m.layer(x), NO_LAYOUT),
                          (2, 15, 32), dtype)


def test_starts_at_the_identity():
    module = Hydra(site('fc2', 16), rank=4)
    x = tensor('x', 2, 5, 64, dtype=torch.float32)
    y = tensor('y', 2, 5, 16, dtype=torch.float32)
    assert torch.equal(module(x, y, NO_LAYOUT), y)
    bound = math.sqrt(6 / (64 + 4))
    assert .9 * bound < module.parallel_down.weight.abs().max() <= bound
    bound = math.sqrt(6 / (16 + 4))
    assert .8 * bound < module.sequential_down.weight.abs().max() <= bound


def test_count():
    backbone = swin('mmdet', dict(type='Hydra', rank=3))
    expected = sum(2 * (11 * d * 3 + 4 * 3 + 4 * d) for d in (16, 32))
    assert sum(p.numel() for p in trained(backbone).values()) == expected


@pytest.mark.parametrize('library', LIBRARIES)
def test_merge(library):
    backbone = swin(library, dict(type='Hydra', rank=3, scale=.25))
    fill(backbone)
    backbone.eval()
    for size in [(36, 28), (33, 50)]:
        check_merge(library, backbone, size)


def test_merge_after_another_update():
    """What is behind a layer sees what others did to it, in order."""
    for second in (dict(type='LoRA', rank=3, targets=['proj', 'fc2']), 'SSF'):
        first = dict(type='Hydra', scale=.25)
        for methods in ([first, second], [second, first]):
            backbone = swin('mmdet', methods)
            fill(backbone)
            for name, parameter in backbone.named_parameters():
                if name.endswith('lora_B'):
                    parameter.data.mul_(.25)
            backbone.eval()
            check_merge('mmdet', backbone)


def test_merge_without_a_bias():
    module = Hydra(site('proj', 8), scale=.5)
    fill(module.double().eval())
    weight, x = tensor('weight', 8, 8), tensor('x', 5, 8)
    merged, bias = module.merge(weight, None)
    out = module(x, x @ weight.t(), NO_LAYOUT)
    assert torch.allclose(out, x @ merged.t() + bias, atol=1e-12)


def test_dropout_acts_in_training_only():
    module = Hydra(site('proj', 8), rank=4, drop_rate=.5)
    fill(module)
    x, y = (tensor(n, 2, 3, 8, dtype=torch.float32) for n in 'xy')
    assert not torch.equal(module(x, y, NO_LAYOUT), module(x, y, NO_LAYOUT))
    module.eval()
    assert torch.equal(module(x, y, NO_LAYOUT), module(x, y, NO_LAYOUT))


@pytest.mark.parametrize('kwargs,message', [
    (dict(rank=0), 'rank must be a whole number'),
    (dict(rank=17), 'rank=17 is larger than the width 16'),
    (dict(scale=-1), 'scale must be'),
    (dict(drop_rate=1), r'drop_rate .*\[0, 1\)'),
    (dict(dim=2), "no argument 'dim'"),
])
def test_arguments(kwargs, message):
    with pytest.raises(PEFTError, match=message):
        swin('mmdet', dict(type='Hydra', **kwargs))
