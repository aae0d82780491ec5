import math
from dataclasses import dataclass
from typing import Dict, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..errors import PEFTError
from ..registry import METHODS
from ..sites import Site, TokenLayout
from .base import PEFTModule, check_positive, check_width
from .highway import recompute
from .pyramid import Map, PyramidBlock, check_depths, reset_layers, stem
from .side import SideNetwork, Trunk, TrunkBlock

__all__ = ['HST', 'MetaToken']


class MetaToken(PEFTModule):
    """A learned token that stands beside those of one block, and is read
    behind it.

    Args:
        site (Site): Where it is attached; gives the width.
    """

    sites = ('tokens', )
    asks = True
    no_merge = 'it joins the attention'

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.token = nn.Parameter(torch.empty(1, 1, site.embed_dims))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.token)

    def forward(self, x: Tensor, y: Tensor, layout: TokenLayout) -> Tensor:
        """(B, N, d), (B, p, d) -> (B, p + 1, d)"""
        return torch.cat([y, self.token.expand(len(x), -1, -1)], dim=1)


@dataclass
class State:
    """How far the pyramid is.

    Attributes:
        image (Tensor): What the backbone got.
        m (Tensor, optional): (B, N, w), tokens of the level.
        hw_shape (tuple[int, int], optional): Size of their map.
        maps (tuple[Tensor]): The levels that are done, (B, w, H, W).
    """

    image: Tensor
    m: Optional[Tensor] = None
    hw_shape: Optional[Tuple[int, int]] = None
    maps: Tuple[Tensor, ...] = ()


@METHODS.register_module()
class HST(SideNetwork):
    """A pyramid beside a ViT, whose maps take the place of its outputs.

    `Hierarchical Side-Tuning for Vision Transformers
    <https://arxiv.org/abs/2310.05393>`_ (2023). Each block of the backbone
    gets a learned token, which is read and dropped behind it, and has a block
    of the pyramid beside it::

        t = norm(D token),    z = resize(D y)
        m <- block(m, z, t)

    with the map ``y`` that leaves the block. There are four levels with
    strides of 4, 8, 16 and 32 pixels; the first begins with a small stem on
    the image, each other one with a convolution of stride 2; ``D`` is one
    layer for each level. The norms of the backbone's blocks train, too.
    Gradients pass through the backbone.

    ``D`` comes before the resizing, which is the same in fewer operations.

    Args:
        trunk (Trunk): What it runs beside.
        dims (Sequence[int]): Widths of the levels; these are the channels of
            the outputs. Defaults to (32, 48, 64, 72).
        num_heads (Sequence[int]): Heads in the levels. Defaults to
            (2, 4, 8, 12).
        depths (Sequence[int], optional): Blocks in the levels, together as
            many as the backbone has. Defaults to None, as many in each; what
            is left over goes to the first ones.
        mlp_ratio (float): Hidden channels of the MLPs, as a multiple of
            their width. Defaults to 4.
        with_cp (bool): Whether backward computes the blocks of the pyramid
            again instead of keeping what is inside. Defaults to True.

    Raises:
        SiteError: If the backbone is a pyramid itself, or has no grid.
        PEFTError: If ``dims``, ``num_heads`` and ``depths`` do not fit each
            other or the backbone.
    """

    key = 'hst'
    attached = {'tokens': MetaToken}
    taps = ('tokens', )
    trained_norms = ('norm1', 'norm2')
    detaches = False
    joins_outputs = False
    replaces_outputs = True
    reads_image = True
    needs_grid = True
    one_stage = True

    def __init__(self,
                 trunk: Trunk,
                 dims: Sequence[int] = (32, 48, 64, 72),
                 num_heads: Sequence[int] = (2, 4, 8, 12),
                 depths: Optional[Sequence[int]] = None,
                 mlp_ratio: float = 4.,
                 with_cp: bool = True) -> None:
        super().__init__(trunk)
        depths = check_levels(len(trunk.blocks), dims, num_heads, depths)
        check_positive('HST', 'mlp_ratio', mlp_ratio)
        self.out_channels = tuple(dims)
        self.with_cp = with_cp
        wide = trunk.blocks[0].embed_dims
        # By block, its level; the first and the last of a level.
        levels = [i for i, n in enumerate(depths) for _ in range(n)]
        numbers = [b.index for b in trunk.blocks]
        self.levels = dict(zip(numbers, levels))
        self.firsts = {numbers[levels.index(i)] for i in range(len(dims))}
        self.lasts = {
            numbers[len(levels) - 1 - levels[::-1].index(i)]
            for i in range(len(dims))
        }
        convs = [stem(dims[0])] + [
            nn.Conv2d(before, after, 3, stride=2, padding=1)
            for before, after in zip(dims, dims[1:])
        ]
        self.embeds = nn.ModuleList(map(Map, convs, dims))
        self.bridges = nn.ModuleList(nn.Linear(wide, w) for w in dims)
        self.norms = nn.ModuleList(nn.LayerNorm(w, eps=1e-6) for w in dims)
        self.token_norms = nn.ModuleDict({
            str(n): nn.LayerNorm(dims[i])
            for n, i in self.levels.items()
        })
        self.blocks = nn.ModuleDict({
            str(n):
            PyramidBlock(dims[i], num_heads[i], mlp_ratio)
            for n, i in self.levels.items()
        })
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_layers(self)

    def start(self, x: Tensor, layout: TokenLayout, image: Tensor) -> State:
        return State(image)

    def step(self, u: State, block: TrunkBlock, x: Tensor, y: Tensor,
             taps: Dict[str, Tensor], layout: TokenLayout) -> State:
        level, key = self.levels[block.index], str(block.index)
        bridge, m, hw_shape = self.bridges[level], u.m, u.hw_shape
        if block.index in self.firsts:
            before = u.maps[-1] if u.maps else u.image
            m, hw_shape = self.embeds[level](before)
        z = layout.to_grid(bridge(y[:, layout.num_extra_tokens:]))
        z = F.interpolate(
            z, size=hw_shape, mode='bilinear', align_corners=False)
        token = self.token_norms[key](bridge(taps['tokens']))
        m = recompute(self.with_cp, self.blocks[key], m, layout.to_tokens(z),
                      token)
        maps = u.maps
        if block.index in self.lasts:
            grid = TokenLayout(hw_shape).to_grid(self.norms[level](m))
            maps += (grid.contiguous(), )
        return State(u.image, m, hw_shape, maps)

    def outputs(self, u: State) -> Tuple[Tensor, ...]:
        return u.maps


def check_levels(count: int, dims: Sequence[int], num_heads: Sequence[int],
                 depths: Optional[Sequence[int]]) -> Sequence[int]:
    """Blocks in each level; refuse what does not fit together."""
    for width, heads in zip(dims, num_heads):
        check_width('HST', 'dims', width, math.inf)
        check_width('HST', 'num_heads', heads, width)
        if width % heads:
            raise PEFTError(f'HST: {heads} heads do not divide the width '
                            f'{width} of their level.')
    levels = len(dims)
    if not levels or len(num_heads) != levels:
        raise PEFTError(f'HST: dims={tuple(dims)} are {levels} levels, and '
                        f'num_heads={tuple(num_heads)} are '
                        f'{len(num_heads)}; give one for each level.')
    return check_depths('HST', count, levels, depths,
                        '; give fewer dims and num_heads')
