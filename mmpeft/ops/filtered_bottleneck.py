"""A bottleneck with a filter in it that keeps its narrow map, and no more."""
from functools import partial
from typing import Any, Callable, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from ..recipes import current
from .depthwise import depthwise, depthwise_backward
from .dropped import draw, drop
from .scaled_norm import scaled_norm_linear, scaled_norm_linear_backward

__all__ = ['filtered_bottleneck']


def filtered_bottleneck(y: Tensor, norm: Tuple[Tensor, Tensor, Tensor,
                                               float], down: nn.Linear,
                        filters: Tuple[Tensor, Tensor,
                                       Tensor], dropout: nn.Dropout,
                        up: nn.Linear, hw_shape: Tuple[int, int]) -> Tensor:
    r"""A norm beside a scaled skip, a bottleneck with a filter, and a skip::

        t = W1 (scale LN(y) + shift + skip y) + b1
        f = K t,   s = P f + p,   h = dropout(gelu(s))
        out = y + W2 h + b2

    with, in backward::

        dW2 = do^T h,   db2 = sum do,   ds = gelu'(s) dropout(W2^T do)
        dP = ds^T f,    dp = sum ds,    df = P^T ds

    and what :func:`depthwise_backward` and :func:`scaled_norm_linear_backward`
    make of ``df``. Kept are ``y``, ``t``, what the dropout keeps (a byte per
    number) and two numbers per token; unless the block is lean, ``s``, too.
    It is one function, as on a small map starting an operation takes longer
    than doing it.

    Args:
        y (Tensor): (B, H * W, d).
        norm (tuple): Scale, shift and skip, all (d, ), and epsilon.
        down (nn.Linear): d -> dim.
        filters (tuple[Tensor, Tensor, Tensor]): ``K`` (dim, 1, k, k), ``P``
            (dim, dim) and ``p`` (dim, ).
        dropout (nn.Dropout): Its rate, and whether it is training.
        up (nn.Linear): dim -> d.
        hw_shape (tuple[int, int]): H and W.

    Returns:
        Tensor: (B, H * W, d).
    """
    *norm, eps = norm
    recipes = current()
    lean = recipes is not None and recipes.lean
    narrow = _Narrow(dropout, hw_shape, lean)
    out = _FilteredBottleneck.apply(narrow, eps, y, *norm, down.weight,
                                    down.bias, *filters, up.weight, up.bias)
    kept = narrow.take_kept()
    if lean:
        # So that the norm that follows need not keep it.
        filters = [f.detach() for f in filters]
        recipes.add(
            out,
            partial(_again, recipes.reference(y), narrow, kept, filters, up))
    return out


class _Narrow:
    """The maps between the projections.

    Args:
        dropout (nn.Dropout): Its rate, and whether it is training.
        hw_shape (tuple[int, int]): H and W.
        lean (bool): Whether ``s`` is made again, too.
    """

    def __init__(self, dropout: nn.Dropout, hw_shape: Tuple[int, int],
                 lean: bool) -> None:
        self.dropout, self.hw_shape, self.lean = dropout, hw_shape, lean
        self.rate = dropout.p
        # For the one who called, as a function returns what has a gradient.
        self.kept: Optional[Tuple] = None
        # For backward, which comes right after what makes the output again.
        self.made: Optional[Tuple] = None

    def take_kept(self) -> Optional[Tuple]:
        kept, self.kept = self.kept, None
        return kept

    def first(self, t: Tensor, filters: Tuple) -> Tensor:
        """``h``; draws."""
        s = self._mix(depthwise(t, filters[0], self.hw_shape), *filters[1:])
        keep = draw(s, self.dropout)
        self.kept = (t.detach(), keep, None if self.lean else s)
        return drop(F.gelu(s), keep, self.rate)

    def again(self, kept: Tuple, filters: Tuple) -> Tuple:
        """``f``, ``s`` and ``h``."""
        t, keep, s = kept
        made, self.made = self.made, None
        if made is None:
            f = depthwise(t, filters[0], self.hw_shape)
            s = self._mix(f, *filters[1:]) if s is None else s
            made = f, s, drop(F.gelu(s), keep, self.rate)
        return made

    @staticmethod
    def _mix(f: Tensor, point: Tensor, bias: Tensor) -> Tensor:
        return F.linear(f, point, bias)


def _again(source: Callable, narrow: _Narrow, kept: Tuple, filters: Tuple,
           up: nn.Linear) -> Tensor:
    """The output, with what backward needs of it, too."""
    narrow.made = narrow.again(kept, filters)
    return source() + F.linear(narrow.made[-1], up.weight, up.bias)


class _FilteredBottleneck(Function):

    @staticmethod
    def forward(ctx: Any, narrow: _Narrow, eps: float, y: Tensor,
                scale: Tensor, shift: Tensor, skip: Tensor, down: Tensor,
                down_bias: Tensor, kernel: Tensor, point: Tensor,
                point_bias: Tensor, up: Tensor, up_bias: Tensor) -> Tensor:
        t, mean, rstd = scaled_norm_linear(y, scale, shift, skip, down,
                                           down_bias, eps)
        h = narrow.first(t, (kernel, point, point_bias))
        ctx.narrow = narrow
        # Detached: torch 2.1 forgets the hooks of a parameter that a function
        # keeps while there are hooks for what is kept.
        ctx.save_for_backward(
            y, mean, rstd, *(p.detach() for p in (scale, shift, skip, down)),
            *(p.detach() for p in (kernel, point, point_bias, up)),
            *narrow.kept)
        return y + F.linear(h, up, up_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple:
        (y, mean, rstd, scale, shift, skip, down, kernel, point, point_bias,
         up, t, keep, s) = ctx.saved_tensors
        # All narrow maps in the precision of the first, which autocast chose.
        kernel_t, point, point_bias, up = (
            p.to(t) for p in (kernel, point, point_bias, up))
        f, s, h = ctx.narrow.again((t, keep, s), (kernel_t, point, point_bias))
        rows = grad.flatten(0, 1).to(t)
        d_h = (rows @ up).view_as(h)
        d_s = torch.ops.aten.gelu_backward(
            drop(d_h, keep, ctx.narrow.rate), s).flatten(0, 1)
        d_f = (d_s @ point).view_as(f)
        d_t, d_kernel = depthwise_backward(d_f, t, kernel, ctx.narrow.hw_shape)
        grads = scaled_norm_linear_backward(d_t, y, mean, rstd, scale, shift,
                                            skip, down,
                                            ctx.needs_input_grad[2])
        if grads[0] is not None:
            grads[0] += grad
        return (None, None,
                *grads, d_kernel, (d_s.t() @ f.flatten(0, 1)).to(kernel),
                d_s.sum(0).to(kernel), (rows.t() @ h.flatten(0, 1)).to(kernel),
                grad.sum((0, 1)).to(kernel))
