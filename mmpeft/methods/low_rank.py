"""What the methods on rows of a linear layer have in common."""
import math
from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..errors import PEFTError
from ..ops import add_rows, low_rank_linear
from ..recipes import autocast_of
from ..recompute import is_compiling, recomputed_if_lean
from ..sites import Site
from .base import (LeadingModule, PEFTModule, check_positive, check_rate,
                   check_width)

__all__ = [
    'LeadingRows', 'LowRank', 'RowModule', 'QKV_PARTS', 'TARGETS',
    'check_targets', 'target_rows'
]

# Parts of the fused projection, and layers that are a site of their own.
QKV_PARTS = ('q', 'k', 'v')
TARGETS = QKV_PARTS + ('proj', 'fc1', 'fc2')


def check_targets(owner: str,
                  targets: Sequence[str],
                  known: Sequence[str] = TARGETS) -> Tuple[str, ...]:
    """Refuse targets that are no list of known ones; their sites."""
    is_list = isinstance(targets, (list, tuple)) and len(targets) > 0
    if not is_list or any(t not in known for t in targets):
        raise PEFTError(f'{owner}: targets={targets!r} must be a list of at '
                        f'least one of {", ".join(known)}.')
    sites = ['qkv' if t in QKV_PARTS else t for t in targets]
    return tuple(dict.fromkeys(sites))


def target_rows(site: Site, targets: Sequence[str]) -> List[Tuple[int, int]]:
    """Output rows (start, stop) of each target at a site, in order."""
    if site.name == 'qkv':
        return [site.rows[t] for t in QKV_PARTS if t in targets]
    return [(0, site.out_dims)]


def _multiplies_in_full() -> bool:
    """Whether products of float32 are computed in float32."""
    try:
        return torch.get_float32_matmul_precision() == 'highest'
    except RuntimeError:
        # Set for one backend, in the way of torch 2.9, which it then refuses
        # to sum up.
        return False


class RowModule(PEFTModule):
    """Changes some output rows of a frozen linear layer.

    Args:
        site (Site): Where it is attached; gives the widths.
        targets (Sequence[str]): Any of q, k, v, proj, fc1, fc2.
    """

    no_merge = None

    def __init__(self, site: Site, targets: Sequence[str]) -> None:
        super().__init__(site)
        self.rows = target_rows(site, targets)
        self.sizes = [stop - start for start, stop in self.rows]

    @classmethod
    def sites_for(cls, targets: Sequence[str] = ('q', 'v'), **kwargs):
        return check_targets(cls.__name__, targets)

    def take(self, y: Tensor) -> List[Tensor]:
        """The outputs of each target: (..., out_dims) -> [(..., rows)]."""
        return [y[..., start:stop] for start, stop in self.rows]

    def add(self, y: Tensor, updates: Sequence[Tensor]) -> Tensor:
        """``y`` with the update of each target added."""
        if all(u.dtype == y.dtype for u in updates):
            return add_rows(y, self.rows, updates)
        return self.put(
            y, [part + own for part, own in zip(self.take(y), updates)])

    def put(self, y: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """``y`` with other outputs for the targets."""
        whole, done = [], 0
        for part, (start, stop) in zip(parts, self.rows):
            if start > done:
                whole.append(y[..., done:start])
            whole.append(part)
            done = stop
        if done < y.shape[-1]:
            whole.append(y[..., done:])
        return whole[0] if len(whole) == 1 else torch.cat(whole, dim=-1)


class LeadingRows(LeadingModule, RowModule):
    """Rows whose update can be part of the weight; has a ``dropout`` of its
    input."""

    def takes_over(self, x: Tensor, layer: nn.Module) -> bool:
        """Not in half precision or TF32, which would lose the update in its
        sum with the weight; nor for so few tokens that the sum takes
        longer."""
        weight, own = layer.weight, next(self.parameters())
        full = own.dtype == weight.dtype == x.dtype and x.dtype in (
            torch.float32, torch.float64)
        dropping = self.training and self.dropout.p > 0
        return (full and not autocast_of(x.device.type)[0]
                and _multiplies_in_full() and not dropping
                and x.numel() >= weight.shape[1]**2
                and not weight.requires_grad and not is_compiling())


class LowRank(LeadingRows):
    """Rows with a pair of low-rank factors ``B A`` for each target.

    Subclasses initialise them, and call :meth:`reset_parameters` when their
    own parameters are there.

    Args:
        site (Site): Where it is attached; gives the widths.
        rank (int): Rank of the update.
        alpha (float, optional): Numerator of the scale; None means ``rank``,
            a scale of 1.
        targets (Sequence[str]): Any of q, k, v, proj, fc1, fc2.
        rslora (bool): Whether the scale is ``alpha / sqrt(rank)``.
        drop_rate (float): Dropout probability on the input of A, in [0, 1).
    """

    #: Factors whose update is taken away again; None if there are none.
    initial: Optional[Tuple[Tensor, Tensor]] = None

    def __init__(self, site: Site, rank: int, alpha: Optional[float],
                 targets: Sequence[str], rslora: bool,
                 drop_rate: float) -> None:
        super().__init__(site, targets)
        owner = type(self).__name__
        width = min(site.in_dims, self.sizes[0])
        self.rank = check_width(owner, 'rank', rank, width)
        alpha = rank if alpha is None else check_positive(
            owner, 'alpha', alpha)
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        # Bare parameters: initialisation by layer type never meets them.
        self.lora_A = nn.Parameter(
            torch.empty(len(self.rows) * rank, site.in_dims))
        self.lora_B = nn.Parameter(torch.empty(sum(self.sizes), rank))
        self.dropout = nn.Dropout(check_rate(owner, 'drop_rate', drop_rate))

    def reset_parameters(self) -> None:
        for factor in self.lora_A.data.split(self.rank):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def project(self, x: Tensor, down: Tensor, up: Tensor) -> List[Tensor]:
        """``B A x`` of each target, for factors shaped like its own.

        (..., in_dims) -> [(..., rows)]
        """
        hidden = recomputed_if_lean(F.linear, x, down)
        hidden = hidden.split(self.rank, dim=-1)
        return [F.linear(h, b) for h, b in zip(hidden, up.split(self.sizes))]

    def replaced(self, x: Tensor, layer: nn.Module) -> Tensor:
        """The updated layer: (..., in_dims) -> (..., out_dims)"""
        return low_rank_linear(x, layer.weight, layer.bias, self.rows,
                               *self.factors(), self.scale, self.initial)

    def factors(self) -> Tuple[Tensor, Tensor]:
        """``A`` and ``B`` of all targets."""
        return self.lora_A, self.lora_B

    def products(self, down: Tensor, up: Tensor) -> List[Tensor]:
        """``B A`` of each target: [(rows, in_dims)]."""
        return [
            b @ a for a, b in zip(down.split(self.rank), up.split(self.sizes))
        ]

    def fold(self, weight: Tensor, down: Tensor, up: Tensor,
             scale: float) -> Tensor:
        """``W + scale * B A``, as a new tensor."""
        weight = weight.clone()
        products = self.products(down.to(weight), up.to(weight))
        for product, (start, stop) in zip(products, self.rows):
            weight[start:stop] += scale * product
        return weight
