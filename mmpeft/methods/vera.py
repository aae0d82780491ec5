import math
from typing import Any, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..errors import PEFTError
from ..ops import low_rank_linear
from ..registry import METHODS
from ..sites import Site, TokenLayout
from .base import check_rate, check_width
from .low_rank import LeadingRows, target_rows

__all__ = ['VeRA']

PROJECTIONS = ('shape', 'largest')


class Projections(nn.Module):
    """The frozen random pairs of a backbone.

    Args:
        shapes (Sequence[tuple[int, int]]): (rows, in_dims) of each pair.
        rank (int): Rank of the pairs.
        seed (int): Seed of each pair.
    """

    def __init__(self, shapes: Sequence[Tuple[int, int]], rank: int,
                 seed: int) -> None:
        super().__init__()
        self.shapes = list(shapes)
        self.seed = seed
        for rows, dims in self.shapes:
            self.register_buffer(f'A_{rows}x{dims}', torch.empty(rank, dims))
            self.register_buffer(f'B_{rows}x{dims}', torch.empty(rows, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for shape in self.shapes:
            # On the CPU, so that every process and device draws the same.
            generator = torch.Generator().manual_seed(self.seed)
            for factor in self.pair(*shape):
                # Kaiming-uniform for the gain of ReLU.
                bound = math.sqrt(6 / factor.shape[1])
                numbers = torch.empty(factor.shape, device='cpu')
                numbers.uniform_(-bound, bound, generator=generator)
                factor.copy_(numbers)

    def pair(self, rows: int, dims: int) -> Tuple[Tensor, Tensor]:
        """A (rank, dims) and B (rows, rank), cut out of a larger pair if
        there is none of that shape."""
        shape = (rows, dims)
        if shape not in self.shapes:
            shape = self.shapes[0]
        down, up = (getattr(self, f'{f}_{shape[0]}x{shape[1]}') for f in 'AB')
        return down[:, :dims], up[:rows]


@METHODS.register_module()
class VeRA(LeadingRows):
    """Two trained vectors around a frozen random low-rank pair.

    `VeRA: Vector-based Random Matrix Adaptation
    <https://arxiv.org/abs/2310.11454>`_ (ICLR 2024)::

        y <- y + b * (B (d * (A x)))

    A and B are random, never train and are shared by all layers of one
    shape; b (one number for each output row) and d (one for each of the
    ``rank`` directions) are trained for each layer and target. Starts at the
    identity (``b = 0``) and merges exactly. A and B are Kaiming-uniform from
    a seed and are saved with the model. The code released in peft has one
    pair for all shapes, of the largest widths, and cuts each layer's out of
    it: ``projection='largest'``, with the same numbers for the same seed.

    Args:
        site (Site): Where it is attached; gives the widths.
        rank (int): Rank of the pair; may exceed the width. Defaults to 256.
        targets (Sequence[str]): Any of q, k, v, proj, fc1, fc2.
            Defaults to ``('q', 'v')``.
        d_init (float): Start of every entry of d, not 0. Defaults to 0.1.
        drop_rate (float): Dropout probability on the input of A, in [0, 1).
            Defaults to 0.
        projection (str): ``'shape'``, one pair for each shape of layer, or
            ``'largest'``, one pair for all. Defaults to ``'shape'``.
        projection_prng_key (int): Seed of the pairs. Defaults to 0.

    Raises:
        PEFTError: For an unknown target or ``projection``, a rank below 1, a
            ``d_init`` of 0 or a seed that is no whole number.
    """

    key = 'vera'

    def __init__(self,
                 site: Site,
                 rank: int = 256,
                 targets: Sequence[str] = ('q', 'v'),
                 d_init: float = 0.1,
                 drop_rate: float = 0.,
                 projection: str = 'shape',
                 projection_prng_key: int = 0) -> None:
        super().__init__(site, targets)
        self.rank = check_width('VeRA', 'rank', rank, rank)
        number = isinstance(d_init, (int, float)) and d_init == d_init
        if isinstance(d_init, bool) or not number or d_init == 0:
            raise PEFTError('VeRA: d_init must be a number other than 0, from '
                            f'which neither vector moves, but got {d_init!r}.')
        self.d_init = float(d_init)
        self.lambda_d = nn.Parameter(torch.empty(len(self.rows) * rank))
        self.lambda_b = nn.Parameter(torch.empty(sum(self.sizes)))
        self.dropout = nn.Dropout(check_rate('VeRA', 'drop_rate', drop_rate))
        self.reset_parameters()

    @classmethod
    def build_shared(cls,
                     sites: Sequence[Site],
                     rank: int = 256,
                     targets: Sequence[str] = ('q', 'v'),
                     projection: str = 'shape',
                     projection_prng_key: int = 0,
                     **kwargs: Any) -> Projections:
        check_width('VeRA', 'rank', rank, rank)
        if projection not in PROJECTIONS:
            raise PEFTError(f'VeRA: unknown projection {projection!r}; use '
                            f'one of {", ".join(PROJECTIONS)}.')
        seed = projection_prng_key
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise PEFTError('VeRA: projection_prng_key must be a whole '
                            f'number, but got {seed!r}.')
        shapes = [(stop - start, site.in_dims) for site in sites
                  for start, stop in target_rows(site, targets)]
        shapes = list(dict.fromkeys(shapes))
        if projection == 'largest':
            shapes = [tuple(max(sizes) for sizes in zip(*shapes))]
        return Projections(shapes, rank, seed)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.lambda_d, self.d_init)
        nn.init.zeros_(self.lambda_b)

    def behind(self, x: Tensor, y: Tensor, layout: TokenLayout) -> Tensor:
        """(..., in_dims), (..., out_dims) -> (..., out_dims)"""
        # All targets of a layer are of one shape, so they share A x.
        down, up = self.shared.pair(self.sizes[0], self.site.in_dims)
        hidden = F.linear(self.dropout(x), down)
        updates = []
        for d, b in zip(
                self.lambda_d.split(self.rank),
                self.lambda_b.split(self.sizes)):
            update = F.linear(hidden * d.to(hidden.dtype), up)
            updates.append(b.to(update.dtype) * update)
        return self.add(y, updates)

    def replaced(self, x: Tensor, layer: nn.Module) -> Tensor:
        down, up = self.shared.pair(self.sizes[0], self.site.in_dims)
        downs = [d[:, None] * down for d in self.lambda_d.split(self.rank)]
        ups = [b[:, None] * up for b in self.lambda_b.split(self.sizes)]
        return low_rank_linear(x, layer.weight, layer.bias, self.rows,
                               torch.cat(downs), torch.cat(ups))

    def merge(self, weight: Tensor,
              bias: Optional[Tensor]) -> Tuple[Tensor, Optional[Tensor]]:
        weight = weight.clone()
        pair = self.shared.pair(self.sizes[0], self.site.in_dims)
        down, up = (factor.to(weight) for factor in pair)
        for d, b, (start, stop) in zip(
                self.lambda_d.to(weight).split(self.rank),
                self.lambda_b.to(weight).split(self.sizes), self.rows):
            weight[start:stop] += b[:, None] * up @ (d[:, None] * down)
        return weight, bias
