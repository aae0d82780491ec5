import pytest
import torch
import torch.nn as nn

from mmpeft.errors import PEFTError
from mmpeft.methods import Rein
from mmpeft.sites import Site, TokenLayout
from . import reference as ref
from .checks import check_module, check_released_module
from .recorded import tensor
from .swins import LIBRARIES, NO_LAYOUT, swin, trained

DTYPES = (torch.float32, torch.float64)
CLASS_TOKEN = TokenLayout((2, 7), num_extra_tokens=1)


class Blocks(nn.Module):
    """Modules of a few blocks one behind the other, and what they share."""

    def __init__(self, dims, depth=1, **kwargs):
        super().__init__()
        places = [Site('ffn_residual', dims, dims)] * depth
        self.shared = Rein.build_shared(places, **kwargs)
        self.blocks = nn.ModuleList(Rein(p, **kwargs) for p in places)
        for block in self.blocks:
            block.bind_shared(self.shared)

    def forward(self, x, y, layout=NO_LAYOUT):
        for block in self.blocks:
            y = block(x, y, layout)
        return y


def refined(y, p, prefix='blocks.0.', shared='shared.stage0.'):
    """Token by token of what is learned."""
    if prefix + 'tokens' in p:
        tokens = p[prefix + 'tokens']
    else:
        tokens = torch.matmul(p[prefix + 'tokens_a'], p[prefix + 'tokens_b'])
    scores = torch.stack([(y * t).sum(-1) for t in tokens], dim=-1)
    weights = torch.exp(scores / y.shape[-1]**.5)
    weights = weights / weights.sum(-1, keepdim=True)
    total = y
    for number, token in enumerate(tokens[1:], start=1):
        feature = ref.linear(token, p[shared + 'token_to_feature.weight'],
                             p[shared + 'token_to_feature.bias'])
        total = total + weights[..., number, None] * feature
    total = ref.linear(total, p[shared + 'delta.weight'],
                       p[shared + 'delta.bias'])
    return y + p[shared + 'scale'] * total


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('extra', [0, 1])
@pytest.mark.parametrize('num_tokens,rank', [(5, 4), (2, 1), (6, None)])
def test_formula(num_tokens, rank, extra, dtype):

    def formula(x, y, p):
        return torch.cat([y[:, :extra], refined(y[:, extra:], p)], dim=1)

    layout = TokenLayout((2, 7), num_extra_tokens=extra)
    check_module(
        Blocks(12, num_tokens=num_tokens, rank=rank), formula,
        tensor('x', 2, 14 + extra, 12), tensor('y', 2, 14 + extra, 12), layout,
        dtype)


@pytest.mark.parametrize('dtype', DTYPES)
def test_released_module(dtype):
    """Three blocks that share their layers, with a class token."""
    check_released_module('released_rein',
                          Blocks(24, depth=3, num_tokens=10, rank=4),
                          lambda m, x: m(torch.zeros_like(x), x, CLASS_TOKEN),
                          (2, 15, 24), dtype)


@pytest.mark.parametrize('library', LIBRARIES)
def test_in_a_pyramid(library):
    """Each stage has layers of its own, and one start for all."""
    backbone = swin(library, dict(type='Rein', num_tokens=5, rank=2))
    shared = backbone.peft.rein
    assert list(shared) == ['stage0', 'stage1']
    for stage, dims in zip(shared.values(), (16, 32)):
        assert stage.delta.weight.shape == (dims, dims)
        assert stage.scale.item() == pytest.approx(.001)
    block = backbone.stages[0].blocks[0].peft.rein
    assert block['ffn_residual'].shared is shared
    # Tokens, two linear layers and a number; two blocks for each stage.
    expected = sum(2 * (5 * 2 + 2 * d) + 2 * (d * d + d) + 1 for d in (16, 32))
    assert sum(p.numel() for p in trained(backbone).values()) == expected


def test_start():
    torch.manual_seed(0)
    place = Site('ffn_residual', 96, 96, patch_size=16)
    module = Rein(place, rank=24)
    bound = (6 / (3 * 16**2 + 48))**.5
    for tokens in (module.tokens_a, module.tokens_b):
        assert .95 * bound < tokens.abs().max() <= bound
    whole = Rein(place, rank=None)
    assert whole.tokens.shape == (100, 96)
    bound = (6 / (3 * 16**2 + 96))**.5
    assert .95 * bound < whole.tokens.abs().max() <= bound


def test_the_first_token_takes_attention_up():
    module = Blocks(12, num_tokens=3, rank=None)
    y = torch.ones(1, 4, 12)
    with torch.no_grad():
        shared = module.shared['stage0']
        shared.delta.weight.copy_(torch.eye(12))
        shared.delta.bias.zero_()
        shared.scale.fill_(1)
        tokens = module.blocks[0].tokens
        tokens.zero_()
        tokens[0] = 100
        torch.testing.assert_close(module(y, y), 2 * y)
        tokens[0] = 0
        assert (module(y, y) - 2 * y).abs().max() > .1


@pytest.mark.parametrize('arguments,says', [
    (dict(num_tokens=1), 'at least 2'),
    (dict(num_tokens=0), 'num_tokens must be a whole number'),
    (dict(rank=13), 'rank=13 is larger than the width 12'),
    (dict(rank=0), 'rank must be a whole number'),
    (dict(scale_init=0.), 'scale_init must be a number above 0'),
])
def test_mistakes(arguments, says):
    with pytest.raises(PEFTError, match=says):
        Blocks(12, **arguments)


def test_class_and_register_tokens_pass_by():
    module = Blocks(12, num_tokens=3, rank=2)
    y = tensor('y', 2, 16, 12, dtype=torch.float32)
    out = module(y, y, TokenLayout((2, 7), num_extra_tokens=2))
    assert torch.equal(out[:, :2], y[:, :2])
    assert not torch.equal(out[:, 2:], y[:, 2:])
