from typing import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..errors import PEFTError
from ..registry import METHODS
from ..sites import Site, TokenLayout
from .base import PEFTModule, check_positive, check_rate, check_width

__all__ = ['Convpass']

PLACEMENTS = dict(
    block=('attn_parallel', 'ffn_parallel'), attn=('attn_parallel', ))
CONV_INITS = ('xavier', 'delta')


def quick_gelu(x: Tensor) -> Tensor:
    """The activation of the released code."""
    return x * torch.sigmoid(1.702 * x)


@METHODS.register_module()
class Convpass(PEFTModule):
    """A convolutional bottleneck parallel to the attention and to the MLP.

    `Convolutional Bypasses Are Better Vision Transformer Adapters
    <https://arxiv.org/abs/2207.07039>`_ (ECAI 2024)::

        y <- y + scale * (W2 dropout(q(Conv3x3 q(W1 x + b1))) + b2)

    with x the tokens after the norm, and q a quick GELU. The convolution sees
    the whole H x W map, not windows; a class or register token passes it as a
    map of 1 x 1, as in the released code. It starts at the identity. It lies
    inside drop-path and is dropped together with the branch beside it, where
    the released code draws once for each of the two.

    Args:
        site (Site): Where it is attached; gives the width ``d``.
        dim (int): Channels of the bottleneck. Defaults to 8.
        scale (float): Factor of the bottleneck; the paper picks one of .01,
            .1, 1, 10, 100 for each task. Defaults to 1.
        drop_rate (float): Dropout probability before W2, in [0, 1).
            Defaults to 0.1.
        conv_init (str): ``'xavier'``, as in most of the released configs, or
            ``'delta'``, a convolution that passes its input.
            Defaults to ``'xavier'``.
        placement (str): ``'block'``, beside attention and MLP, or ``'attn'``,
            beside attention only. Defaults to ``'block'``.

    Raises:
        SiteError: If the tokens of the backbone form no grid.
        PEFTError: If ``dim`` exceeds the width, for an unknown ``conv_init``
            or placement, or a ``scale`` that is not above 0.
    """

    needs_grid = True
    moves_extra = True

    def __init__(self,
                 site: Site,
                 dim: int = 8,
                 scale: float = 1.,
                 drop_rate: float = 0.1,
                 conv_init: str = 'xavier',
                 placement: str = 'block') -> None:
        super().__init__(site)
        check_width('Convpass', 'dim', dim, site.embed_dims)
        self.scale = check_positive('Convpass', 'scale', scale)
        if conv_init not in CONV_INITS:
            raise PEFTError(f'Convpass: unknown conv_init {conv_init!r}; use '
                            f'one of {", ".join(CONV_INITS)}.')
        self.conv_init = conv_init
        self.down = nn.Linear(site.embed_dims, dim)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)
        self.dropout = nn.Dropout(
            check_rate('Convpass', 'drop_rate', drop_rate))
        self.up = nn.Linear(dim, site.embed_dims)
        self.reset_parameters()

    @classmethod
    def sites_for(cls, placement: str = 'block', **kwargs) -> Sequence[str]:
        if placement not in PLACEMENTS:
            raise PEFTError(f'Convpass: unknown placement {placement!r}; use '
                            f'one of {", ".join(PLACEMENTS)}.')
        return PLACEMENTS[placement]

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.down.weight)
        if self.conv_init == 'xavier':
            nn.init.xavier_uniform_(self.conv.weight)
        else:
            nn.init.dirac_(self.conv.weight)
        nn.init.zeros_(self.up.weight)
        for layer in (self.down, self.conv, self.up):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, y: Tensor, layout: TokenLayout) -> Tensor:
        """(B, N, d), (B, N, d) -> (B, N, d), N = extra tokens + H * W"""
        hidden = quick_gelu(self.down(x))
        extra = layout.num_extra_tokens
        # (B, H*W, dim) -> (B, dim, H, W) and back
        mixed = layout.to_tokens(self.conv(layout.to_grid(hidden[:, extra:])))
        if extra:
            # Of a 1 x 1 map with a margin of zeros only the centre is met.
            alone = F.linear(hidden[:, :extra], self.conv.weight[:, :, 1, 1],
                             self.conv.bias)
            mixed = torch.cat([alone, mixed], dim=1)
        return y + self.scale * self.up(self.dropout(quick_gelu(mixed)))
