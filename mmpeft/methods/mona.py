import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..ops import filtered_bottleneck
from ..recipes import current
from ..registry import METHODS
from ..sites import Site, TokenLayout
from .base import PEFTModule, check_rate, check_width
from .mona_fold import FoldedMona, fold_op

__all__ = ['Mona', 'MonaOp']


class MonaOp(nn.Module):
    """Three depthwise filters and a pointwise one, each with a skip::

        t <- t + (DW3 t + DW5 t + DW7 t) / 3
        t <- t + Conv1x1(t)

    Args:
        dim (int): Channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.conv2 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.conv3 = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.projector = nn.Conv2d(dim, dim, 1)

    def reset_parameters(self) -> None:
        """PyTorch's default for convolutions, as in the released code."""
        for conv in self.children():
            conv.reset_parameters()

    def forward(self, t: Tensor) -> Tensor:
        """(B, dim, H, W) -> (B, dim, H, W)"""
        t = t + (self.conv1(t) + self.conv2(t) + self.conv3(t)) / 3
        return t + self.projector(t)


@METHODS.register_module()
class Mona(PEFTModule):
    """Multi-cognitive visual adapter, placed after each residual add.

    `5%>100%: Breaking Performance Shackles of Full Fine-Tuning on Visual
    Recognition Tasks <https://arxiv.org/abs/2408.08345>`_ (CVPR 2025)::

        u = gamma * LN(y) + gammax * y
        y <- y + W2 dropout(gelu(MonaOp(W1 u + b1))) + b2

    The convolutions see the whole H x W map, not windows; class and register
    tokens pass unchanged. Unlike in the released code the width is ``dim``
    and not a fixed 64. By design it does not start at the identity: as there,
    both linear layers start from a truncated normal of std 0.02.

    Args:
        site (Site): Where it is attached; gives the width ``d``.
        dim (int): Channels of the bottleneck. Defaults to 64.
        drop_rate (float): Dropout probability after GELU, in [0, 1).
            Defaults to 0.1.

    Raises:
        SiteError: If the tokens of the backbone form no grid.
        PEFTError: If ``dim`` exceeds the width.
    """

    sites = ('attn_residual', 'ffn_residual')
    needs_grid = True
    recipe_lr = dict(mmdet=1e-4, mmseg=3e-4)

    def __init__(self,
                 site: Site,
                 dim: int = 64,
                 drop_rate: float = 0.1) -> None:
        super().__init__(site)
        check_width('Mona', 'dim', dim, site.embed_dims)
        # Parameter names are those of the released code.
        self.norm = nn.LayerNorm(site.embed_dims)
        self.gamma = nn.Parameter(torch.empty(site.embed_dims))
        self.gammax = nn.Parameter(torch.empty(site.embed_dims))
        self.project1 = nn.Linear(site.embed_dims, dim)
        self.adapter_conv = MonaOp(dim)
        self.dropout = nn.Dropout(check_rate('Mona', 'drop_rate', drop_rate))
        self.project2 = nn.Linear(dim, site.embed_dims)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.norm.reset_parameters()
        nn.init.constant_(self.gamma, 1e-6)
        nn.init.ones_(self.gammax)
        for linear in (self.project1, self.project2):
            nn.init.trunc_normal_(linear.weight, std=.02)
            nn.init.zeros_(linear.bias)
        self.adapter_conv.reset_parameters()

    def forward(self, x: Tensor, y: Tensor, layout: TokenLayout) -> Tensor:
        """(B, N, d), (B, N, d) -> (B, N, d), N = extra tokens + H * W"""
        extra = layout.num_extra_tokens
        tokens = y[:, extra:] if extra else y
        if current() is None:
            u = self.norm(tokens) * self.gamma + tokens * self.gammax
            # (B, H*W, dim) -> (B, dim, H, W) and back
            t = self.adapter_conv(layout.to_grid(self.project1(u)))
            t = self.dropout(F.gelu(layout.to_tokens(t)))
            tokens = tokens + self.project2(t)
        else:
            tokens = self._rearranged(tokens, layout)
        return torch.cat([y[:, :extra], tokens], dim=1) if extra else tokens

    def _rearranged(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """The same, with less to keep: the norm is part of the projection,
        and the four convolutions are two (see :class:`FoldedMona`)."""
        norm = (self.norm.weight * self.gamma, self.norm.bias * self.gamma,
                self.gammax, self.norm.eps)
        return filtered_bottleneck(tokens, norm, self.project1,
                                   fold_op(self.adapter_conv), self.dropout,
                                   self.project2, layout.hw_shape)

    def folded(self) -> FoldedMona:
        return FoldedMona(self)
