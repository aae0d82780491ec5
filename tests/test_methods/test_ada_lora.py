import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from mmpeft.errors import PEFTError
from mmpeft.methods import AdaLoRA
from mmpeft.sites import Site
from .checks import check_block, check_module, check_released_module
from .recorded import fill, tensor
from .swins import LIBRARIES, NO_LAYOUT, site, swin, trained
from .test_lora import DTYPES, LAYERS, update
from .test_lora_merge import ALL, check_merge


def svd_update(p, targets, rank, scale, prefix=''):
    """``scale * P E Q``"""
    p = {
        prefix + 'lora_A':
        torch.diag(p[prefix + 'lora_E']) @ p[prefix + 'lora_A'],
        prefix + 'lora_B': p[prefix + 'lora_B']
    }
    return update(p, targets, rank, scale, prefix)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('name,targets', [
    ('qkv', ('q', 'v')),
    ('qkv', ('v', 'q', 'k')),
    ('qkv', ('k', 'proj')),
    ('proj', ('proj', )),
    ('fc1', ('fc1', )),
    ('fc2', ('fc2', )),
])
def test_formula(name, targets, dtype):
    place = site(name, 8)
    module = AdaLoRA(place, rank=3, alpha=6, targets=targets)
    own = [t for t in targets if t in 'qkv'] or targets

    def formula(x, y, p):
        change = svd_update(p, own, 3, 6 / (3 + 1e-5))
        return y + torch.matmul(x, change.t())

    check_module(module, formula, tensor('x', 2, 5, place.in_dims),
                 tensor('y', 2, 5, place.out_dims), NO_LAYOUT, dtype)


@pytest.mark.parametrize('library', LIBRARIES)
def test_inside_the_linear_layers(library):

    def block(x, p, attention, mlp, drop):
        p = dict(p)
        for name, layer in LAYERS.items():
            own = 'qkv' if name == 'qkv' else [name]
            weight = f'{layer}.weight'
            p[weight] = p[weight] + svd_update(p, own, 3, 3 / (3 + 1e-5),
                                               f'peft.ada_lora.{name}.')
        x = x + drop(attention(x, p))
        return x + drop(mlp(x, p))

    check_block(library, dict(type='AdaLoRA', rank=3, targets=ALL), block, .5)


@pytest.mark.parametrize('dtype', DTYPES)
def test_released_module(dtype):

    class Layer(nn.Module):

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(
                torch.empty(10, 12), requires_grad=False)
            self.bias = nn.Parameter(torch.empty(10))
            module = AdaLoRA(
                Site('fc1', 12, 10), rank=4, alpha=6, targets=['fc1'])
            # Under names of its own, as the module is no child.
            self.lora_A, self.lora_B = module.lora_A, module.lora_B
            self.lora_E, self.module = module.lora_E, (module, )

        def forward(self, x):
            return self.module[0](x, F.linear(x, self.weight, self.bias),
                                  NO_LAYOUT)

    check_released_module('released_ada_lora', Layer(), lambda m, x: m(x),
                          (2, 15, 12), dtype)


def test_starts_at_the_identity():
    module = AdaLoRA(site('qkv', 64))
    x = tensor('x', 2, 5, 64, dtype=torch.float32)
    y = tensor('y', 2, 5, 192, dtype=torch.float32)
    assert torch.equal(module(x, y, NO_LAYOUT), y)
    assert (module.lora_E == 0).all()
    for factor in (module.lora_A, module.lora_B):
        assert .017 < factor.std() < .023


def test_gaps_are_the_distance_from_orthogonal():
    module = AdaLoRA(site('qkv', 16), rank=3).double()
    fill(module)
    expected = []
    for q, p in zip(module.lora_A.split(3), module.lora_B.split(16)):
        eye = torch.eye(3).double()
        for product in (q @ q.t() - eye, p.t() @ p - eye):
            expected.append((product * product).sum().sqrt())
    torch.testing.assert_close(
        torch.stack(module.gaps()), torch.stack(expected))
    q = torch.linalg.qr(torch.randn(16, 3).double())[0]
    module.lora_A.data.copy_(torch.cat([q.t(), q.t()]))
    module.lora_B.data.copy_(torch.cat([q, q]))
    gaps = module.gaps()
    assert max(gaps) < 1e-12
    sum(gaps).backward()
    assert torch.isfinite(module.lora_A.grad).all()


def test_triplet_scores():
    """That of the singular value and the means over both its vectors."""
    module = AdaLoRA(site('qkv', 4), rank=2, targets=['q', 'v'])
    scores = {
        n: tensor(n, *p.shape).abs()
        for n, p in module.named_parameters()
    }
    found = module.triplet_scores(scores)
    for target in range(2):
        for i in range(2):
            at = target * 2 + i
            p = scores['lora_B'][target * 4:target * 4 + 4, i]
            expected = (
                scores['lora_E'][at] + p.sum() / 4 +
                scores['lora_A'][at].sum() / 4)
            assert abs(found[at] - expected) < 1e-12


@pytest.mark.parametrize('rank', [3, 8])
def test_count(rank):
    backbone = swin('mmdet', dict(type='AdaLoRA', rank=rank))
    expected = sum(2 * 2 * (2 * rank * d + rank) for d in (16, 32))
    assert sum(p.numel() for p in trained(backbone).values()) == expected


@pytest.mark.parametrize('targets', [('q', 'v'), ALL])
@pytest.mark.parametrize('library,size', [('mmdet', (33, 50)),
                                          ('mmseg', (36, 28)),
                                          ('mmpretrain', (64, 64))])
def test_merge(library, targets, size):
    backbone = swin(library, dict(type='AdaLoRA', rank=3, targets=targets))
    fill(backbone)
    backbone.eval()
    check_merge(library, backbone, size)


@pytest.mark.parametrize('kwargs,message', [
    (dict(rank=17), 'AdaLoRA: rank=17 is larger than the width 16'),
    (dict(alpha=0), 'AdaLoRA: alpha must be'),
    (dict(targets=['w']), 'AdaLoRA: targets=.*at least one of q, k, v'),
    (dict(rslora=True), "AdaLoRA has no argument 'rslora'"),
])
def test_arguments(kwargs, message):
    with pytest.raises(PEFTError, match=message):
        swin('mmdet', dict(type='AdaLoRA', **dict(dict(rank=3), **kwargs)))
