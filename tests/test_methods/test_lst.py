import pytest
import torch

from mmpeft.errors import MergeError, PEFTError
from mmpeft.merging import merged_state_dict
from mmpeft.methods import LST
from . import reference as ref
from . import side_checks as checks
from .swins import LIBRARIES, swin, trained

# A norm over very few channels would be ill-conditioned.
SMALL = dict(type='LST', reduction=2)
DTYPES = (torch.float32, torch.float64)


def linear(x, p, prefix):
    return ref.linear(x, p[prefix + 'weight'], p.get(prefix + 'bias'))


def norm(x, p, prefix):
    return ref.layer_norm(x, p[prefix + 'weight'], p[prefix + 'bias'])


class Formula:
    """A gate, attention and an MLP for each block."""

    def __init__(self, temperature=.1, residual=True, heads=(2, 4)):
        self.temperature = temperature
        self.residual = residual
        self.heads = heads

    def start(self, x, p):
        return linear(x, p, 'down.')

    def step(self, u, place, x, y, taps, hw, p):
        at = f'blocks.{place.index}.'
        gate = 1 / (1 + torch.exp(-p[at + 'gate'] / self.temperature))
        t = gate * u + (1 - gate) * linear(y, p, at + 'down.')
        qkv = linear(norm(t, p, at + 'norm1.'), p, at + 'qkv.')
        seen = checks.attention(*qkv.chunk(3, -1), self.heads[place.stage], hw,
                                place)
        t = t + linear(seen, p, at + 'proj.')
        hidden = linear(norm(t, p, at + 'norm2.'), p, at + 'fc1.')
        return t + linear(ref.gelu(hidden), p, at + 'fc2.')

    def cross(self, u, stage, x, merge, hw, p):
        at = f'mergings.{stage}.'
        return linear(
            norm(checks.unfold(u, hw), p, at + 'norm.'), p, at + 'reduction.')

    def output(self, u, x, stage, p):
        out = linear(u, p, f'ups.{stage}.')
        return x + out if self.residual else out


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(
    'kwargs,window,outputs,heads',
    [
        (dict(reduction=2), 4, (0, 1), (2, 4)),
        (dict(reduction=2, temperature=.5, with_cp=False), 4, (1, ), (2, 4)),
        # Widths 5 and 10.
        (dict(reduction=3, temperature=2., residual=False), None, (0, 1),
         (1, 2)),
    ])
def test_formula(kwargs, window, outputs, heads, dtype):
    network = LST(checks.trunk(window, outputs), **kwargs)
    formula = Formula(
        kwargs.get('temperature', .1), kwargs.get('residual', True), heads)
    checks.check_network(network, formula, dtype)


@pytest.mark.parametrize('library,dtype', [
    ('mmdet', torch.float32),
    ('mmdet', torch.float64),
    ('mmseg', torch.float64),
    ('mmpretrain', torch.float64),
])
def test_whole_backbone(library, dtype):
    checks.check_backbone(library, SMALL, Formula(), dtype)


def test_whole_backbone_without_residual():
    checks.check_backbone('mmdet', dict(SMALL, residual=False),
                          Formula(residual=False))


@pytest.mark.parametrize('library', LIBRARIES)
def test_starts_at_the_frozen_model(library):
    checks.check_starts_frozen(library, SMALL)


def test_starts_elsewhere_without_residual():
    backbone = swin('mmdet', dict(SMALL, residual=False))
    for name, up in backbone.peft.lst.ups.items():
        assert up.weight.abs().max() > 0, name


def test_gates_start_half_open():
    for block in LST(checks.trunk()).blocks.values():
        assert torch.sigmoid(block.gate / .1) == .5


def test_backbone_keeps_nothing():
    assert checks.check_backbone_keeps_nothing(SMALL) > 0
    assert checks.share_of_full(dict(type='LST')) < .12
    # torch 2.1 has no fused attention on a CPU, and keeps the weights.
    fused = not torch.__version__.startswith('2.1.')
    limit = .25 if fused else .35
    assert checks.share_of_full(dict(type='LST'), 'fast') < limit


def test_recomputing():
    checks.check_recomputing(SMALL)


def test_all_tensors_move():
    checks.check_all_tensors_move(SMALL)


def test_deepcopy():
    checks.check_deepcopy(SMALL)


def test_count():
    backbone = swin('mmdet', SMALL)
    expected = 16 * 8 + 8 + 8 * 8**2 + 8 * 8
    for d, w in ((16, 8), (32, 16)):
        block = 12 * w**2 + 13 * w + d * w + w + 1
        expected += 2 * block + w * d + d
    assert sum(p.numel() for p in trained(backbone).values()) == expected


def test_layers():
    backbone = swin('mmdet', dict(SMALL, layers='stage:1'))
    assert not len(backbone.peft.lst.mergings)
    checks.gradients(backbone)


def test_merge_is_refused_with_a_reason():
    with pytest.raises(MergeError, match='LST .*beside the backbone'):
        merged_state_dict(swin('mmdet', SMALL))


@pytest.mark.parametrize('kwargs,message', [
    (dict(reduction=17), 'LST: reduction=17 is larger than the width 16'),
    (dict(reduction=1.5), 'reduction must be a whole number'),
    (dict(temperature=0), 'temperature must be a number above 0'),
    (dict(rank=4), "no argument 'rank'"),
])
def test_arguments(kwargs, message):
    with pytest.raises(PEFTError, match=message):
        swin('mmdet', dict(SMALL, **kwargs))
