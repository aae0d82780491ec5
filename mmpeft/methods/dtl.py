import math
from typing import Callable, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..errors import PEFTError
from ..registry import METHODS
from ..sites import TokenLayout
from .base import check_positive, check_width
from .highway import recompute
from .side import SideNetwork, Trunk, TrunkBlock

__all__ = ['DTL', 'DTLPlus']

#: By block it was taken at, what ``A`` made of the tokens, (B, N, rank).
State = Tuple[Tuple[str, Tensor], ...]


class LowRank(nn.Module):
    """``B A x``, without biases; ``B`` starts at 0.

    Args:
        embed_dims (int): Width ``d`` of the tokens.
        rank (int): Rows of ``A``.
    """

    def __init__(self, embed_dims: int, rank: int) -> None:
        super().__init__()
        # Bare parameters: initialisation by layer type never meets them.
        self.down = nn.Parameter(torch.empty(rank, embed_dims))
        self.up = nn.Parameter(torch.empty(embed_dims, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        nn.init.zeros_(self.up)


@METHODS.register_module()
class DTL(SideNetwork):
    """A compact network beside the blocks that writes to the later ones.

    `DTL: Disentangled Transfer Learning for Visual Recognition
    <https://arxiv.org/abs/2312.07856>`_ (AAAI 2024)::

        u <- u + B A x                      of the tokens x that enter a block
        y <- y + theta(u),    theta(u) = u * sigmoid(beta * u)

    with one pair of matrices for each block; the second line stands behind
    every block from ``start`` on. Between two stages, ``u`` starts again at 0.
    Gradients pass through the blocks behind ``start`` only, and the others
    keep nothing for backward but the tokens that ``A`` reads.

    Stages that end before ``start`` have no matrices: nothing would read
    their ``u``. In a pyramid the outputs of these stages stay frozen. It
    starts at the frozen model.

    Args:
        trunk (Trunk): What it runs beside.
        rank (int): Rows of ``A``. Defaults to 2, as released for ViT; for
            Swin that is 4.
        start (int, optional): Number of the first block that it writes
            behind, counted over the whole backbone from 0. Defaults to None,
            which is what was released, 6 for ViT-B and 14 for Swin-B: the
            middle of its blocks, without the stages that end before it.
        beta (float): Steepness of ``theta``. Defaults to 100.
        with_cp (bool): Whether backward computes ``theta(u)`` again instead
            of keeping what is inside. Defaults to True.

    Raises:
        PEFTError: If ``rank`` exceeds the width of a stage, ``start`` is none
            of its blocks, or ``beta`` is not above 0.
    """

    key = 'dtl'
    detaches = False
    joins_outputs = False
    writes = True

    def __init__(self,
                 trunk: Trunk,
                 rank: int = 2,
                 start: Optional[int] = None,
                 beta: float = 100.,
                 with_cp: bool = True) -> None:
        super().__init__(trunk)
        title = type(self).__name__
        for dims in trunk.stage_dims.values():
            check_width(title, 'rank', rank, dims)
        self.beta = check_positive(title, 'beta', beta)
        self.with_cp = with_cp
        numbers = [b.index for b in trunk.blocks]
        if start is None:
            middle = trunk.blocks[len(numbers) // 2].stage
            later = [b.index for b in trunk.blocks if b.stage >= middle]
            start = later[len(later) // 2]
        if start not in numbers:
            raise PEFTError(f'{title}: start={start!r} is none of the blocks '
                            f'it runs beside, {numbers[0]} to {numbers[-1]}.')
        self.first = start
        # The stages in which anything is written.
        self.stage_dims = {
            b.stage: b.embed_dims
            for b in trunk.blocks if b.index >= start
        }
        self.blocks = nn.ModuleDict({
            str(b.index): LowRank(b.embed_dims, rank)
            for b in trunk.blocks if b.stage in self.stage_dims
        })

    def reset_parameters(self) -> None:
        for module in self.blocks.values():
            module.reset_parameters()

    def start(self, x: Tensor, layout: TokenLayout) -> State:
        return ()

    def step(self, u: State, block: TrunkBlock, x: Tensor, y: Tensor,
             taps: dict, layout: TokenLayout) -> State:
        key = str(block.index)
        if key not in self.blocks:
            return u
        return (*u, (key, F.linear(x, self.blocks[key].down)))

    def next_stage(self, u: State, stage: int, downsample: Callable,
                   layout: TokenLayout) -> State:
        return ()

    def write(self, u: State, block: TrunkBlock, y: Tensor,
              layout: TokenLayout) -> Tensor:
        if block.index < self.first:
            return y
        keys, narrow = zip(*u)
        return y + recompute(self.with_cp, self.theta, keys, block.stage,
                             layout, *narrow)

    def theta(self, keys: Sequence[str], stage: int, layout: TokenLayout,
              *narrow: Tensor) -> Tensor:
        """What is added to the stream.

        Args:
            keys (Sequence[str]): The blocks of this stage so far.
            stage (int): The stage.
            layout (TokenLayout): How the tokens are arranged.
            *narrow (Tensor): (B, N, rank), of each of these blocks.

        Returns:
            Tensor: (B, N, d).
        """
        up = torch.cat([self.blocks[key].up for key in keys], dim=1)
        u = F.linear(torch.cat(narrow, dim=-1), up)
        # u * sigmoid(beta * u), which keeps one tensor
        return F.silu(self.beta * u) / self.beta


@METHODS.register_module()
class DTLPlus(DTL):
    """DTL with a depthwise convolution behind ``theta``.

    From the same paper; the convolution has no bias, is shared by the blocks
    of a stage and sees the whole H x W map. Class and register tokens pass it
    by.

    Args:
        trunk (Trunk): What it runs beside.
        rank (int): As of :class:`DTL`.
        start (int, optional): As of :class:`DTL`.
        beta (float): As of :class:`DTL`.
        kernel_size (int): Side of the kernels. Released are 3 to 5, by task.
            Defaults to 5.
        with_cp (bool): As of :class:`DTL`.

    Raises:
        SiteError: If the tokens of the backbone form no grid.
        PEFTError: As of :class:`DTL`, or if ``kernel_size`` is not a whole
            number of at least 1.
    """

    key = 'dtl_plus'
    needs_grid = True

    def __init__(self,
                 trunk: Trunk,
                 rank: int = 2,
                 start: Optional[int] = None,
                 beta: float = 100.,
                 kernel_size: int = 5,
                 with_cp: bool = True) -> None:
        super().__init__(trunk, rank, start, beta, with_cp)
        check_width('DTLPlus', 'kernel_size', kernel_size, math.inf)
        self.convs = nn.ParameterDict({
            str(stage):
            nn.Parameter(torch.empty(dims, 1, kernel_size, kernel_size))
            for stage, dims in self.stage_dims.items()
        })
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for kernel in self.convs.values():
            nn.init.kaiming_uniform_(kernel, a=math.sqrt(5))

    def theta(self, keys: Sequence[str], stage: int, layout: TokenLayout,
              *narrow: Tensor) -> Tensor:
        u = super().theta(keys, stage, layout, *narrow)
        extra, kernel = layout.num_extra_tokens, self.convs[str(stage)]
        grid = F.conv2d(
            layout.to_grid(u[:, extra:]),
            kernel,
            padding='same',
            groups=len(kernel))
        return torch.cat([u[:, :extra], layout.to_tokens(grid)], dim=1)
