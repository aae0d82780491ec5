import math
from dataclasses import dataclass
from typing import Dict, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..errors import PEFTError
from ..registry import METHODS
from ..sites import TokenLayout
from .base import check_positive, check_rate, check_width
from .deformable import DeformableAttention, Extractor, Injector, Sizes, split
from .pyramid import check_depths, reset_layers
from .side import SideNetwork, Trunk, TrunkBlock
from .spatial_prior import SpatialPrior

__all__ = ['ViTAdapter']

#: Groups of blocks, each of which gives to one of the maps.
GROUPS = 4


@dataclass
class State:
    """How far the pyramid is.

    Attributes:
        fine (Tensor): (B, d, H, W), the map of stride 4.
        c (Tensor): (B, N, d), tokens of those of stride 8, 16 and 32.
        sizes (tuple): Heights and widths of the latter.
        seen (tuple[Tensor]): (B, d, H, W), map of the backbone behind each
            group of blocks.
    """

    fine: Tensor
    c: Tensor
    sizes: Sizes
    seen: Tuple[Tensor, ...] = ()


@METHODS.register_module()
class ViTAdapter(SideNetwork):
    """A convolutional pyramid that exchanges with a ViT, and whose maps take
    the place of its outputs.

    `Vision Transformer Adapter for Dense Predictions
    <https://arxiv.org/abs/2205.08534>`_ (ICLR 2023). Convolutions make four
    maps of the image, with strides of 4, 8, 16 and 32 pixels; the tokens of
    the last three, with an embedding of their level, are ``c``. Around each of
    four groups of blocks::

        x <- x + gamma * attention(norm(x); norm(c))      before the first
        c <- c + attention(norm(c); norm(x))              behind the last
        c <- c + drop_path(W2 gelu(dw3x3(W1 norm(c))))

    with the tokens ``x`` of the map of the ViT, deformable attention and
    ``gamma = 0`` at the start; the last two lines stand there twice more
    behind the last group. The outputs are, with the maps ``x1`` to ``x4`` of
    the ViT behind the groups and ``c2`` to ``c4`` those of ``c``::

        norm(c1 + up(c2) + resize(x1)),    norm(ci + resize(xi)) for i > 1

    where ``norm`` is BatchNorm and ``up`` a transposed convolution. Class and
    register tokens are left as they are and are not read. Gradients pass
    through the backbone.

    In the paper the ViT trains, too, at a higher cost; here it stays frozen,
    and its authors say that this costs 1 to 2 points. The released code has
    SyncBN and needs images that 32 divides: here it is BatchNorm, which a
    config synchronises by ``sync_bn='torch'``, and sizes are rounded up, so
    that on other images the maps lie up to a token apart at the far edges.
    Points are read by ``grid_sample``, on every device.

    Args:
        trunk (Trunk): What it runs beside.
        inplanes (int): Channels of the first convolutions. Defaults to 64.
        num_heads (int): Heads of the attention. Defaults to 12, as released
            for ViT-B; for ViT-T and -S that is 6, for ViT-L 16.
        num_points (int): Points that a head reads in each map. Defaults to 4.
        deform_ratio (float): Width of the values of the attention, as a
            multiple of that of the ViT. Defaults to 0.5, as released for
            ViT-B and -L; else that is 1.
        ffn_ratio (float): Channels of the convolution behind the attention,
            as a multiple of the width of the ViT. Defaults to 0.25.
        depths (Sequence[int], optional): Blocks in the four groups, together
            as many as the backbone has. Defaults to None, as many in each;
            what is left over goes to the first ones.
        drop_path_rate (float): Probability that a sample skips a convolution
            behind the attention. Defaults to 0.3, as released for ViT-B.
        with_cp (bool): Whether backward computes attention and convolutions
            of the exchange again instead of keeping what is inside. Defaults
            to True.

    Raises:
        SiteError: If the backbone is a pyramid itself, or has no grid.
        PEFTError: If ``num_heads`` does not divide the width of the values,
            ``depths`` do not fit the backbone, or a number is out of range.
    """

    key = 'vit_adapter'
    detaches = False
    joins_outputs = False
    enters = True
    replaces_outputs = True
    reads_image = True
    needs_grid = True
    one_stage = True

    def __init__(self,
                 trunk: Trunk,
                 inplanes: int = 64,
                 num_heads: int = 12,
                 num_points: int = 4,
                 deform_ratio: float = .5,
                 ffn_ratio: float = .25,
                 depths: Optional[Sequence[int]] = None,
                 drop_path_rate: float = .3,
                 with_cp: bool = True) -> None:
        super().__init__(trunk)
        dims = trunk.blocks[0].embed_dims
        for name, value in dict(
                inplanes=inplanes, num_heads=num_heads,
                num_points=num_points).items():
            check_width('ViTAdapter', name, value, math.inf)
        inner = narrowed('deform_ratio', deform_ratio, dims)
        hidden = narrowed('ffn_ratio', ffn_ratio, dims)
        check_rate('ViTAdapter', 'drop_path_rate', drop_path_rate)
        if inner % num_heads:
            raise PEFTError(
                f'ViTAdapter: {num_heads} heads do not divide the width '
                f'{inner} of the values, which is deform_ratio={deform_ratio} '
                f'of {dims}; choose other num_heads or deform_ratio.')
        depths = check_depths('ViTAdapter', len(trunk.blocks), GROUPS, depths)
        self.out_channels = (dims, ) * GROUPS
        # By block, the number of the group that begins or ends there.
        ends = [sum(depths[:i + 1]) for i in range(GROUPS)]
        numbers = [b.index for b in trunk.blocks]
        self.firsts = {
            numbers[e - n]: i
            for i, (e, n) in enumerate(zip(ends, depths))
        }
        self.lasts = {numbers[e - 1]: i for i, e in enumerate(ends)}

        def attention(num_levels: int) -> DeformableAttention:
            return DeformableAttention(dims, inner, num_heads, num_points,
                                       num_levels)

        self.prior = SpatialPrior(inplanes, dims)
        self.level_embed = nn.Parameter(torch.empty(3, dims))
        self.injectors = nn.ModuleList(
            Injector(attention(3), dims, with_cp) for _ in range(GROUPS))
        self.extractors = nn.ModuleList(
            Extractor(attention(1), dims, hidden, drop_path_rate, with_cp)
            for _ in range(GROUPS + 2))
        self.up = nn.ConvTranspose2d(dims, dims, 2, stride=2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(dims) for _ in range(GROUPS))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.level_embed)
        reset_layers(self)
        for injector in self.injectors:
            nn.init.zeros_(injector.gamma)
        # Linear layers with a start of their own.
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()

    def start(self, x: Tensor, layout: TokenLayout, image: Tensor) -> State:
        fine, *maps = self.prior(image)
        sizes = tuple((m.shape[2], m.shape[3]) for m in maps)
        c = [
            TokenLayout.to_tokens(m) + embed
            for m, embed in zip(maps, self.level_embed)
        ]
        return State(fine, torch.cat(c, dim=1), sizes)

    def enter(self, u: State, block: TrunkBlock, x: Tensor,
              layout: TokenLayout) -> Tensor:
        if block.index not in self.firsts:
            return x
        injector = self.injectors[self.firsts[block.index]]
        extra = layout.num_extra_tokens
        grid = injector(x[:, extra:], u.c, layout.hw_shape, u.sizes)
        return torch.cat([x[:, :extra], grid], dim=1)

    def step(self, u: State, block: TrunkBlock, x: Tensor, y: Tensor,
             taps: Dict[str, Tensor], layout: TokenLayout) -> State:
        if block.index not in self.lasts:
            return u
        group, c = self.lasts[block.index], u.c
        y = y[:, layout.num_extra_tokens:]
        count = 3 if group == GROUPS - 1 else 1
        for extractor in self.extractors[group:group + count]:
            c = extractor(c, y, u.sizes, layout.hw_shape)
        return State(u.fine, c, u.sizes, (*u.seen, layout.to_grid(y)))

    def outputs(self, u: State) -> Tuple[Tensor, ...]:
        maps = [u.fine, *split(u.c, u.sizes)]
        # One row or column too many where a size was rounded up.
        height, width = u.fine.shape[2:]
        maps[0] = u.fine + self.up(maps[1])[..., :height, :width]
        return tuple(
            norm(m + F.interpolate(
                x, size=m.shape[2:], mode='bilinear', align_corners=False))
            for norm, m, x in zip(self.norms, maps, u.seen))


def narrowed(name: str, ratio: float, dims: int) -> int:
    """A part of the width of the ViT, 1 at least."""
    inner = int(dims * check_positive('ViTAdapter', name, ratio))
    if inner < 1:
        raise PEFTError(f'ViTAdapter: {name}={ratio} of the width {dims} is '
                        f'less than 1; use {1 / dims} at least.')
    return inner
