import math
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..recompute import recomputed
from ..registry import METHODS
from ..sites import Site, TokenLayout
from .base import PEFTModule, check_width

__all__ = ['LoRand']


@METHODS.register_module()
class LoRand(PEFTModule):
    """Adapter whose two matrices are sums of low-rank products.

    `1% VS 100%: Parameter-Efficient Low Rank Adapter for Dense Predictions
    <https://openaccess.thecvf.com/content/CVPR2023/html/Yin_1_VS_100_Parameter
    -Efficient_Low_Rank_Adapter_for_Dense_Predictions_CVPR_2023_paper.html>`_
    (CVPR 2023)::

        W1 = sum_i P_i K_i Q_i,    W2 = sum_i R_i K_i S_i,    i <= num_branches
        y <- y + gelu(y W1 + b1) W2 + b2

    with P (d x rank), K (rank x rank), Q (rank x dim), R (dim x rank) and S
    (rank x d). ``y`` is a branch as it is added, drop-path applied. The
    matrices are never built: with few branches, their thin factors cost less.

    In the paper the kernels K belong to both matrices. The code its authors
    released later (STAR, CoLin) is ``num_branches=4, share_kernel=False``. No
    identity at the start, there and here: all factors are Kaiming-uniform.
    The printed count fits in Swin-B (1.20 M), but not in Swin-L, where 1.31 M
    is printed and the same arguments give 1.79 M.

    Args:
        site (Site): Where it is attached; gives the width ``d``.
        num_branches (int): Products that are summed. Defaults to 2.
        rank (int): Rank of a product. Defaults to 8.
        dim (int, optional): Channels of the bottleneck; None means half the
            width. Defaults to None.
        share_kernel (bool): Whether both matrices have the same kernels.
            Defaults to True.

    Raises:
        PEFTError: If ``dim`` exceeds the width, or ``rank`` exceeds ``dim``.
    """

    key = 'lorand'
    sites = ('attn_add', 'ffn_add')

    def __init__(self,
                 site: Site,
                 num_branches: int = 2,
                 rank: int = 8,
                 dim: Optional[int] = None,
                 share_kernel: bool = True) -> None:
        super().__init__(site)
        width = site.embed_dims
        dim = max(width // 2, 1) if dim is None else check_width(
            'LoRand', 'dim', dim, width)
        check_width('LoRand', 'num_branches', num_branches, math.inf)
        check_width('LoRand', 'rank', rank, dim)

        def factor(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_branches, *shape))

        # Bare parameters: initialisation by layer type never meets them.
        self.down_left = factor(width, rank)
        self.down_kernel = factor(rank, rank)
        self.down_right = factor(rank, dim)
        self.down_bias = nn.Parameter(torch.empty(dim))
        self.up_left = factor(dim, rank)
        if share_kernel:
            self.register_parameter('up_kernel', None)
        else:
            self.up_kernel = factor(rank, rank)
        self.up_right = factor(rank, width)
        self.up_bias = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            if parameter.ndim == 3:
                for matrix in parameter.data:
                    nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        for bias, left in ((self.down_bias, self.down_left), (self.up_bias,
                                                              self.up_left)):
            bound = 1 / math.sqrt(left.shape[1])
            nn.init.uniform_(bias, -bound, bound)

    @staticmethod
    def project(x: Tensor, left: Tensor, kernel: Tensor, right: Tensor,
                bias: Tensor) -> Tensor:
        """``x sum_i left_i kernel_i right_i + bias``."""
        # (branches, in, rank) -> (branches * rank, in)
        thin = (left @ kernel).transpose(1, 2).flatten(0, 1)
        # (branches, rank, out) -> (out, branches * rank)
        wide = right.flatten(0, 1).t()
        return F.linear(F.linear(x, thin), wide, bias)

    def bottleneck(self, x: Tensor) -> Tensor:
        """``gelu(x W1 + b1) W2 + b2``: (..., d) -> (..., d)"""
        hidden = recomputed(
            F.gelu,
            self.project(x, self.down_left, self.down_kernel, self.down_right,
                         self.down_bias))
        kernel = self.down_kernel if self.up_kernel is None else self.up_kernel
        return self.project(hidden, self.up_left, kernel, self.up_right,
                            self.up_bias)

    def forward(self, x: Tensor, y: Tensor, layout: TokenLayout) -> Tensor:
        """(B, N, d), (B, N, d) -> (B, N, d)"""
        return y + self.bottleneck(y)
