from typing import Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from ..registry import METHODS
from ..sites import INPUT_SITES, Site, TokenLayout
from .low_rank import TARGETS, RowModule, check_targets

__all__ = ['IA3']


@METHODS.register_module()
class IA3(RowModule):
    """Scales keys, values and the hidden units of the MLP.

    `Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
    In-Context Learning <https://arxiv.org/abs/2205.05638>`_ (NeurIPS 2022)::

        k <- l_k * k,    v <- l_v * v,    W2 gelu(W1 x) <- W2 (l_ff * gelu(..))

    Starts at the identity (vectors of 1) and merges exactly: a vector on an
    output scales weight rows and bias, one on an input weight columns. The
    vector is applied to the whole output, bias included, as in the paper.

    Weight decay pulls the vectors towards 0, not towards 1:
    ``custom_keys={'.peft.ia3.': dict(decay_mult=0)}`` exempts them.

    Args:
        site (Site): Where it is attached; gives the widths.
        targets (Sequence[str]): What is scaled: outputs (q, k, v, proj, fc1,
            fc2) or inputs (qkv_input, proj_input, fc1_input, fc2_input).
            Defaults to ``('k', 'v', 'fc2_input')``.

    Raises:
        PEFTError: For an unknown target.
    """

    key = 'ia3'
    elementwise = True

    def __init__(
        self, site: Site,
        targets: Sequence[str] = ('k', 'v', 'fc2_input')) -> None:
        super().__init__(site, targets)
        self.gamma = nn.Parameter(torch.empty(sum(self.sizes)))
        self.reset_parameters()

    @classmethod
    def sites_for(cls, targets: Sequence[str] = ('k', 'v', 'fc2_input')):
        return check_targets('IA3', targets, TARGETS + INPUT_SITES)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gamma)

    def forward(self, x: Tensor, y: Tensor, layout: TokenLayout) -> Tensor:
        """(..., in_dims), (..., out_dims) -> (..., out_dims)"""
        return self.put(y, [
            part * gamma.to(part.dtype)
            for part, gamma in zip(self.take(y), self.gamma.split(self.sizes))
        ])

    def merge(self, weight: Tensor,
              bias: Optional[Tensor]) -> Tuple[Tensor, Optional[Tensor]]:
        gamma = self.gamma.to(weight)
        if self.site.name in INPUT_SITES:
            return weight * gamma, bias
        whole = weight.new_ones(self.site.out_dims)
        for part, (start, stop) in zip(gamma.split(self.sizes), self.rows):
            whole[start:stop] = part
        return whole[:, None] * weight, None if bias is None else whole * bias
