import pytest
import torch

from mmpeft.methods.side import TrunkBlock
from mmpeft.methods.windows import (attention_beside, partition, reverse,
                                    window_mask)
from mmpeft.sites import TokenLayout
from . import reference as ref
from .recorded import tensor
from .side_checks import attention, visible

SIZES = [((8, 8), 4, 0), ((8, 8), 4, 2), ((7, 5), 4, 0), ((7, 5), 4, 2),
         ((4, 4), 4, 2), ((3, 2), 4, 2), ((9, 1), 7, 3)]


@pytest.mark.parametrize('hw,size,shift', SIZES)
def test_windows_are_those_of_the_map(hw, size, shift):
    tokens = tensor('tokens', 2, hw[0] * hw[1], 3)
    windows = partition(tokens, hw, size, shift)
    count = -(-hw[0] // size) * -(-hw[1] // size)
    assert windows.shape == (2, count, size * size, 3)
    assert torch.equal(reverse(windows, hw, size, shift), tokens)


@pytest.mark.parametrize('hw,size,shift', SIZES)
def test_attention(hw, size, shift):
    block = TrunkBlock(0, 0, '', 12, 3, 48, size, shift)
    qkv = tensor('qkv', 2, hw[0] * hw[1], 36).requires_grad_()
    out = attention_beside(qkv, 3, block, TokenLayout(hw))
    expected = attention(*qkv.chunk(3, -1), 3, hw, block)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.grad(out.sum(), qkv)[0].isfinite().all()


def test_attention_without_windows_sees_extra_tokens():
    block = TrunkBlock(0, 0, '', 12, 3, 48)
    qkv = tensor('qkv', 2, 7, 36)
    out = attention_beside(qkv, 3, block, TokenLayout((3, 2), 1))
    expected = attention(*qkv.chunk(3, -1), 3, (7, 1), block)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_no_mask_for_whole_windows():
    assert window_mask((8, 4), 4, 0, torch.device('cpu')) is None


@pytest.mark.parametrize('hw', [(8, 12), (4, 4)])
def test_shifted_windows_are_those_of_swin(hw):
    """The labels of a map that windows divide, as the stock block has them."""
    size, shift = 4, 2
    labels = torch.tensor([[
        3 * ref.region(y, hw[0], size, shift) +
        ref.region(x, hw[1], size, shift) for x in range(hw[1])
    ] for y in range(hw[0])])
    # Labels belong to places after the shift.
    windows = partition(labels.view(1, -1, 1), hw, size)
    stock = (windows == windows.transpose(2, 3)).unsqueeze(2)
    assert torch.equal(window_mask(hw, size, shift, labels.device), stock)
    rows = visible(hw, size, shift).sum(-1)
    assert rows.max() == 16 or hw == (4, 4)
