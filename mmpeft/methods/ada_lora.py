from typing import Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from ..registry import METHODS
from ..sites import Site, TokenLayout
from .low_rank import LowRank

__all__ = ['AdaLoRA']


@METHODS.register_module()
class AdaLoRA(LowRank):
    """Low-rank update in the form of a singular value decomposition.

    `Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning
    <https://arxiv.org/abs/2303.10512>`_ (ICLR 2023)::

        y <- y + scale * P (E * (Q x)),    scale = alpha / (rank + 1e-5)

    P is ``lora_B``, Q is ``lora_A`` and the singular values E are
    ``lora_E``. Starts at the identity (``E = 0``; P and Q normal with
    standard deviation 0.02) and merges exactly.

    What adapts is the number of triplets that each layer keeps: the
    ``RankBudgetHook`` keeps P and Q near orthogonal by a loss, ranks the
    triplets of the whole model and sets the singular values of the least
    important ones to 0. Without the hook the rank stays fixed. The scale is
    that of the rank at the start throughout, as in the released code: its
    ``ranknum`` is never changed either.

    Args:
        site (Site): Where it is attached; gives the widths.
        rank (int): Triplets of each target at the start. Defaults to 12, the
            1.5 times of a final average of 8 that the paper uses.
        alpha (float, optional): Numerator of the scale; None means ``rank``.
            Defaults to None.
        targets (Sequence[str]): Any of q, k, v, proj, fc1, fc2.
            Defaults to ``('q', 'v')``.
        drop_rate (float): Dropout probability on the input of Q, in [0, 1).
            Defaults to 0.

    Raises:
        PEFTError: For an unknown target, a rank outside [1, width] or an
            ``alpha`` that is not above 0.
    """

    key = 'ada_lora'
    hooks = (dict(type='mmpeft.RankBudgetHook'), )

    def __init__(self,
                 site: Site,
                 rank: int = 12,
                 alpha: Optional[float] = None,
                 targets: Sequence[str] = ('q', 'v'),
                 drop_rate: float = 0.) -> None:
        super().__init__(site, rank, alpha, targets, False, drop_rate)
        self.scale *= rank / (rank + 1e-5)
        self.lora_E = nn.Parameter(torch.empty(len(self.rows) * rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.lora_E)
        nn.init.normal_(self.lora_A, std=0.02)
        nn.init.normal_(self.lora_B, std=0.02)

    def factors(self) -> Tuple[Tensor, Tensor]:
        return self.lora_A * self.lora_E[:, None], self.lora_B

    def behind(self, x: Tensor, y: Tensor, layout: TokenLayout) -> Tensor:
        """(..., in_dims), (..., out_dims) -> (..., out_dims)"""
        updates = self.project(self.dropout(x), *self.factors())
        if self.scale != 1:
            updates = [self.scale * update for update in updates]
        return self.add(y, updates)

    def merge(self, weight: Tensor,
              bias: Optional[Tensor]) -> Tuple[Tensor, Optional[Tensor]]:
        down = self.lora_A.to(weight) * self.lora_E.to(weight)[:, None]
        return self.fold(weight, down, self.lora_B, self.scale), bias

    def gaps(self) -> List[Tensor]:
        """``|P'P - I|`` and ``|QQ' - I|`` of each target, in float32 or
        more."""
        found = []
        with torch.autocast(self.lora_A.device.type, enabled=False):
            for q, p in zip(
                    self.lora_A.split(self.rank),
                    self.lora_B.split(self.sizes)):
                for factor in (q, p.t()):
                    factor = factor.to(
                        torch.promote_types(factor.dtype, torch.float32))
                    eye = torch.eye(self.rank).to(factor)
                    found.append(torch.norm(factor @ factor.t() - eye))
        return found

    def triplet_scores(self, scores: Dict[str, Tensor]) -> Tensor:
        """Importance of each triplet from that of its entries.

        That of its singular value, plus the means over its two vectors.

        Args:
            scores (dict[str, Tensor]): Of the entries of lora_A, lora_B and
                lora_E, shaped like these.

        Returns:
            Tensor: Shaped like ``lora_E``.
        """
        left = [p.mean(0) for p in scores['lora_B'].split(self.sizes)]
        return scores['lora_E'] + torch.cat(left) + scores['lora_A'].mean(1)
