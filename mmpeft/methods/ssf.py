from typing import Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..ops import scale_shift
from ..recipes import current
from ..registry import METHODS
from ..sites import Site, TokenLayout
from .base import LeadingModule

__all__ = ['SSF']


@METHODS.register_module()
class SSF(LeadingModule):
    """A scale and a shift for each channel, after every operation.

    `Scaling & Shifting Your Features: A New Baseline for Efficient Model
    Tuning <https://arxiv.org/abs/2210.08823>`_ (NeurIPS 2022)::

        y <- scale * y + shift

    after the projection and the norm of the stem, both norms and all four
    linear layers of each block, the norm of each patch merging, and the norm
    of each output, of which the classifier of the paper has one. It merges
    into the layers and norms themselves. It starts near the identity and not
    at it: scales and shifts are drawn with a standard deviation of 0.02.

    In the released Swin those of the patch mergings are never made, as a list
    of modes is compared with the name of one there.

    Args:
        site (Site): Where it is attached; gives the number of channels.
    """

    key = 'ssf'
    sites = ('norm1', 'qkv', 'proj', 'norm2', 'fc1', 'fc2')
    parts = ('patch_embed', 'patch_norm', 'merge_norm', 'out_norm')
    no_merge = None
    elementwise = True

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.scale = nn.Parameter(torch.empty(site.out_dims))
        self.shift = nn.Parameter(torch.empty(site.out_dims))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.scale, mean=1, std=.02)
        nn.init.normal_(self.shift, std=.02)

    def behind(self, x: Tensor, y: Tensor, layout: TokenLayout) -> Tensor:
        """(..., in_dims), (..., out_dims) -> (..., out_dims)"""
        # In the precision of y: autocast would make every map float32 again.
        scale, shift = self.scale.to(y.dtype), self.shift.to(y.dtype)
        if current() is None:
            return y * scale + shift
        return scale_shift(y, scale, shift)

    def takes_over(self, x: Tensor, layer: nn.Module) -> bool:
        """A norm scales and shifts by itself, and has both gradients."""
        return isinstance(layer, nn.LayerNorm) and layer.elementwise_affine

    def replaced(self, x: Tensor, layer: nn.Module) -> Tensor:
        weight, bias = self.merge(layer.weight, layer.bias)
        return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)

    def merge(self, weight: Tensor,
              bias: Optional[Tensor]) -> Tuple[Tensor, Optional[Tensor]]:
        scale, shift = self.scale.to(weight), self.shift.to(weight)
        # A weight is (d, ), (d, in) or (d, in, height, width).
        weight = weight * scale.view(-1, *[1] * (weight.ndim - 1))
        return weight, shift if bias is None else bias * scale + shift
