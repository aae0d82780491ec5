"""Windows of a token map, shifted, by one gather each way."""
from functools import lru_cache
from typing import Any, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function

__all__ = ['Windows', 'from_windows', 'plan_windows', 'to_windows']


class Windows(NamedTuple):
    """What is where, for all samples of a batch.

    Attributes:
        rows (Tensor): (B * windows * N, ), the token of each place; any where
            there is none.
        padded (Tensor): The places where there is none.
        places (Tensor): (B * H * W, ), the place of each token.
        mask (Tensor, optional): (windows, N, N), -100 between places that a
            shift brought together, else 0; None without a shift.
        size (int): N.
    """

    rows: Tensor
    padded: Tensor
    places: Tensor
    mask: Optional[Tensor]
    size: int


# Blocks with and without a shift, in four stages.
@lru_cache(maxsize=8)
def plan_windows(batch: int, hw_shape: Tuple[int, int], window: int,
                 shift: int, device: torch.device) -> Windows:
    """Where windows of ``window x window`` find their tokens, in a map that is
    padded below and on the right and then rolled by ``shift``."""
    height, width = hw_shape
    tokens = torch.arange(height * width, device=device).view(1, *hw_shape)
    # A place without a token has the number -1.
    numbers = F.pad(
        tokens, (0, -width % window, 0, -height % window), value=-1)
    numbers = _partition(numbers[0].roll((-shift, -shift), (0, 1)), window)
    samples = torch.arange(batch, device=device)[:, None]
    rows = (numbers.flatten() + samples * height * width).flatten()
    lacks = (numbers < 0).flatten().repeat(batch)
    places = torch.empty(
        batch * height * width, dtype=torch.long, device=device)
    found = (~lacks).nonzero()[:, 0]
    places[rows[found]] = found
    mask = None
    if shift:
        sides = [n + -n % window for n in hw_shape]
        # Three strips each way: whole windows, and both parts of the last.
        strips = [(torch.arange(n, device=device)[:, None]
                   >= torch.tensor([n - window, n - shift],
                                   device=device)).sum(1) for n in sides]
        regions = _partition(3 * strips[0][:, None] + strips[1], window)
        mask = regions[:, None] != regions[:, :, None]
        mask = mask * -100.
    return Windows(
        rows.masked_fill_(lacks, 0),
        lacks.nonzero()[:, 0], places, mask, window**2)


def to_windows(tokens: Tensor, windows: Windows) -> Tensor:
    """(B, H * W, C) -> (B * windows, N, C), zeros where there is no token.

    Each token has one place, so the gradient takes it from there, as
    :func:`from_windows` does, and the other way round: one pass instead of
    one each for padding, rolling, dividing.
    """
    return _Move.apply(tokens, windows, len(tokens), True)


def from_windows(tokens: Tensor, windows: Windows, batch: int) -> Tensor:
    """(B * windows, N, C) -> (B, H * W, C); what was padded is left out."""
    return _Move.apply(tokens, windows, batch, False)


class _Move(Function):

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, windows: Windows, batch: int,
                into: bool) -> Tensor:
        ctx.how = windows, batch, into
        tokens = tokens.flatten(0, 1)
        if not into:
            return tokens.index_select(0, windows.places).unflatten(
                0, (batch, -1))
        tokens = tokens.index_select(0, windows.rows)
        return tokens.index_fill_(0, windows.padded,
                                  0).unflatten(0, (-1, windows.size))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple:
        windows, batch, into = ctx.how
        return _Move.apply(grad, windows, batch, not into), None, None, None


def _partition(grid: Tensor, window: int) -> Tensor:
    """(H, W) -> (windows, N)"""
    height, width = grid.shape
    grid = grid.view(height // window, window, width // window, window)
    return grid.transpose(1, 2).reshape(-1, window**2)
