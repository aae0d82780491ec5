"""Parts of a small pyramid beside a backbone."""
import math
from typing import Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..errors import PEFTError

__all__ = [
    'Map', 'PyramidBlock', 'check_depths', 'convs', 'reset_layers', 'stem'
]


class Map(nn.Module):
    """A convolution and a norm: a map (B, C, H, W) -> (B, N, dims), (H, W).

    Args:
        conv (nn.Module): Makes the map.
        dims (int): Its channels.
    """

    def __init__(self, conv: nn.Module, dims: int) -> None:
        super().__init__()
        self.conv = conv
        self.norm = nn.LayerNorm(dims)

    def forward(self, x: Tensor) -> Tuple[Tensor, Tuple[int, int]]:
        x = self.conv(x)
        return self.norm(x.flatten(2).transpose(1, 2)), tuple(x.shape[2:])


def convs(*widths: int) -> list:
    """3 x 3 convolutions with BatchNorm and ReLU, the first of stride 2."""
    layers = []
    for i, (before, after) in enumerate(zip(widths, widths[1:])):
        layers += [
            nn.Conv2d(
                before, after, 3, stride=1 if i else 2, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True)
        ]
    return layers


def stem(dims: int) -> nn.Sequential:
    """An image to a map of a quarter of its size."""
    return nn.Sequential(*convs(3, dims), nn.Conv2d(dims, dims, 2, stride=2))


def reset_layers(network: nn.Module) -> None:
    """Initialise linear layers, convolutions and norms as dense heads do."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            fan_out = module.out_channels * math.prod(module.kernel_size)
            std = math.sqrt(2. * module.groups / fan_out)
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module,
                        (nn.LayerNorm, nn.BatchNorm2d, nn.SyncBatchNorm)):
            module.reset_parameters()


class PyramidBlock(nn.Module):
    """A block of the pyramid, beside one of the backbone::

        m <- m + attention(norm1(m); t)        queries of m, the rest of t
        m <- m + z
        m <- m + mlp(norm2(m))

    with the feature map ``z`` of the block, and ``t`` its token and the mean
    of ``z``.

    Args:
        dims (int): Width ``w``.
        num_heads (int): Heads of its attention.
        mlp_ratio (float): Hidden channels of its MLP, as a multiple.
    """

    def __init__(self, dims: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dims, eps=1e-6)
        self.q = nn.Linear(dims, dims)
        self.k = nn.Linear(dims, dims)
        self.v = nn.Linear(dims, dims)
        self.proj = nn.Linear(dims, dims)
        self.norm2 = nn.LayerNorm(dims, eps=1e-6)
        self.fc1 = nn.Linear(dims, int(dims * mlp_ratio))
        self.fc2 = nn.Linear(int(dims * mlp_ratio), dims)

    def forward(self, m: Tensor, z: Tensor, token: Tensor) -> Tensor:
        """(B, N, w), (B, N, w), (B, p, w) -> (B, N, w)"""
        seen = torch.cat([token, z.mean(dim=1, keepdim=True)], dim=1)
        q, k, v = (
            t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for t in (self.q(self.norm1(m)), self.k(seen), self.v(seen)))
        weights = (q @ k.transpose(-2, -1) * q.shape[-1]**-.5).softmax(-1)
        branch = (weights @ v).transpose(1, 2).flatten(2)
        m = m + self.proj(branch) + z
        return m + self.fc2(F.gelu(self.fc1(self.norm2(m))))


def check_depths(owner: str,
                 count: int,
                 levels: int,
                 depths: Optional[Sequence[int]],
                 advice: str = '') -> Sequence[int]:
    """Blocks of the backbone beside each level; what is left over goes to the
    first ones, and what does not fit is refused.

    Args:
        owner (str): The method.
        count (int): Blocks that it runs beside.
        levels (int): Levels.
        depths (Sequence[int], optional): As asked for.
        advice (str): What to do if there are too few blocks.
    """
    if count < levels:
        raise PEFTError(f'{owner}: {levels} levels need as many blocks at '
                        f'least, and it runs beside {count}{advice}.')
    if depths is None:
        return [count // levels + (i < count % levels) for i in range(levels)]
    if len(depths) != levels or sum(depths) != count or min(depths) < 1:
        raise PEFTError(f'{owner}: depths={tuple(depths)} must be {levels} '
                        f'numbers above 0 whose sum is {count}, the blocks '
                        'it runs beside.')
    return depths
