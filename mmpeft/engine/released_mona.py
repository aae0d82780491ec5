"""The module of the released Mona code, to compare ours with."""
from typing import Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

__all__ = ['ReleasedMona']


class ReleasedMona(nn.Module):
    """Mona, one operation after the other as the released code does them.

    Written from the formula; a baseline for measuring, never attached::

        u = gamma * LN(y) + gammax * y
        t = W1 u + b1                                as a map
        t = (DW3 t + DW5 t + DW7 t) / 3 + t
        t = t + C t + c
        y = y + W2 dropout(gelu(t)) + b2             as tokens

    Its parameters have the names and shapes of :class:`Mona`'s.

    Args:
        width (int): Channels of the tokens.
        dim (int): Channels of the bottleneck.
        drop_rate (float): Dropout probability.
    """

    def __init__(self, width: int, dim: int, drop_rate: float = .1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gamma = nn.Parameter(torch.full((width, ), 1e-6))
        self.gammax = nn.Parameter(torch.ones(width))
        self.project1 = nn.Linear(width, dim)
        self.adapter_conv = ReleasedOp(dim)
        self.dropout = nn.Dropout(drop_rate)
        self.project2 = nn.Linear(dim, width)

    def forward(self, y: Tensor, hw_shape: Tuple[int, int]) -> Tensor:
        """(B, H * W, width) -> the same"""
        u = self.norm(y) * self.gamma + y * self.gammax
        t = self.project1(u)
        batch, tokens, dim = t.shape
        # (B, H*W, dim) -> (B, dim, H, W) and back
        t = t.reshape(batch, *hw_shape, dim).permute(0, 3, 1, 2)
        t = self.adapter_conv(t)
        t = t.permute(0, 2, 3, 1).reshape(batch, tokens, dim)
        return y + self.project2(self.dropout(F.gelu(t)))


class ReleasedOp(nn.Module):
    """Three depthwise convolutions and a pointwise one, each with a skip.

    Args:
        dim (int): Channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.conv2 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.conv3 = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.projector = nn.Conv2d(dim, dim, 1)

    def forward(self, t: Tensor) -> Tensor:
        """(B, dim, H, W) -> the same"""
        t = (self.conv1(t) + self.conv2(t) + self.conv3(t)) / 3. + t
        return t + self.projector(t)
