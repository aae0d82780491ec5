import math
from typing import Optional

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..errors import PEFTError
from ..ops import activate
from ..recompute import recomputed
from ..registry import METHODS
from ..sites import Site, TokenLayout
from .base import (MONA_RECIPE, PEFTModule, check_positive, check_rate,
                   check_width)

__all__ = ['AdaptFormer']

ACTIVATIONS = dict(relu=F.relu, gelu=F.gelu)


@METHODS.register_module()
class AdaptFormer(PEFTModule):
    """Bottleneck parallel to the MLP, fed by the stream before its norm.

    `AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition
    <https://arxiv.org/abs/2205.13535>`_ (NeurIPS 2022)::

        x <- x + drop_path(mlp(norm2(x))) + scale * (W2 relu(W1 x + b1) + b2)

    The branch is added outside drop-path. It starts at the identity. The
    dense code released with Mona uses ``act='gelu', init_std=0.02``, which is
    not an identity; the published dense counts (3.11 M in Swin-B) are those
    of two modules in each block, not of the one that code has.

    Args:
        site (Site): Where it is attached; gives the width ``d``.
        dim (int): Channels of the bottleneck. Defaults to 64.
        scale (float): Factor of the branch. Defaults to 0.1.
        drop_rate (float): Dropout probability after the activation, in
            [0, 1). Defaults to 0.1.
        act (str): ``'relu'`` or ``'gelu'``. Defaults to ``'relu'``.
        norm (bool): Whether the branch has a LayerNorm of its own at its
            input. Defaults to False.
        init_std (float, optional): If given, both matrices start from a
            truncated normal of this standard deviation; None means
            Kaiming-uniform down and zero up. Defaults to None.

    Raises:
        PEFTError: If ``dim`` exceeds the width, for an unknown ``act``, or a
            ``scale`` or ``init_std`` that is not above 0.
    """

    recipe_lr = MONA_RECIPE
    key = 'adaptformer'
    # Not 'ffn_branch': that one lies inside drop-path.
    sites = ('ffn_residual', )

    def __init__(self,
                 site: Site,
                 dim: int = 64,
                 scale: float = 0.1,
                 drop_rate: float = 0.1,
                 act: str = 'relu',
                 norm: bool = False,
                 init_std: Optional[float] = None) -> None:
        super().__init__(site)
        check_width('AdaptFormer', 'dim', dim, site.embed_dims)
        if act not in ACTIVATIONS:
            raise PEFTError(f'AdaptFormer: unknown act {act!r}; use one of '
                            f'{", ".join(ACTIVATIONS)}.')
        self.scale = check_positive('AdaptFormer', 'scale', scale)
        self.act = act
        self.init_std = init_std
        if init_std is not None:
            check_positive('AdaptFormer', 'init_std', init_std)
        self.norm = nn.LayerNorm(site.embed_dims) if norm else nn.Identity()
        self.down = nn.Linear(site.embed_dims, dim)
        self.dropout = nn.Dropout(
            check_rate('AdaptFormer', 'drop_rate', drop_rate))
        self.up = nn.Linear(dim, site.embed_dims)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if isinstance(self.norm, nn.LayerNorm):
            self.norm.reset_parameters()
        if self.init_std is None:
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            nn.init.zeros_(self.up.weight)
        else:
            nn.init.trunc_normal_(self.down.weight, std=self.init_std)
            nn.init.trunc_normal_(self.up.weight, std=self.init_std)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, y: Tensor, layout: TokenLayout) -> Tensor:
        """(B, N, d), (B, N, d) -> (B, N, d)"""
        hidden = self.down(recomputed(self.norm, x))
        hidden = activate(ACTIVATIONS[self.act], hidden, self.dropout)
        return y + self.scale * self.up(hidden)
