"""Tell blocks the shape of the map, where the stock backbone does not."""
from typing import Optional, Sequence, Tuple, Type

import torch.nn as nn
from torch import Tensor

from ..errors import SiteError
from ..sites import TokenLayout
from .attached import BlockPEFT

__all__ = ['Grid', 'layout_of', 'watch_stem']


class Grid:
    """How the tokens of a forward are arranged; the stem writes it down.

    Args:
        num_extra_tokens (int): Class and register tokens before the grid.
    """

    def __init__(self, num_extra_tokens: int) -> None:
        self.num_extra_tokens = num_extra_tokens
        self.hw_shape: Optional[Tuple[int, int]] = None

    def note(self, stem: nn.Module, args: tuple, output: tuple) -> None:
        """Forward hook of a stem that returns tokens and their (H, W)."""
        self.hw_shape = (int(output[1][0]), int(output[1][1]))

    def layout(self, x: Tensor) -> TokenLayout:
        """How the tokens (B, N, C) of a block are arranged."""
        height, width = self.hw_shape or (0, 0)
        # Pre-training on masked images drops most of the tokens.
        whole = x.shape[1] == self.num_extra_tokens + height * width
        return TokenLayout(self.hw_shape if whole else None,
                           self.num_extra_tokens)


def layout_of(peft: BlockPEFT, x: Tensor) -> TokenLayout:
    """Layout of the tokens that enter a block.

    Raises:
        SiteError: If they are no grid, and something in the block needs one.
    """
    layout = TokenLayout() if peft.grid is None else peft.grid.layout(x)
    if layout.hw_shape is None:
        for module in peft.modules():
            if getattr(module, 'needs_grid', False):
                raise SiteError(
                    f'{type(module).__name__} needs the whole grid of tokens, '
                    f'but {x.shape[1]} tokens entered its block, as with '
                    'masked images or patch dropout; choose a method that '
                    'reads single tokens.')
    return layout


def watch_stem(stem: nn.Module,
               num_extra_tokens: int,
               blocks: Sequence[nn.Module],
               grid_type: Type[Grid] = Grid) -> list:
    """Have a stem tell blocks the grid; returns the handles of its hooks.

    The hook is a bound method, which follows a deep copy, and the blocks of
    the copy get the copy's grid.
    """
    grid = grid_type(num_extra_tokens)
    for block in blocks:
        block.peft.grid = grid
    return [stem.register_forward_hook(grid.note)]
