"""Attention in the windows of a map, for networks beside the backbone."""
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sites import TokenLayout
from .side import TrunkBlock

__all__ = ['attention_beside', 'partition', 'reverse', 'window_mask']


def attention_beside(qkv: Tensor, num_heads: int, block: TrunkBlock,
                     layout: TokenLayout) -> Tensor:
    """Attention among the tokens that see each other in a block.

    The windows and their shift are the block's. Unlike in Swin, tokens that
    only fill up the last windows are not seen.

    Args:
        qkv (Tensor): (B, N, 3 C); in windows, N is the map alone.
        num_heads (int): Heads; divides C.
        block (TrunkBlock): The block that it runs beside.
        layout (TokenLayout): How the tokens are arranged.

    Returns:
        Tensor: (B, N, C).
    """
    size, shift = block.window_size, block.shift_size
    if size is None:
        return _attention(qkv.unsqueeze(1), num_heads).squeeze(1)
    hw = layout.hw_shape
    mask = window_mask(hw, size, shift, qkv.device)
    out = _attention(partition(qkv, hw, size, shift), num_heads, mask)
    return reverse(out, hw, size, shift)


def _attention(qkv: Tensor,
               num_heads: int,
               mask: Optional[Tensor] = None) -> Tensor:
    """(B, windows, N, 3 C) -> (B, windows, N, C)"""
    # (3, B, windows, heads, N, C / heads)
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
    scores = q * q.shape[-1]**-.5 @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(2, 3).flatten(3)


def partition(tokens: Tensor,
              hw_shape: Tuple[int, int],
              size: int,
              shift: int = 0) -> Tensor:
    """Cut a map into windows, filled up with zeros at the right and bottom.

    (B, H * W, C) -> (B, windows, size * size, C)
    """
    height, width = hw_shape
    grid = tokens.unflatten(1, (height, width))
    grid = F.pad(grid, (0, 0, 0, -width % size, 0, -height % size))
    if shift:
        grid = grid.roll((-shift, -shift), (1, 2))
    # (B, rows, size, columns, size, C)
    grid = grid.unflatten(2, (-1, size)).unflatten(1, (-1, size))
    return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def reverse(windows: Tensor,
            hw_shape: Tuple[int, int],
            size: int,
            shift: int = 0) -> Tensor:
    """Undo :func:`partition`.

    (B, windows, size * size, C) -> (B, H * W, C)
    """
    height, width = hw_shape
    rows = -(-height // size)
    grid = windows.unflatten(2, (size, size)).unflatten(1, (rows, -1))
    # (B, rows, columns, size, size, C) -> (B, rows * size, columns * size, C)
    grid = grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    if shift:
        grid = grid.roll((shift, shift), (1, 2))
    return grid[:, :height, :width].flatten(1, 2)


def window_mask(hw_shape: Tuple[int, int], size: int, shift: int,
                device: torch.device) -> Optional[Tensor]:
    """Which tokens of a window are neighbours on the map.

    Returns:
        Tensor, optional: (1, windows, 1, size * size, size * size), False
        where a shift or the filling brought two tokens together. None if all
        windows are whole.
    """
    height, width = hw_shape
    if not (shift or height % size or width % size):
        return None
    # The first tokens of each axis come round behind the last ones.
    high = torch.arange(height, device=device) < shift
    wide = torch.arange(width, device=device) < shift
    # The filling has label 0.
    labels = 1 + high[:, None].long() + 2 * wide.long()
    labels = partition(labels.view(1, -1, 1), hw_shape, size, shift)
    return (labels == labels.transpose(2, 3)).unsqueeze(2)
