from typing import Any, Optional, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from ..registry import METHODS
from ..sites import Site, TokenLayout
from .adaptformer import AdaptFormer
from .base import PEFTModule, check_positive, check_width
from .low_rank import QKV_PARTS, RowModule, check_targets

__all__ = ['BAPAT']


@METHODS.register_module()
class BAPAT(RowModule):
    """Parallel attention: a bottleneck that adds to keys and values, and an
    AdaptFormer.

    `Towards a Unified View on Visual Parameter-Efficient Transfer Learning
    <https://arxiv.org/abs/2210.00788>`_ (2022; PATT in its code, BAPAT in
    V-PETL Bench)::

        [k, v] <- [k, v] + scale * (W2 tanh(W1 x + b1) + b2)
        mlp(x) <- mlp(x) + 0.1 * (U2 relu(U1 x + c1) + c2)

    ``x`` is what the projection and the MLP themselves receive, behind the
    norm, and pad tokens of Swin windows pass the first line, too. Unlike in
    :class:`AdaptFormer` the second branch so lies inside drop-path and is fed
    by the normed stream. As in the released code W1, W2 start like any linear
    layer of PyTorch, which is not an identity, and U2 from zero.

    Defaults are those of the released command; its parser has ``dim=64,
    scale=0.2``, and a mode that runs attention without softmax when no other
    is named.

    Args:
        site (Site): Where it is attached; gives the width ``d``.
        dim (int): Channels of the bottleneck. Defaults to 128.
        scale (float): Factor of what is added. Defaults to 0.8.
        targets (Sequence[str]): Any of q, k, v, the released modes.
            Defaults to ``('k', 'v')``.
        adaptformer_dim (int, optional): Channels of the AdaptFormer's
            bottleneck; None leaves it out. Defaults to 64.

    Raises:
        PEFTError: For an unknown target, a ``dim`` above the width of the
            targets, an ``adaptformer_dim`` above ``d``, or a ``scale`` that
            is not above 0.
    """

    key = 'bapat'
    sites = ('qkv', 'ffn_parallel')
    no_merge = PEFTModule.no_merge

    def __init__(self,
                 site: Site,
                 dim: int = 128,
                 scale: float = 0.8,
                 targets: Sequence[str] = ('k', 'v'),
                 adaptformer_dim: Optional[int] = 64) -> None:
        super().__init__(site, targets)
        width = sum(self.sizes)
        # Wider than one part may be: it is narrow beside what it makes.
        check_width('BAPAT', 'dim', dim, width)
        self.scale = check_positive('BAPAT', 'scale', scale)
        self.down = nn.Linear(site.in_dims, dim)
        self.up = nn.Linear(dim, width)
        self.reset_parameters()

    @classmethod
    def sites_for(cls,
                  targets: Sequence[str] = ('k', 'v'),
                  adaptformer_dim: Optional[int] = 64,
                  **kwargs: Any) -> Sequence[str]:
        check_targets('BAPAT', targets, QKV_PARTS)
        return cls.sites[:1] if adaptformer_dim is None else cls.sites

    @classmethod
    def build(cls,
              site: Site,
              adaptformer_dim: Optional[int] = 64,
              **kwargs: Any) -> PEFTModule:
        """This at the projection, an AdaptFormer at the MLP."""
        if site.name != 'ffn_parallel':
            return cls(site, **kwargs)
        check_width('BAPAT', 'adaptformer_dim', adaptformer_dim,
                    site.embed_dims)
        return AdaptFormer(site, dim=adaptformer_dim, drop_rate=0.)

    def reset_parameters(self) -> None:
        self.down.reset_parameters()
        self.up.reset_parameters()

    def forward(self, x: Tensor, y: Tensor, layout: TokenLayout) -> Tensor:
        """(..., d), (..., 3 * d) -> (..., 3 * d)"""
        added = self.scale * self.up(torch.tanh(self.down(x)))
        return self.add(y, added.split(self.sizes, -1))
