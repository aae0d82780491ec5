from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from ..ops import low_rank_linear
from ..registry import METHODS
from ..sites import Site, TokenLayout
from .low_rank import LowRank

__all__ = ['DoRA']


@METHODS.register_module()
class DoRA(LowRank):
    """Low-rank update of the direction of each weight row, and its length.

    `DoRA: Weight-Decomposed Low-Rank Adaptation
    <https://arxiv.org/abs/2402.09353>`_ (ICML 2024)::

        W' = m * V / |V|,    V = W + scale * B A,    m = |W| at the start

    with one length for each output row, that is each of its columns in the
    paper's notation. The gradient takes ``|V|`` for a constant (section 4.3
    of the paper). On the output ``y = W x + b`` of the stock layer this is,
    with ``g = m / |V|``::

        y <- y + (g - 1) * (y - b) + g * scale * B A x

    The bias is not scaled. At the start ``g`` is 1 and ``B`` is 0: the frozen
    model bit for bit while both lengths are computed on the same device in
    float32 or more, within rounding after a move to another device. It merges
    exactly. ``m`` is taken from the weights that are loaded.

    Of several methods at one layer, DoRA scales what those listed before it
    made of ``y``; ``V`` is its own, without their updates. Dropout reaches
    ``B A x`` alone, as in LoRA; the code released in peft puts it on the
    input of ``(g - 1) W x`` as well.

    Weight decay would pull ``m`` towards 0:
    ``custom_keys={'.magnitude': dict(decay_mult=0)}`` exempts it.

    Args:
        site (Site): Where it is attached; gives the widths.
        rank (int): Rank of the update. Defaults to 64.
        alpha (float, optional): Numerator of the scale ``alpha / rank``; None
            means ``rank``, a scale of 1. Defaults to None.
        targets (Sequence[str]): Any of q, k, v, proj, fc1, fc2.
            Defaults to ``('q', 'v')``.
        rslora (bool): Scale by ``alpha / sqrt(rank)``. Defaults to False.
        drop_rate (float): Dropout probability on the input of A, in [0, 1).
            Defaults to 0.

    Raises:
        PEFTError: For an unknown target, a rank outside [1, width] or an
            ``alpha`` that is not above 0.
    """

    key = 'dora'
    needs_layer = True

    def __init__(self,
                 site: Site,
                 rank: int = 64,
                 alpha: Optional[float] = None,
                 targets: Sequence[str] = ('q', 'v'),
                 rslora: bool = False,
                 drop_rate: float = 0.) -> None:
        super().__init__(site, rank, alpha, targets, rslora, drop_rate)
        self.magnitude = nn.Parameter(torch.empty(sum(self.sizes)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        # Until the lengths of the rows are taken.
        nn.init.ones_(self.magnitude)

    def start_from_layer(self) -> None:
        """Take the lengths of the rows."""
        weight = self.layer.weight
        self.magnitude.data.copy_(torch.cat(self._lengths(weight)))

    @torch.no_grad()
    def _lengths(self, weight: Tensor) -> List[Tensor]:
        """``|V|`` for each target, in float32 or more."""
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        # Autocast would round the products to half precision.
        with torch.autocast(weight.device.type, enabled=False):
            products = self.products(
                self.lora_A.to(weight), self.lora_B.to(weight))
            return [
                torch.linalg.vector_norm(
                    weight[start:stop] + self.scale * product, dim=1)
                for product, (start, stop) in zip(products, self.rows)
            ]

    def _gains(self, weight: Tensor) -> List[Tensor]:
        lengths = self._lengths(weight)
        magnitudes = self.magnitude.split(self.sizes)
        return [m / length for m, length in zip(magnitudes, lengths)]

    def behind(self, x: Tensor, y: Tensor, layout: TokenLayout) -> Tensor:
        """(..., in_dims), (..., out_dims) -> (..., out_dims)"""
        updates = self.project(self.dropout(x), self.lora_A, self.lora_B)
        gains = self._gains(self.layer.weight)
        bias, parts = self.layer.bias, []
        for part, update, gain, (start, stop) in zip(
                self.take(y), updates, gains, self.rows):
            linear = part
            if bias is not None:
                linear = part - bias[start:stop].to(part.dtype)
            # g - 1 before the precision is lowered: it is small.
            parts.append(part + (gain - 1).to(part.dtype) * linear +
                         (self.scale * gain).to(part.dtype) * update)
        return self.put(y, parts)

    def replaced(self, x: Tensor, layer: nn.Module) -> Tensor:
        gain = torch.cat(self._gains(layer.weight))
        return low_rank_linear(x, layer.weight, layer.bias, self.rows,
                               self.lora_A, self.lora_B, self.scale, None,
                               gain)

    def merge(self, weight: Tensor,
              bias: Optional[Tensor]) -> Tuple[Tensor, Optional[Tensor]]:
        gains = self._gains(self.layer.weight.to(weight))
        weight = self.fold(weight, self.lora_A, self.lora_B, self.scale)
        stock, bias = self.layer.bias, None if bias is None else bias.clone()
        for gain, (start, stop) in zip(gains, self.rows):
            rows = slice(start, stop)
            weight[rows] *= gain[:, None]
            if bias is not None:
                # What methods before it added to the stock bias is scaled.
                own = stock[rows].to(bias)
                bias[rows] = own + gain * (bias[rows] - own)
        return weight, bias
