"""Attention in the windows of a map, for networks beside the backbone."""
from typing import Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sites import TokenLayout
from .side import TrunkBlock

__all__ = ['attention_beside', 'partition', 'reverse', 'window_mask']

#: One for both sides, or (height, width).
Sides = Union[int, Tuple[int, int]]


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
        seen = _means(qkv, block.key_stride, layout).unsqueeze(1)
        return _attention(qkv.unsqueeze(1), num_heads, seen=seen).squeeze(1)
    hw = layout.hw_shape
    mask = window_mask(hw, size, shift, qkv.device)
    out = _attention(partition(qkv, hw, size, shift), num_heads, mask)
    return reverse(out, hw, size, shift)


def _means(tokens: Tensor, stride: int, layout: TokenLayout) -> Tensor:
    """The means over the cells of a map, what is left over at its edges out.

    (B, H * W, C) -> (B, H / stride * W / stride, C)
    """
    if stride == 1:
        return tokens
    return layout.to_tokens(F.avg_pool2d(layout.to_grid(tokens), stride))


def _attention(qkv: Tensor,
               num_heads: int,
               mask: Optional[Tensor] = None,
               seen: Optional[Tensor] = None) -> Tensor:
    """(B, windows, N, 3 C) -> (B, windows, N, C); ``seen`` are the tokens
    that give keys and values, if these are others."""

    def parts(t: Tensor) -> Tensor:
        # (3, B, windows, heads, N, C / heads)
        return t.unflatten(-1, (3, num_heads, -1)).permute(3, 0, 1, 4, 2, 5)

    q, k, v = parts(qkv)
    if seen is not None:
        _, k, v = parts(seen)
    if mask is not None:
        mask = mask.expand(len(q), *mask.shape[1:]).flatten(0, 1)
    # Fused kernels are for four axes.
    out = F.scaled_dot_product_attention(
        *(t.flatten(0, 1) for t in (q, k, v)), attn_mask=mask)
    return out.unflatten(0, q.shape[:2]).transpose(2, 3).flatten(3)


def partition(tokens: Tensor,
              hw_shape: Tuple[int, int],
              size: Sides,
              shift: Sides = 0) -> Tensor:
    """Cut a map into windows, filled up with zeros at the right and bottom.

    (B, H * W, C) -> (B, windows, size * size, C)
    """
    height, width = hw_shape
    (high, wide), (down, right) = _both(size), _both(shift)
    grid = tokens.unflatten(1, (height, width))
    grid = F.pad(grid, (0, 0, 0, -width % wide, 0, -height % high))
    if down or right:
        grid = grid.roll((-down, -right), (1, 2))
    # (B, rows, size, columns, size, C)
    grid = grid.unflatten(2, (-1, wide)).unflatten(1, (-1, high))
    return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def reverse(windows: Tensor,
            hw_shape: Tuple[int, int],
            size: Sides,
            shift: Sides = 0) -> Tensor:
    """Undo :func:`partition`.

    (B, windows, size * size, C) -> (B, H * W, C)
    """
    height, width = hw_shape
    (high, wide), (down, right) = _both(size), _both(shift)
    rows = -(-height // high)
    grid = windows.unflatten(2, (high, wide)).unflatten(1, (rows, -1))
    # (B, rows, columns, size, size, C) -> (B, rows * size, columns * size, C)
    grid = grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    if down or right:
        grid = grid.roll((down, right), (1, 2))
    return grid[:, :height, :width].flatten(1, 2)


def window_mask(hw_shape: Tuple[int, int], size: Sides, shift: Sides,
                device: torch.device) -> Optional[Tensor]:
    """Which tokens of a window are neighbours on the map.

    Returns:
        Tensor, optional: (1, windows, 1, size * size, size * size), False
        where a shift or the filling brought two tokens together. None if all
        windows are whole.
    """
    height, width = hw_shape
    (high, wide), (down, right) = _both(size), _both(shift)
    if not (down or right or height % high or width % wide):
        return None
    # The first tokens of each axis come round behind the last ones.
    high = torch.arange(height, device=device) < down
    wide = torch.arange(width, device=device) < right
    # The filling has label 0.
    labels = 1 + high[:, None].long() + 2 * wide.long()
    labels = partition(labels.view(1, -1, 1), hw_shape, size, shift)
    return (labels == labels.transpose(2, 3)).unsqueeze(2)


def _both(sides: Sides) -> Tuple[int, int]:
    return (sides, sides) if isinstance(sides, int) else sides
