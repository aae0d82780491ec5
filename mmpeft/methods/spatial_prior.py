"""The convolutions of ViT-Adapter, which see the image."""
from typing import Tuple

import torch.nn as nn
from torch import Tensor

from .pyramid import convs

__all__ = ['SpatialPrior']


class SpatialPrior(nn.Module):
    """An image to four maps of 1/4, 1/8, 1/16 and 1/32 of its size.

    Sizes that these do not divide are rounded up.

    Args:
        inplanes (int): Channels of the first convolutions; those of the
            others are 2, 4 and 4 times as many.
        dims (int): Channels of the maps.
    """

    def __init__(self, inplanes: int, dims: int) -> None:
        super().__init__()
        n = inplanes
        self.stages = nn.ModuleList([
            nn.Sequential(*convs(3, n, n, n),
                          nn.MaxPool2d(3, stride=2, padding=1)),
            nn.Sequential(*convs(n, 2 * n)),
            nn.Sequential(*convs(2 * n, 4 * n)),
            nn.Sequential(*convs(4 * n, 4 * n))
        ])
        self.projs = nn.ModuleList(
            nn.Conv2d(factor * n, dims, 1) for factor in (1, 2, 4, 4))

    def forward(self, image: Tensor) -> Tuple[Tensor, ...]:
        """(B, 3, H, W) -> four of (B, d, H', W')"""
        maps, x = [], image
        for stage, proj in zip(self.stages, self.projs):
            x = stage(x)
            maps.append(proj(x))
        return tuple(maps)
