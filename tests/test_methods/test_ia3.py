import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from mmpeft.errors import PEFTError
from mmpeft.methods import IA3
from mmpeft.sites import INPUT_SITES, Site
from . import reference
from .checks import check_block, check_module, check_released_module
from .recorded import fill, tensor
from .swins import LIBRARIES, NO_LAYOUT, site, swin, trained
from .test_lora import DTYPES, LAYERS
from .test_lora_merge import check_merge

EVERYTHING = ('q', 'k', 'v', 'proj', 'fc1', 'fc2', *INPUT_SITES)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('targets', [('k', 'v'), ('v', ), ('q', 'k', 'v')])
def test_formula_in_qkv(targets, dtype):
    module = IA3(site('qkv', 8), targets)

    def formula(x, y, p):
        rows = iter(p['gamma'].split(8))
        return torch.cat([
            y[..., i * 8:i * 8 + 8] * (next(rows) if part in targets else 1.)
            for i, part in enumerate('qkv')
        ], -1)

    check_unused_x(module, formula, 8, 24, dtype)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('place', [
    Site('fc2_input', 32, 32),
    Site('fc1', 8, 32),
    Site('proj', 8, 8),
])
def test_formula(place, dtype):
    check_unused_x(
        IA3(place, [place.name]), lambda x, y, p: y * p['gamma'],
        place.in_dims, place.out_dims, dtype)


def check_unused_x(module, formula, in_dims, out_dims, dtype):
    check_module(module, formula, tensor('x', 2, 5, in_dims),
                 tensor('y', 2, 5, out_dims), NO_LAYOUT, dtype)


@pytest.mark.parametrize('library', LIBRARIES)
@pytest.mark.parametrize('targets', [('k', 'v', 'fc2_input'), EVERYTHING])
def test_on_the_weights(library, targets):
    """Outputs scale rows and bias, inputs scale columns."""

    def block(x, p, attention, mlp, drop):
        p = dict(p)
        for name, layer in LAYERS.items():
            weight, bias = f'{layer}.weight', f'{layer}.bias'
            if f'{name}_input' in targets:
                gamma = p[f'peft.ia3.{name}_input.gamma']
                p[weight] = p[weight] * gamma
            if f'peft.ia3.{name}.gamma' in p:
                gamma = p[f'peft.ia3.{name}.gamma']
                if name == 'qkv' and 'q' not in targets:
                    gamma = torch.cat([torch.ones(16).to(gamma), gamma])
                p[weight] = p[weight] * gamma[:, None]
                p[bias] = p[bias] * gamma
        x = x + drop(attention(x, p))
        return x + drop(mlp(x, p))

    check_block(library, dict(type='IA3', targets=targets), block, .5)


def test_the_paper_on_plain_tensors():
    """(l_k K), (l_v V) and W2 (l_ff gelu(W1 x))."""
    backbone = swin('mmdet', 'IA3', depths=(1, ), num_heads=(2, ))
    block = backbone.stages[0].blocks[0]
    fill(block)
    p = reference.parameters(block, torch.float32)
    x = tensor('x', 1, 16, 16, dtype=torch.float32)
    hidden = reference.gelu(
        F.linear(x, p['ffn.layers.0.0.weight'], p['ffn.layers.0.0.bias']))
    expected = F.linear(hidden * p['peft.ia3.fc2_input.gamma'],
                        p['ffn.layers.1.weight'], p['ffn.layers.1.bias'])
    torch.testing.assert_close(block.ffn.layers(x), expected)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('kind', ['output', 'input'])
def test_released_module(kind, dtype):

    class Layer(nn.Module):

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(
                torch.empty(10, 12), requires_grad=False)
            self.bias = nn.Parameter(torch.empty(10))
            place = Site('fc2', 12, 10) if kind == 'output' else Site(
                'fc2_input', 12, 12)
            module = IA3(place, [place.name])
            self.gamma, self.module = module.gamma, (module, )

        def forward(self, x):
            if kind == 'input':
                x = self.module[0](x, x, NO_LAYOUT)
            y = F.linear(x, self.weight, self.bias)
            return y if kind == 'input' else self.module[0](x, y, NO_LAYOUT)

    check_released_module(f'released_ia3_{kind}', Layer(), lambda m, x: m(x),
                          (2, 15, 12), dtype)


def test_starts_at_the_identity():
    module = IA3(site('qkv', 16))
    x, y = tensor('x', 2, 5, 16), tensor('y', 2, 5, 48)
    assert torch.equal(module(x, y, NO_LAYOUT), y)


def test_keeps_half_precision():
    module = IA3(site('qkv', 16))
    y = tensor('y', 2, 5, 48, dtype=torch.float32).bfloat16()
    assert module(y, y, NO_LAYOUT).dtype == torch.bfloat16


def test_count():
    backbone = swin('mmdet', 'IA3')
    assert sum(p.numel()
               for p in trained(backbone).values()) == sum(2 * 6 * d
                                                           for d in (16, 32))


@pytest.mark.parametrize('targets', [('k', 'v', 'fc2_input'), EVERYTHING])
@pytest.mark.parametrize('library,size', [('mmdet', (33, 50)),
                                          ('mmseg', (36, 28)),
                                          ('mmpretrain', (64, 64))])
def test_merge(library, targets, size):
    backbone = swin(library, dict(type='IA3', targets=targets))
    fill(backbone)
    backbone.eval()
    check_merge(library, backbone, size)


@pytest.mark.parametrize('kwargs,message', [
    (dict(targets=['ffn']), "IA3: targets=.*'ffn'.*fc2_input"),
    (dict(targets='k'), 'must be a list'),
    (dict(rank=8), "IA3 has no argument 'rank'"),
])
def test_arguments(kwargs, message):
    with pytest.raises(PEFTError, match=message):
        swin('mmdet', dict(type='IA3', **kwargs))
