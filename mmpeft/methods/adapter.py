from typing import Sequence

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..errors import PEFTError
from ..ops import activate
from ..registry import METHODS
from ..sites import Site, TokenLayout
from .base import (MONA_RECIPE, PEFTModule, check_positive, check_rate,
                   check_width)

__all__ = ['Adapter']

PLACEMENTS = dict(
    houlsby=('attn_branch', 'ffn_branch'), pfeiffer=('ffn_branch', ))


@METHODS.register_module()
class Adapter(PEFTModule):
    """Bottleneck with a skip connection on the output of a sublayer.

    `Parameter-Efficient Transfer Learning for NLP
    <https://arxiv.org/abs/1902.00751>`_ (ICML 2019)::

        y <- y + W2 gelu(W1 y + b1) + b2

    It sits inside the residual branch, before drop-path. The paper starts
    near the identity (std 1e-3). The dense code released with Mona uses
    ``init_std=0.02`` and ``drop_rate=0.1``, which is not an identity.

    Args:
        site (Site): Where it is attached; gives the width ``d``.
        dim (int): Channels of the bottleneck. Defaults to 64.
        placement (str): ``'houlsby'``, after attention and after the MLP, or
            ``'pfeiffer'``, after the MLP only. Defaults to ``'houlsby'``.
        drop_rate (float): Dropout probability after GELU, in [0, 1).
            Defaults to 0.
        init_std (float): Standard deviation of the truncated normal that
            both matrices start from, above 0: with a zero up-projection the
            down-projection would get no gradient at first. Defaults to 1e-3.

    Raises:
        PEFTError: If ``dim`` exceeds the width, for an unknown placement, or
            an ``init_std`` that is not above 0.
    """

    recipe_lr = MONA_RECIPE
    sites = PLACEMENTS['houlsby']

    def __init__(self,
                 site: Site,
                 dim: int = 64,
                 placement: str = 'houlsby',
                 drop_rate: float = 0.,
                 init_std: float = 1e-3) -> None:
        super().__init__(site)
        check_width('Adapter', 'dim', dim, site.embed_dims)
        self.init_std = check_positive('Adapter', 'init_std', init_std)
        self.down = nn.Linear(site.embed_dims, dim)
        self.dropout = nn.Dropout(
            check_rate('Adapter', 'drop_rate', drop_rate))
        self.up = nn.Linear(dim, site.embed_dims)
        self.reset_parameters()

    @classmethod
    def sites_for(cls, placement: str = 'houlsby', **kwargs) -> Sequence[str]:
        if placement not in PLACEMENTS:
            raise PEFTError(f'Adapter: unknown placement {placement!r}; use '
                            f'one of {", ".join(PLACEMENTS)}.')
        return PLACEMENTS[placement]

    def reset_parameters(self) -> None:
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(
                linear.weight,
                std=self.init_std,
                a=-2 * self.init_std,
                b=2 * self.init_std)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, y: Tensor, layout: TokenLayout) -> Tensor:
        """(B, N, d), (B, N, d) -> (B, N, d)"""
        hidden = activate(F.gelu, self.down(y), self.dropout)
        return y + self.up(hidden)
