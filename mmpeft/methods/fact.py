import math
from typing import Dict, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..errors import PEFTError
from ..registry import METHODS
from ..sites import Site, TokenLayout
from .base import PEFTModule, check_positive, check_rate, check_width
from .per_stage import PerStage

__all__ = ['FacTTK', 'FacTTT', 'StageFactors']


class StageFactors(nn.Module):
    """What all blocks of one stage of width ``dims`` share; ``num_slices`` is
    the number of d x d slices that the factors serve."""

    def __init__(self, dims: int, rank: int, num_slices: int,
                 tucker: bool) -> None:
        super().__init__()
        self.num_slices = num_slices
        self.u = nn.Parameter(torch.empty(rank, dims))
        self.v = nn.Parameter(torch.empty(dims, rank))
        self.core = None
        if tucker:
            self.core = nn.Parameter(torch.empty(rank, rank, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in the released code; V = 0 is no update."""
        nn.init.kaiming_uniform_(self.u, a=math.sqrt(5))
        nn.init.zeros_(self.v)
        if self.core is not None:
            nn.init.xavier_uniform_(self.core)


class FacT(PEFTModule):
    """What both decompositions have in common."""

    sites = ('qkv', 'proj', 'fc1', 'fc2')
    no_merge = None
    #: Rank when none is given.
    default_rank = 0
    #: Whether the blocks of a stage share a core.
    tucker = False

    def __init__(self, site: Site, rank: int, scale: float,
                 drop_rate: float) -> None:
        super().__init__(site)
        owner = type(self).__name__
        self.dims, self.outs, self.ins = self.slices(site)
        self.rank = check_width(owner, 'rank', rank, math.inf)
        self.scale = check_positive(owner, 'scale', scale)
        self.dropout = nn.Dropout(check_rate(owner, 'drop_rate', drop_rate))

    @classmethod
    def slices(cls, site: Site) -> Tuple[int, int, int]:
        """``d``, and the numbers of d x d slices of a weight by its output
        and by its input."""
        dims, wide = site.in_dims, site.out_dims
        if site.name == 'fc2':
            dims, wide = wide, dims
        if wide % dims:
            raise PEFTError(
                f'{cls.__name__} cuts weights into squares of the width '
                f'{dims} of the tokens, but {site.name} is {site.out_dims} x '
                f'{site.in_dims}: {wide} is no multiple of {dims}. Use a '
                'whole number as mlp_ratio, or LoRA.')
        outs, ins = wide // dims, 1
        return (dims, ins, outs) if site.name == 'fc2' else (dims, outs, ins)

    @classmethod
    def build_shared(cls,
                     sites: Sequence[Site],
                     rank: Optional[int] = None,
                     **kwargs) -> PerStage:
        rank = cls.default_rank if rank is None else rank
        check_width(cls.__name__, 'rank', rank, math.inf)
        widths: Dict[int, int] = {}
        counts: Dict[int, int] = {}
        for site in sites:
            dims, outs, ins = cls.slices(site)
            if rank > dims:
                raise PEFTError(
                    f'{cls.__name__}: rank={rank} is larger than the width '
                    f'{dims} of stage {site.stage}; use at most {dims}, or '
                    '`layers` to leave the stage out.')
            widths[site.stage] = dims
            counts[site.stage] = counts.get(site.stage, 0) + outs * ins
        return PerStage({
            s: StageFactors(widths[s], rank, counts[s], cls.tucker)
            for s in widths
        })

    @property
    def factors(self) -> StageFactors:
        """What this block shares with the others of its stage."""
        return self.shared.of(self.site)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """(outs * rank, ins * rank): what stands between U and V, one block
        of rank x rank for each slice."""
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor, layout: TokenLayout) -> Tensor:
        """(..., ins * d), (..., outs * d) -> (..., outs * d)"""
        u, v = self.factors.u, self.factors.v
        # (..., ins * d) -> (..., ins, d) -> (..., ins * r)
        low = F.linear(x.unflatten(-1, (self.ins, self.dims)), u).flatten(-2)
        low = self.dropout(F.linear(low, self.matrix(u.dtype)))
        # (..., outs * r) -> (..., outs, r) -> (..., outs * d)
        update = F.linear(low.unflatten(-1, (self.outs, self.rank)), v)
        return y + self.scale * update.flatten(-2)

    def merge(self, weight: Tensor,
              bias: Optional[Tensor]) -> Tuple[Tensor, Optional[Tensor]]:
        u, v = self.factors.u.to(weight), self.factors.v.to(weight)
        blocks = self.matrix(weight.dtype).view(self.outs, self.rank, self.ins,
                                                self.rank)
        update = torch.einsum('da,iajb,be->idje', v, blocks, u)
        return weight + self.scale * update.reshape(weight.shape), bias


@METHODS.register_module()
class FacTTT(FacT):
    """Updates of all weights as one tensor, decomposed as a tensor train.

    `FacT: Factor-Tuning for Lightweight Adaptation on Vision Transformer
    <https://arxiv.org/abs/2212.03145>`_ (AAAI 2023). With every weight cut
    into d x d slices (q, k, v, the projection and as many of each MLP layer
    as its ratio, rows of fc1 and columns of fc2)::

        slice of W x <- slice of W x + scale * V dropout(core_slice U x)

    U and V are shared by all blocks, the cores are each block's own. The
    width differs between the stages of a pyramid, so each stage has a U and
    V of its own; nothing else departs from the released code. It starts at
    the identity, and it merges.

    Args:
        site (Site): Where it is attached; gives the number of slices.
        rank (int): Rank ``r`` of the factors, at most the smallest width.
            Defaults to 16.
        scale (float): Factor of the update; the paper picks one of .01, .1,
            1, 10, 100 for each task. Defaults to 1.
        drop_rate (float): Dropout probability after the core, in [0, 1).
            Defaults to 0.1.

    Raises:
        PEFTError: If ``rank`` exceeds a width, or the width of the MLP is no
            multiple of the width of the tokens.
    """

    key = 'fact_tt'
    default_rank = 16

    def __init__(self,
                 site: Site,
                 rank: int = 16,
                 scale: float = 1.,
                 drop_rate: float = 0.1) -> None:
        super().__init__(site, rank, scale, drop_rate)
        self.core = nn.Parameter(
            torch.empty(self.outs * rank, self.ins * rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # The default of the linear layers that the released code has here.
        nn.init.kaiming_uniform_(self.core, a=math.sqrt(5))

    def matrix(self, dtype: torch.dtype) -> Tensor:
        return self.core.to(dtype)


@METHODS.register_module()
class FacTTK(FacT):
    """Updates of all weights as one tensor, in Tucker's decomposition.

    `FacT: Factor-Tuning for Lightweight Adaptation on Vision Transformer
    <https://arxiv.org/abs/2212.03145>`_ (AAAI 2023). Slices as in
    :class:`FacTTT`::

        core_slice = sum_k C[:, :, k] P[k, slice]
        slice of W x <- slice of W x + scale * V dropout(core_slice^T U x)

    U, V and C are shared by the blocks of a stage; each block owns its
    columns of P, one for each slice.

    The released code departs from this in the MLP, where a reshape mixes the
    slices: each rank x rank x 4 of cores is read as rank x 4 rank, channel by
    channel, and the core of fc2 is used transposed. ``interleave=True`` does
    the same.

    Args:
        site (Site): Where it is attached; gives the number of slices.
        rank (int): Rank ``r`` of all three modes, at most the smallest width.
            Defaults to 32.
        scale (float): Factor of the update; the paper picks one of .01, .1,
            1, 10, 100 for each task. Defaults to 1.
        drop_rate (float): Dropout probability after the core, in [0, 1).
            Defaults to 0.1.
        interleave (bool): Whether the cores of the MLP are mixed as in the
            released code. Defaults to False.

    Raises:
        PEFTError: If ``rank`` exceeds a width, or the width of the MLP is no
            multiple of the width of the tokens.
    """

    key = 'fact_tk'
    default_rank = 32
    tucker = True

    def __init__(self,
                 site: Site,
                 rank: int = 32,
                 scale: float = 1.,
                 drop_rate: float = 0.1,
                 interleave: bool = False) -> None:
        super().__init__(site, rank, scale, drop_rate)
        self.interleave = interleave and site.name in ('fc1', 'fc2')
        self.columns = nn.Parameter(torch.empty(rank, self.outs * self.ins))
        self.reset_parameters()

    def bind_shared(self, owner: nn.Module) -> None:
        super().bind_shared(owner)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # Xavier's bound for the whole of P, of which these are some columns.
        columns = self.columns.shape[1]
        if self._shared:
            columns = self.factors.num_slices
        bound = math.sqrt(6 / (self.rank + columns))
        nn.init.uniform_(self.columns, -bound, bound)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        cores = self.factors.core.to(dtype) @ self.columns.to(dtype)
        if self.interleave:
            # (r, r, slices) -> (r, r * slices), channels before slices
            mixed = cores.flatten(1)
            return mixed if self.site.name == 'fc2' else mixed.t()
        # (r in, r out, outs * ins) -> (outs, r out, ins, r in)
        cores = cores.unflatten(2, (self.outs, self.ins)).permute(2, 1, 3, 0)
        return cores.reshape(self.outs * self.rank, self.ins * self.rank)
