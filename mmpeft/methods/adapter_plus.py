from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..registry import METHODS
from ..sites import Site, TokenLayout
from .base import PEFTModule, check_positive, check_rate, check_width
from .drop_path import drop_path

__all__ = ['AdapterPlus']


@METHODS.register_module()
class AdapterPlus(PEFTModule):
    """Adapter behind the block, with a learned scale for each channel.

    `Adapters Strike Back <https://arxiv.org/abs/2406.06820>`_ (CVPR 2024)::

        y <- y + scale * drop_path(W2 gelu(W1 y + b1) + b2)

    ``y`` is the stream after the residual add of the MLP (the paper's post
    position), and the adapter has a skip connection of its own. ``scale``
    starts from 1, both matrices from a truncated normal: near the identity.

    Args:
        site (Site): Where it is attached; gives the width ``d``.
        dim (int): Channels of the bottleneck. Defaults to 8; the paper has 1
            to 32.
        drop_path_rate (float, optional): Probability that a sample skips the
            adapter while training, in [0, 1), for every block the same; None
            means the rate of the block's own drop-path. Defaults to 0.1.
        init_std (float): Standard deviation that both matrices start from,
            cut at two of them, above 0. Defaults to 0.01.

    Raises:
        PEFTError: If ``dim`` exceeds the width, or for a rate or deviation
            outside its range.
    """

    sites = ('ffn_residual', )

    def __init__(self,
                 site: Site,
                 dim: int = 8,
                 drop_path_rate: Optional[float] = 0.1,
                 init_std: float = 0.01) -> None:
        super().__init__(site)
        check_width('AdapterPlus', 'dim', dim, site.embed_dims)
        self.drop_path_rate = check_rate(
            'AdapterPlus', 'drop_path_rate',
            site.drop_path if drop_path_rate is None else drop_path_rate)
        self.init_std = check_positive('AdapterPlus', 'init_std', init_std)
        self.down = nn.Linear(site.embed_dims, dim)
        self.up = nn.Linear(dim, site.embed_dims)
        self.scale = nn.Parameter(torch.empty(site.embed_dims))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(
                linear.weight,
                std=self.init_std,
                a=-2 * self.init_std,
                b=2 * self.init_std)
            nn.init.zeros_(linear.bias)
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor, y: Tensor, layout: TokenLayout) -> Tensor:
        """(B, N, d), (B, N, d) -> (B, N, d)"""
        branch = self.up(F.gelu(self.down(y)))
        if self.training:
            branch = drop_path(branch, self.drop_path_rate)
        # In the precision of y: autocast would make the stream float32.
        return y + self.scale.to(branch.dtype) * branch
