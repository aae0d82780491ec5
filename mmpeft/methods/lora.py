import math
from typing import Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..errors import PEFTError
from ..registry import METHODS
from ..sites import Site, TokenLayout
from .base import PEFTModule, check_positive, check_rate, check_width

__all__ = ['LoRA']

# Parts of the fused projection, and layers that are a site of their own.
QKV_PARTS = ('q', 'k', 'v')
TARGETS = QKV_PARTS + ('proj', 'fc1', 'fc2')


@METHODS.register_module()
class LoRA(PEFTModule):
    """Low-rank update of a frozen linear layer.

    `LoRA: Low-Rank Adaptation of Large Language Models
    <https://arxiv.org/abs/2106.09685>`_ (ICLR 2022)::

        y <- y + scale * B A x,    scale = alpha / rank

    Starts at the identity (``B = 0``) and merges exactly. Each of q, k and v
    has factors of its own. The dense code released with Mona sets
    ``alpha=1`` at rank 64, a scale of 1/64, which cripples it; here ``alpha``
    follows the rank.

    Args:
        site (Site): Where it is attached; gives the widths.
        rank (int): Rank of the update. Defaults to 64.
        alpha (float, optional): Numerator of the scale; None means ``rank``,
            a scale of 1. Defaults to None.
        targets (Sequence[str]): Any of q, k, v, proj, fc1, fc2.
            Defaults to ``('q', 'v')``.
        rslora (bool): Scale by ``alpha / sqrt(rank)`` (`rsLoRA
            <https://arxiv.org/abs/2312.03732>`_). Defaults to False.
        drop_rate (float): Dropout probability on the input of A, in [0, 1).
            Defaults to 0.

    Raises:
        PEFTError: For an unknown target, a rank outside [1, width] or an
            ``alpha`` that is not above 0.
    """

    key = 'lora'
    no_merge = None

    def __init__(self,
                 site: Site,
                 rank: int = 64,
                 alpha: Optional[float] = None,
                 targets: Sequence[str] = ('q', 'v'),
                 rslora: bool = False,
                 drop_rate: float = 0.) -> None:
        super().__init__(site)
        self.rows = [(0, site.out_dims)]
        if site.name == 'qkv':
            self.rows = [site.rows[t] for t in QKV_PARTS if t in targets]
        width = min(site.in_dims, self.rows[0][1] - self.rows[0][0])
        self.rank = check_width('LoRA', 'rank', rank, width)
        alpha = rank if alpha is None else check_positive(
            'LoRA', 'alpha', alpha)
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        # Bare parameters: initialisation by layer type never meets them.
        self.lora_A = nn.Parameter(
            torch.empty(len(self.rows) * rank, site.in_dims))
        self.lora_B = nn.Parameter(
            torch.empty(sum(b - a for a, b in self.rows), rank))
        self.dropout = nn.Dropout(check_rate('LoRA', 'drop_rate', drop_rate))
        self.reset_parameters()

    @classmethod
    def sites_for(cls, targets: Sequence[str] = ('q', 'v'), **kwargs):
        if not (isinstance(targets, (list, tuple)) and targets
                and all(t in TARGETS for t in targets)):
            raise PEFTError(f'LoRA: targets={targets!r} must be a list of at '
                            f'least one of {", ".join(TARGETS)}.')
        sites = ['qkv' if t in QKV_PARTS else t for t in targets]
        return tuple(dict.fromkeys(sites))

    def reset_parameters(self) -> None:
        for factor in self.lora_A.data.split(self.rank):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def _factors(self) -> Sequence[Tuple[Tensor, Tensor, Tuple[int, int]]]:
        sizes = [stop - start for start, stop in self.rows]
        return list(
            zip(
                self.lora_A.split(self.rank), self.lora_B.split(sizes),
                self.rows))

    def forward(self, x: Tensor, y: Tensor, layout: TokenLayout) -> Tensor:
        """(..., in_dims), (..., out_dims) -> (..., out_dims)"""
        hidden = F.linear(self.dropout(x), self.lora_A)
        parts, done = [], 0
        for low, (_, up, (start, stop)) in zip(
                hidden.split(self.rank, dim=-1), self._factors()):
            if start > done:
                parts.append(y[..., done:start])
            update = F.linear(low, up)
            parts.append(y[..., start:stop] + self.scale * update)
            done = stop
        if done < y.shape[-1]:
            parts.append(y[..., done:])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def merge(self, weight: Tensor,
              bias: Optional[Tensor]) -> Tuple[Tensor, Optional[Tensor]]:
        weight = weight.clone()
        for down, up, (start, stop) in self._factors():
            weight[start:stop] += self.scale * (
                up.to(weight) @ down.to(weight))
        return weight, bias
