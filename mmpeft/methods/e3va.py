from typing import Dict, Optional

import torch.nn as nn
from torch import Tensor

from ..registry import METHODS
from ..sites import Site, TokenLayout
from .base import check_width
from .highway import Highway, run
from .lorand import LoRand
from .side import Trunk, TrunkBlock

__all__ = ['E3VA', 'LowRankBottleneck']


class LowRankBottleneck(LoRand):
    """The bottleneck of LoRand without its skip, zero at first."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.up_right)
        nn.init.zeros_(self.up_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)"""
        return self.bottleneck(x)


@METHODS.register_module()
class E3VA(Highway):
    """Low-rank adapters on a highway beside the backbone.

    `Parameter-efficient is not Sufficient: Exploring Parameter, Memory, and
    Time Efficient Adapter Tuning for Dense Predictions
    <https://arxiv.org/abs/2306.09729>`_ (ACM MM 2024)::

        u <- u + adapter1(attention branch) + adapter2(MLP branch)
        out = norm(x + u)

    The adapters read the two branches of each block as they are before
    drop-path, and are bottlenecks whose matrices are those of LoRand, as are
    their counts. The norms of the outputs train, and so does nothing else of
    the backbone; no gradient passes through its blocks. Between two stages
    gradients do pass the frozen patch merging, which the highway inherits.

    No code was released. Choices made here: the adapters have no skip; they
    start at 0, and so at the frozen model; what goes through the patch
    merging is :class:`~mmpeft.methods.highway.Highway`'s.

    Args:
        trunk (Trunk): What it runs beside.
        num_branches (int): Products that are summed to a matrix. Defaults
            to 2.
        rank (int): Rank of a product. Defaults to 8.
        dim (int, optional): Channels of the bottlenecks; None means half the
            width. Defaults to None.
        share_kernel (bool): Whether both matrices of an adapter have the same
            kernels. Defaults to True.
        with_cp (bool, optional): Whether backward computes the adapters again
            instead of keeping what is inside. Defaults to None, which leaves
            it to the ``memory`` of the backbone: ``'lean'`` does, ``'fast'``
            computes again what takes no product, ``'stock'`` keeps all.

    Raises:
        PEFTError: If ``dim`` exceeds the width of a stage, or ``rank`` exceeds
            ``dim``.
    """

    key = 'e3va'
    taps = ('attn_branch', 'ffn_branch')
    trains_out_norms = True

    def __init__(self,
                 trunk: Trunk,
                 num_branches: int = 2,
                 rank: int = 8,
                 dim: Optional[int] = None,
                 share_kernel: bool = True,
                 with_cp: Optional[bool] = None) -> None:
        super().__init__(trunk, with_cp)
        for dims in trunk.stage_dims.values():
            width = max(dims // 2, 1) if dim is None else dim
            check_width('E3VA', 'dim', width, dims)
            check_width('E3VA', 'rank', rank, width)

        def adapter(site: str, block: TrunkBlock) -> LowRankBottleneck:
            return LowRankBottleneck(
                Site(site, block.embed_dims, block.embed_dims, block.path),
                num_branches, rank, dim, share_kernel)

        self.blocks = nn.ModuleDict({
            str(b.index):
            nn.ModuleDict({site: adapter(site, b)
                           for site in self.taps})
            for b in trunk.blocks
        })

    def reset_parameters(self) -> None:
        for adapters in self.blocks.values():
            for module in adapters.values():
                module.reset_parameters()

    def update(self, u: Tensor, block: TrunkBlock, y: Tensor,
               taps: Dict[str, Tensor], layout: TokenLayout) -> Tensor:
        return run(self, self._adapt, *(taps[site] for site in self.taps),
                   str(block.index))

    def _adapt(self, attention: Tensor, mlp: Tensor, index: str) -> Tensor:
        adapters = self.blocks[index]
        return adapters['attn_branch'](attention) + adapters['ffn_branch'](mlp)
