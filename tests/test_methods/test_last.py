import pytest
import torch

from mmpeft.errors import MergeError, PEFTError
from mmpeft.merging import merged_state_dict
from mmpeft.methods import LAST
from . import side_checks as checks
from .recorded import tensor
from .swins import LIBRARIES, swin, trained

SMALL = dict(type='LAST', rank=4)
DTYPES = (torch.float32, torch.float64)


class Formula:
    """``u + LSA(y + u)``."""

    def start(self, x, p):
        return torch.zeros_like(x)

    def step(self, u, place, x, y, taps, hw, p):
        v = y + u
        mean = v.mean(-1, keepdim=True)
        variance = ((v - mean)**2).mean(-1, keepdim=True)
        v = (v - mean) / torch.sqrt(variance + 1e-5)
        qkv = p[f'blocks.{place.index}.qkv']
        rank = qkv.shape[0] // 3
        q, k, v = (v @ qkv[i * rank:i * rank + rank].t() for i in range(3))
        seen = checks.attention(q, k, v, 1, hw, place)
        return u + seen @ p[f'blocks.{place.index}.out'].t()

    def cross(self, u, stage, x, merge, hw, p):
        return merge(x + u) - merge(x)

    def output(self, u, x, stage, p):
        return x + u


class Card(Formula):
    """As in the paper: all outputs are summed, and taken away at the end.

    ``z`` is what a block adds, and the first one what enters the stage.
    """

    def start(self, x, p):
        return x, x

    def step(self, u, place, x, y, taps, hw, p):
        u, z = u
        zs = z + (y - x)
        v = u + (y - x)
        # Above, v - y is the stream, and y + u is v.
        return y + super().step(v - y, place, x, y, taps, hw, p), zs

    def output(self, u, x, stage, p):
        return x + u[0] - u[1]


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('window', [4, None])
@pytest.mark.parametrize(
    'kwargs', [dict(rank=3), dict(rank=16, with_cp=False)])
def test_formula(kwargs, window, dtype):
    network = LAST(checks.trunk(window=window), **kwargs)
    checks.check_network(network, Formula(), dtype)


def test_stream_is_the_papers_less_the_outputs():
    """In one stage, where the paper's form is defined."""
    checks.check_backbone(
        'mmdet', SMALL, Card(), depths=(3, ), num_heads=(2, ))
    checks.check_backbone(
        'mmdet', SMALL, Formula(), depths=(3, ), num_heads=(2, ))


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


def test_large_streams_do_not_saturate_the_softmax():
    torch.manual_seed(0)
    module = LAST(checks.trunk()).blocks['0']
    x = tensor('x', 2, 35, 16, dtype=torch.float32)
    block = checks.trunk().blocks[0]
    torch.nn.init.normal_(module.out)
    layout = checks.TokenLayout((7, 5))
    torch.testing.assert_close(
        module(x, block, layout),
        module(1000 * x, block, layout),
        rtol=1e-3,
        atol=1e-4)


def test_backbone_keeps_nothing():
    assert checks.check_backbone_keeps_nothing(SMALL) > 0
    assert checks.share_of_full(SMALL) < .1
    assert checks.share_of_full(SMALL, 'fast') < .2


def test_recomputing():
    checks.check_recomputing(SMALL)


def test_all_tensors_move():
    checks.check_all_tensors_move(SMALL)


def test_deepcopy():
    checks.check_deepcopy(SMALL)


def test_count():
    backbone = swin('mmdet', SMALL)
    expected = sum(2 * 4 * 4 * d for d in (16, 32))
    assert sum(p.numel() for p in trained(backbone).values()) == expected


def test_merge_is_refused_with_a_reason():
    with pytest.raises(MergeError, match='LAST .*beside the backbone'):
        merged_state_dict(swin('mmdet', SMALL))


@pytest.mark.parametrize('kwargs,message', [
    (dict(rank=17), 'LAST: rank=17 is larger than the width 16'),
    (dict(rank=0), 'rank must be a whole number'),
    (dict(dim=4), "no argument 'dim'"),
])
def test_arguments(kwargs, message):
    with pytest.raises(PEFTError, match=message):
        swin('mmdet', dict(SMALL, **kwargs))
