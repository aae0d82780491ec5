import pytest
import torch

from mmpeft.errors import MergeError, PEFTError
from mmpeft.merging import merged_state_dict
from mmpeft.methods import E3VA
from . import reference as ref
from . import side_checks as checks
from .recorded import tensor
from .swins import LIBRARIES, swin, trained

SMALL = dict(type='E3VA', rank=2)
DTYPES = (torch.float32, torch.float64)


def matrix(p, left, kernel, right):
    """``sum_i left_i kernel_i right_i``, (in, out)."""
    return sum(a @ k @ b for a, k, b in zip(p[left], p[kernel], p[right]))


def adapter(x, p, prefix, share=True):
    up_kernel = prefix + ('down_kernel' if share else 'up_kernel')
    w1 = matrix(p, prefix + 'down_left', prefix + 'down_kernel',
                prefix + 'down_right')
    w2 = matrix(p, prefix + 'up_left', up_kernel, prefix + 'up_right')
    hidden = ref.gelu(x @ w1 + p[prefix + 'down_bias'])
    return hidden @ w2 + p[prefix + 'up_bias']


class Formula:
    """``u + adapter1(attention) + adapter2(mlp)``."""

    def __init__(self, share=True):
        self.share = share

    def start(self, x, p):
        return torch.zeros_like(x)

    def step(self, u, place, x, y, taps, hw, p):
        for site in ('attn_branch', 'ffn_branch'):
            u = u + adapter(taps[site], p, f'blocks.{place.index}.{site}.',
                            self.share)
        return u

    def cross(self, u, stage, x, merge, hw, p):
        return merge(x + u) - merge(x)

    def output(self, u, x, stage, p):
        return x + u


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('outputs', [(0, 1), (1, )])
@pytest.mark.parametrize('kwargs', [
    dict(rank=2),
    dict(rank=3, dim=5, num_branches=4, share_kernel=False, with_cp=False),
])
def test_formula(kwargs, outputs, dtype):
    network = E3VA(checks.trunk(outputs=outputs), **kwargs)
    checks.check_network(network, Formula(kwargs.get('share_kernel', True)),
                         dtype)


@pytest.mark.parametrize('library,dtype', [
    ('mmdet', torch.float32),
    ('mmdet', torch.float64),
    ('mmseg', torch.float64),
    ('mmpretrain', torch.float64),
])
def test_whole_backbone(library, dtype):
    checks.check_backbone(library, SMALL, Formula(), dtype)


@pytest.mark.parametrize('library', LIBRARIES)
def test_starts_at_the_frozen_model(library):
    checks.check_starts_frozen(library, SMALL)


def test_well_conditioned_at_the_start():
    """Alone, the norm of the patch merging would amplify a small stream by
    300: its derivative at 0 is that of a division by sqrt(eps)."""
    merge = checks.merging((2, 2))
    x = tensor('x', 1, 4, 16)
    slopes = [
        torch.autograd.functional.jacobian(function, torch.zeros_like(x))
        for function in (lambda u: merge(x + u) - merge(x), merge)
    ]
    joined, alone = (s.reshape(32, 64).norm().item() for s in slopes)
    assert alone > 100 * joined


def test_what_a_block_keeps_would_be_seen():
    with pytest.raises(AssertionError, match='a block keeps'):
        checks.check_backbone_keeps_nothing(dict(type='LoRA', rank=2))


def test_backbone_keeps_nothing():
    assert checks.check_backbone_keeps_nothing(SMALL) > 0
    assert checks.share_of_full(SMALL) < .14
    assert checks.share_of_full(SMALL, 'fast') < .22


def test_recomputing():
    checks.check_recomputing(SMALL)


def test_all_tensors_move():
    checks.check_all_tensors_move(SMALL)


def test_deepcopy():
    checks.check_deepcopy(SMALL)


@pytest.mark.parametrize('kwargs', [
    dict(rank=2),
    dict(rank=3, dim=8, num_branches=4, share_kernel=False),
])
def test_count(kwargs):
    backbone = swin('mmdet', dict(type='E3VA', **kwargs))
    a, r = kwargs.get('num_branches', 2), kwargs['rank']
    kernels = 1 if kwargs.get('share_kernel', True) else 2
    expected = 0
    for d in (16, 32):
        m = kwargs.get('dim', d // 2)
        one = 2 * a * r * (d + m) + kernels * a * r**2 + d + m
        # Two blocks of two adapters; the norm of the output.
        expected += 2 * 2 * one + 2 * d
    assert sum(p.numel() for p in trained(backbone).values()) == expected


def test_published_count():
    total = sum(n * 2 * (2 * 2 * 8 * 3 * d // 2 + 2 * 64 + 3 * d // 2)
                for n, d in zip((2, 2, 18, 2), (128, 256, 512, 1024)))
    assert total + 2 * (128 + 256 + 512 + 1024) == 1_201_152


def test_layers():
    backbone = swin('mmdet', dict(SMALL, layers='stage:1'))
    names = list(trained(backbone))
    assert names and all(
        n.startswith(('norm1.', 'peft.e3va.blocks.2.', 'peft.e3va.blocks.3.'))
        for n in names)
    checks.gradients(backbone)


def test_merge_is_refused_with_a_reason():
    with pytest.raises(MergeError, match='E3VA .*beside the backbone'):
        merged_state_dict(swin('mmdet', SMALL))


@pytest.mark.parametrize('kwargs,message', [
    (dict(rank=9), 'E3VA: rank=9 is larger than the width 8'),
    (dict(dim=17), 'E3VA: dim=17 is larger than the width 16'),
    (dict(num_branches=0), 'num_branches must be a whole number'),
    (dict(scale=1.), "no argument 'scale'"),
])
def test_arguments(kwargs, message):
    with pytest.raises(PEFTError, match=message):
        swin('mmdet', dict(SMALL, **kwargs))
