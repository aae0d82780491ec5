from typing import Dict, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..errors import PEFTError
from ..registry import METHODS
from ..sites import Site, TokenLayout
from .base import check_positive, check_width
from .calibrated import Calibrated

__all__ = ['SCT']

SITES = dict(attn='attn_residual', mlp='fc2')


@METHODS.register_module()
class SCT(Calibrated):
    """A linear map among a few salient channels.

    `SCT: A Simple Baseline for Parameter-Efficient Fine-Tuning via Salient
    Channels <https://arxiv.org/abs/2309.08513>`_ (IJCV 2024)::

        y_K <- y_K + scale * (W y_K + b)

    K are the ``num_channels`` most salient of the d channels, chosen in each
    block by one pass over training data with the frozen model::

        saliency(c) = mean over classes of |y_c|,

    the L2 norm of channel c over the tokens that belong to the class. In
    classification these are all tokens of the images with that label, as in
    the paper. In dense tasks they are the tokens under whose centre the
    pixels have that class; in detection, those inside boxes of that class,
    where the smallest box decides, with all others as one more class. Extra
    tokens (class, registers) and what is ignored or padding do not count.

    Does not start at the identity: W is normal with standard deviation 0.02.

    Args:
        site (Site): Where it is attached; gives the width.
        num_channels (int): K. Defaults to 96.
        scale (float): Factor of what is added. The released recipe takes 0.1
            to 1 by task, and its ViT ignores it. Defaults to 1.
        target (str): ``'attn'``, the stream after the attention, or
            ``'mlp'``, the output of the MLP, which merges. Defaults to
            ``'attn'``.

    Raises:
        PEFTError: For more channels than there are, a scale that is not above
            0, or another target.
    """

    key = 'sct'
    no_merge = 'it changes the shortcut; target=mlp merges'

    def __init__(self,
                 site: Site,
                 num_channels: int = 96,
                 scale: float = 1.,
                 target: str = 'attn') -> None:
        super().__init__(site)
        self.num_channels = check_width('SCT', 'num_channels', num_channels,
                                        site.out_dims)
        self.scale = check_positive('SCT', 'scale', scale)
        if target == 'mlp':
            self.no_merge = None
        self.weight = nn.Parameter(torch.empty(num_channels, num_channels))
        self.bias = nn.Parameter(torch.empty(num_channels))
        self.register_buffer('index',
                             torch.empty(num_channels, dtype=torch.int32))
        # By class, sums of squares of each channel, (classes, C).
        self._energy: Dict[int, Tensor] = {}
        self.reset_parameters()

    @classmethod
    def sites_for(cls, target: str = 'attn', **kwargs) -> Tuple[str]:
        if target not in SITES:
            raise PEFTError(f'SCT: target={target!r} must be one of '
                            f'{", ".join(SITES)}.')
        return (SITES[target], )

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=.02)
        nn.init.zeros_(self.bias)
        self.forget()

    def forward(self, x: Tensor, y: Tensor, layout: TokenLayout) -> Tensor:
        """(..., d), (..., d) -> (..., d)"""
        if not self.ready():
            return y
        salient = y.index_select(-1, self.index)
        update = self.scale * F.linear(salient, self.weight, self.bias)
        return y.index_add(-1, self.index, update.to(y.dtype))

    def merge(self, weight: Tensor,
              bias: Optional[Tensor]) -> Tuple[Tensor, Optional[Tensor]]:
        if not self.is_calibrated:
            return weight, bias
        index, factor = self.index.long(), self.scale * self.weight.to(weight)
        shift = self.scale * self.bias.to(weight)
        bias = weight.new_zeros(len(weight)) if bias is None else bias.clone()
        bias[index] += factor @ bias[index] + shift
        weight = weight.clone()
        weight[index] += factor @ weight[index]
        return weight, bias

    @property
    def num_candidates(self) -> int:
        return self.site.out_dims

    @torch.no_grad()
    def see(self, y: Tensor, layout: TokenLayout,
            labels: Optional[Tensor]) -> None:
        tokens = y.flatten(1, -2)[:, layout.num_extra_tokens:].double()
        if labels is None:
            labels = tokens.new_zeros(len(tokens), dtype=torch.long)
        if labels.ndim == 1:
            labels = labels[:, None].expand(tokens.shape[:2])
        else:
            labels = self._under(labels, layout)
        for label in labels.unique().tolist():
            if label >= 0:
                # A product, as sums by index have no fixed order on a GPU.
                mine = (labels == label).to(tokens).flatten()
                energy = mine @ tokens.flatten(0, 1)**2
                self._energy[label] = self._energy.get(label, 0) + energy

    def _under(self, labels: Tensor, layout: TokenLayout) -> Tensor:
        """Labels under the centres of tokens, (B, H, W) -> (B, N)."""
        if layout.hw_shape is None:
            raise PEFTError(
                f'{self.title} cannot tell the class of a token, as the '
                'tokens form no grid (masked images, patch dropout).')
        rows, columns = (((torch.arange(n, device=labels.device) + .5) * size /
                          n).long()
                         for n, size in zip(layout.hw_shape, labels.shape[1:]))
        return labels[:, rows][:, :, columns].flatten(1)

    def total(self, num_classes: int) -> Tensor:
        seen = next(iter(self._energy.values()), None)
        empty = self.weight.new_zeros(self.num_candidates, dtype=torch.double)
        empty = empty if seen is None else torch.zeros_like(seen)
        return torch.stack(
            [self._energy.get(c, empty) for c in range(num_classes)])

    def chosen(self, total: Tensor) -> Tensor:
        # The mean over classes is the sum, as far as the order goes.
        return self.largest(total.sqrt().sum(0), self.num_channels)

    def settle_on(self, index: Tensor) -> None:
        super().settle_on(index)
        self._energy = {}
