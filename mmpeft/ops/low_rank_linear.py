"""A linear layer with a low-rank update, in the products of one layer."""
from typing import Any, Iterator, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

__all__ = ['low_rank_linear']

#: Start and stop of a range of output rows.
Rows = Sequence[Tuple[int, int]]


def low_rank_linear(x: Tensor,
                    weight: Tensor,
                    bias: Optional[Tensor],
                    rows: Rows,
                    down: Tensor,
                    up: Tensor,
                    scale: float = 1.,
                    initial: Optional[Tuple[Tensor, Tensor]] = None,
                    gain: Optional[Tensor] = None) -> Tensor:
    r"""``W x + b + scale B A x`` as ``V x + b`` with ``V = W + scale B A``.

    Forming ``V`` takes as long as the update of a few tokens, and is done
    again in backward instead of keeping it. With ``G = dy^T x`` of the rows::

        dx = V^T dy,   dA = scale B^T G,   dB = scale G A^T

    where ``G`` is made if it is cheaper than the thin products ``A x`` and
    ``B^T dy`` that give the same. With a gain ``g`` of each row it is
    ``(g V) x + b``, where ``g G`` takes the place of ``G``, and the gradient
    of ``g`` is the sum of ``G * V`` over each row.

    Args:
        x (Tensor): (..., d).
        weight (Tensor): ``W``, (out, d); gets no gradient.
        bias (Tensor, optional): (out, ).
        rows (Sequence[tuple[int, int]]): Those that have an update.
        down (Tensor): (ranges * rank, d), ``A`` of each range.
        up (Tensor): (rows in all, rank), ``B`` of each range.
        scale (float): Defaults to 1.
        initial (tuple[Tensor, Tensor], optional): Factors of the same shapes
            whose update is taken away again; like ones cancel to the last
            bit. They get no gradients.
        gain (Tensor, optional): (rows in all, ).

    Returns:
        Tensor: (..., out).
    """
    return _LowRankLinear.apply(x, weight, bias, down, up, gain, tuple(rows),
                                scale, *(initial or ()))


class _LowRankLinear(Function):

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Optional[Tensor],
                down: Tensor, up: Tensor, gain: Optional[Tensor], rows: Rows,
                scale: float, *initial: Tensor) -> Tensor:
        ctx.ranges, ctx.scale = list(_ranges(rows, up.shape[1])), scale
        # Detached: see filtered_bottleneck.
        factors = [t.detach() for t in (weight, down, up, *initial)]
        gain = None if gain is None else gain.detach()
        ctx.save_for_backward(x, gain, *factors)
        formed = _formed(ctx, *factors)
        if gain is not None:
            _multiply(ctx, formed, gain)
        return F.linear(x, formed, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple:
        x, gain, weight, down, up, *initial = ctx.saved_tensors
        formed = _formed(ctx, weight, down, up, *initial)
        x, dy = x.flatten(0, -2), grad.flatten(0, -2)
        d_gain = None
        if gain is None and len(up) > 4 * len(down):
            d_down, d_up = _by_rank(ctx, x, dy, down, up)
        else:
            products = [dy[:, own].t() @ x for own, _, _ in ctx.ranges]
            if gain is not None:
                d_gain = torch.cat([(g * formed[own]).sum(1)
                                    for g, (own, _,
                                            _) in zip(products, ctx.ranges)])
                _multiply(ctx, formed, gain)
                for g, (_, _, high) in zip(products, ctx.ranges):
                    g *= gain[high, None]
            d_down, d_up = _by_matrix(ctx, products, down, up)
        d_x = grad @ formed if ctx.needs_input_grad[0] else None
        d_bias = dy.sum(0) if ctx.needs_input_grad[2] else None
        return (d_x, None, d_bias, d_down, d_up, d_gain,
                *[None] * (2 + len(initial)))


def _ranges(rows: Rows, rank: int) -> Iterator[Tuple[slice, slice, slice]]:
    """Of each range its rows in W, in A and in B."""
    done = 0
    for number, (start, stop) in enumerate(rows):
        yield (slice(start, stop), slice(number * rank, (number + 1) * rank),
               slice(done, done + stop - start))
        done += stop - start


def _formed(ctx: Any, weight: Tensor, down: Tensor, up: Tensor, *initial:
            Tensor) -> Tensor:
    """``V``, as a new tensor."""
    formed = weight.clone()
    for own, low, high in ctx.ranges:
        update = up[high] @ down[low]
        if initial:
            update -= initial[1][high] @ initial[0][low]
        formed[own].add_(update, alpha=ctx.scale)
    return formed


def _multiply(ctx: Any, formed: Tensor, gain: Tensor) -> None:
    """The gains, in place."""
    for own, _, high in ctx.ranges:
        formed[own] *= gain[high, None]


def _by_matrix(ctx: Any, products: Sequence[Tensor], down: Tensor,
               up: Tensor) -> Tuple[Tensor, Tensor]:
    """Gradients of ``A`` and ``B``, from ``G`` of each range."""
    d_down, d_up = torch.empty_like(down), torch.empty_like(up)
    for g, (_, low, high) in zip(products, ctx.ranges):
        torch.mm(up[high].t(), g, out=d_down[low])
        torch.mm(g, down[low].t(), out=d_up[high])
    return d_down.mul_(ctx.scale), d_up.mul_(ctx.scale)


def _by_rank(ctx: Any, x: Tensor, dy: Tensor, down: Tensor,
             up: Tensor) -> Tuple[Tensor, Tensor]:
    """The same from ``A x`` and ``B^T dy``."""
    hidden, d_hidden = x @ down.t(), dy.new_empty(len(dy), len(down))
    d_up = torch.empty_like(up)
    for own, low, high in ctx.ranges:
        d_hidden[:, low] = dy[:, own] @ up[high]
        torch.mm(dy[:, own].t(), hidden[:, low], out=d_up[high])
    return (d_hidden.t() @ x).mul_(ctx.scale), d_up.mul_(ctx.scale)
