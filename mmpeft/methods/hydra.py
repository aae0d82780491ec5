from typing import Optional, Tuple

import torch.nn as nn
from torch import Tensor

from ..registry import METHODS
from ..sites import Site, TokenLayout
from .base import PEFTModule, check_positive, check_rate, check_width

__all__ = ['Hydra']


@METHODS.register_module()
class Hydra(PEFTModule):
    """A low-rank map beside a linear layer and another one behind it.

    `Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning
    <https://arxiv.org/abs/2309.06922>`_ (Neural Networks 2024)::

        y = W0 x + b0
        y <- y + scale * (Pu dropout(Pd x + pd) + pu)
               + scale * (Qu dropout(Qd y + qd) + qu)

    at the projection of the attention and at the second layer of the MLP. It
    starts at the identity, and it merges. The released merge of the
    projection reads the second layer of the MLP instead; this one does not.

    Args:
        site (Site): Where it is attached; gives the widths.
        rank (int): Rank of both maps. Defaults to 2.
        scale (float): Factor of both maps; the released configs have .1 to
            4.5, one for each task. Defaults to 1.
        drop_rate (float): Dropout probability between the two factors of a
            map, in [0, 1). Defaults to 0.2.

    Raises:
        PEFTError: If ``rank`` exceeds the width or ``scale`` is not above 0.
    """

    sites = ('proj', 'fc2')
    no_merge = None

    def __init__(self,
                 site: Site,
                 rank: int = 2,
                 scale: float = 1.,
                 drop_rate: float = 0.2) -> None:
        super().__init__(site)
        check_width('Hydra', 'rank', rank, min(site.in_dims, site.out_dims))
        self.scale = check_positive('Hydra', 'scale', scale)
        self.dropout = nn.Dropout(check_rate('Hydra', 'drop_rate', drop_rate))
        self.parallel_down = nn.Linear(site.in_dims, rank)
        self.parallel_up = nn.Linear(rank, site.out_dims)
        self.sequential_down = nn.Linear(site.out_dims, rank)
        self.sequential_up = nn.Linear(rank, site.out_dims)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for down in (self.parallel_down, self.sequential_down):
            nn.init.xavier_uniform_(down.weight)
            nn.init.zeros_(down.bias)
        for up in (self.parallel_up, self.sequential_up):
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)

    def forward(self, x: Tensor, y: Tensor, layout: TokenLayout) -> Tensor:
        """(..., in_dims), (..., out_dims) -> (..., out_dims)"""
        parallel = self.parallel_up(self.dropout(self.parallel_down(x)))
        sequential = self.sequential_up(self.dropout(self.sequential_down(y)))
        return y + self.scale * (parallel + sequential)

    def merge(self, weight: Tensor,
              bias: Optional[Tensor]) -> Tuple[Tensor, Optional[Tensor]]:
        parallel = _collapse(self.parallel_down, self.parallel_up, weight)
        sequential = _collapse(self.sequential_down, self.sequential_up,
                               weight)
        shift = parallel[1] + sequential[1]
        if bias is not None:
            shift = shift + sequential[0] @ bias
        update = parallel[0] + sequential[0] @ weight
        shift = self.scale * shift
        return (weight + self.scale * update,
                shift if bias is None else bias + shift)


def _collapse(down: nn.Linear, up: nn.Linear,
              like: Tensor) -> Tuple[Tensor, Tensor]:
    """Weight and bias of ``up(down(x))``."""
    up_weight = up.weight.to(like)
    return (up_weight @ down.weight.to(like),
            up_weight @ down.bias.to(like) + up.bias.to(like))
