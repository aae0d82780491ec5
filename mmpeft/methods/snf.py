import math

import torch
import torch.nn as nn
from torch import Tensor

from ..registry import METHODS
from ..sites import Site, TokenLayout
from .base import PEFTModule, check_width

__all__ = ['SNF']


@METHODS.register_module()
class SNF(PEFTModule):
    """A normalizing flow in the place of each shortcut.

    `Adapting Shortcut with Normalizing Flow: An Efficient Tuning Framework
    for Visual Recognition
    <https://openaccess.thecvf.com/content/CVPR2023/html/Wang_Adapting_Shortcut_With_Normalizing_Flow_An_Efficient_Tuning_Framework_for_CVPR_2023_paper.html>`_
    (CVPR 2023)::

        z = mu + exp(sigma) * x
        z <- z + u_k * tanh(w_k . z + b_k),    k = 1..K
        x <- z + branch(x)

    for the attention and for the MLP; the branch still reads x. It starts
    near the identity and not at it. The released code has K = 16, and so 2.5
    times the parameters that are printed for it: K = 5 is nearest to those.
    The determinants that make the flow a normalizing one are computed there
    and not used; here they are not computed.

    Args:
        site (Site): Where it is attached; gives the width.
        num_flows (int): Number K of planar flows, at least 1. Defaults to 5.

    Raises:
        PEFTError: If ``num_flows`` is not a whole number of at least 1.
    """  # noqa: E501

    key = 'snf'
    sites = ('attn_shortcut', 'ffn_shortcut')

    def __init__(self, site: Site, num_flows: int = 5) -> None:
        super().__init__(site)
        check_width('SNF', 'num_flows', num_flows, math.inf)
        dims = site.embed_dims
        self.mu = nn.Parameter(torch.empty(dims))
        self.sigma = nn.Parameter(torch.empty(dims))
        # One row for each flow.
        self.w = nn.Parameter(torch.empty(num_flows, dims))
        self.u = nn.Parameter(torch.empty(num_flows, dims))
        self.b = nn.Parameter(torch.empty(num_flows))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.mu)
        nn.init.zeros_(self.sigma)
        for tensor in (self.w, self.u, self.b):
            nn.init.uniform_(tensor, -0.01, 0.01)

    def forward(self, x: Tensor, y: Tensor, layout: TokenLayout) -> Tensor:
        """(B, N, d), (B, N, d) -> (B, N, d)"""
        z = self.mu + self.sigma.exp() * y
        for w, u, b in zip(self.w, self.u, self.b):
            # (B, N, d) . (d, ) -> (B, N, 1)
            z = z + u * torch.tanh((z @ w + b).unsqueeze(-1))
        return z
