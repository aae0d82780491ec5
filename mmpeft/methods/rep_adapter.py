from typing import Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..errors import PEFTError
from ..registry import METHODS
from ..sites import Site, TokenLayout
from .base import PEFTModule, check_positive, check_rate, check_width

__all__ = ['RepAdapter']

PLACEMENTS = dict(block=('qkv_input', 'fc1_input'), attn=('qkv_input', ))


@METHODS.register_module()
class RepAdapter(PEFTModule):
    """A linear bottleneck before the attention and before the MLP.

    `Towards Efficient Visual Adaption via Structural Re-parameterization
    <https://arxiv.org/abs/2302.08106>`_ (arXiv 2023)::

        x <- x + scale * (B dropout(A x + a) + b)

    where B is block-diagonal: group i of the channels is computed from group
    i of the bottleneck. It starts at the identity, and it merges into the
    linear layer that follows.

    The paper has it after the norms. Here it is at the input of the linear
    layers, which is the same, except for the tokens that pad a map which
    windows do not divide: they pass through it too. Otherwise what they give
    to the attention could not be merged, since a linear layer cannot tell pad
    tokens from others.

    Args:
        site (Site): Where it is attached; gives the width ``d``.
        dim (int): Channels of the bottleneck. Defaults to 8.
        groups (int): Groups of B; divides ``dim`` and ``d``. Defaults to 2.
        scale (float): Factor of the bottleneck; the paper picks one of .1,
            .5, 1, 5, 10 for each task. Defaults to 1.
        drop_rate (float): Dropout probability in the bottleneck, in [0, 1).
            Defaults to 0.1.
        placement (str): ``'block'``, before attention and MLP, or ``'attn'``,
            before attention only. Defaults to ``'block'``.

    Raises:
        PEFTError: If ``dim`` exceeds the width, ``groups`` does not divide
            both, or for an unknown placement.
    """

    no_merge = None

    def __init__(self,
                 site: Site,
                 dim: int = 8,
                 groups: int = 2,
                 scale: float = 1.,
                 drop_rate: float = 0.1,
                 placement: str = 'block') -> None:
        super().__init__(site)
        dims = site.embed_dims
        check_width('RepAdapter', 'dim', dim, dims)
        self.groups = check_width('RepAdapter', 'groups', groups, dims)
        if dim % groups or dims % groups:
            raise PEFTError(f'RepAdapter: groups={groups} does not divide '
                            f'dim={dim} and the width {dims} of the layer it '
                            'is attached to; use a common divisor.')
        self.scale = check_positive('RepAdapter', 'scale', scale)
        self.down = nn.Linear(dims, dim)
        self.dropout = nn.Dropout(
            check_rate('RepAdapter', 'drop_rate', drop_rate))
        # Bare, as only the blocks on the diagonal are parameters.
        self.up_weight = nn.Parameter(torch.empty(dims, dim // groups))
        self.up_bias = nn.Parameter(torch.empty(dims))
        self.reset_parameters()

    @classmethod
    def sites_for(cls, placement: str = 'block', **kwargs) -> Sequence[str]:
        if placement not in PLACEMENTS:
            raise PEFTError(f'RepAdapter: unknown placement {placement!r}; '
                            f'use one of {", ".join(PLACEMENTS)}.')
        return PLACEMENTS[placement]

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.down.weight)
        for tensor in (self.down.bias, self.up_weight, self.up_bias):
            nn.init.zeros_(tensor)

    def _up(self, dtype: torch.dtype) -> Tensor:
        """(d, dim), zero outside the blocks."""
        return torch.block_diag(*self.up_weight.to(dtype).chunk(self.groups))

    def forward(self, x: Tensor, y: Tensor, layout: TokenLayout) -> Tensor:
        """(..., d), (..., d) -> (..., d)"""
        hidden = self.dropout(self.down(y))
        update = F.linear(hidden, self._up(hidden.dtype), self.up_bias)
        return y + self.scale * update

    def merge(self, weight: Tensor,
              bias: Optional[Tensor]) -> Tuple[Tensor, Optional[Tensor]]:
        up = self._up(weight.dtype)
        # W (x + s (B (A x + a) + b)) = (W + s W B A) x + s W (B a + b)
        shift = up @ self.down.bias.to(weight) + self.up_bias.to(weight)
        shift = self.scale * (weight @ shift)
        weight = weight + self.scale * (
            weight @ up @ self.down.weight.to(weight))
        return weight, shift if bias is None else bias + shift
