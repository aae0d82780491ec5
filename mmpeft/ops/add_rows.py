"""Add to some outputs of a linear layer without taking the others apart."""
from typing import Sequence, Tuple

from torch import Tensor
from torch.autograd.function import Function

__all__ = ['add_rows']


def add_rows(y: Tensor, rows: Sequence[Tuple[int, int]],
             updates: Sequence[Tensor]) -> Tensor:
    """``y`` with an update added to each range of its last dimension.

    The gradient of ``y`` is that of the result, and those of the updates are
    views of it. Of slices and their concatenation PyTorch would make a map of
    zeros each, as wide as ``y``, and add these up.

    Args:
        y (Tensor): (..., d).
        rows (Sequence[tuple[int, int]]): Start and stop of each range.
        updates (Sequence[Tensor]): (..., stop - start), of the dtype of ``y``.

    Returns:
        Tensor: (..., d).
    """
    if len(updates) == 1 and updates[0].shape[-1] == y.shape[-1]:
        return y + updates[0]
    return _AddRows.apply(tuple(rows), y, *updates)


class _AddRows(Function):

    @staticmethod
    def forward(ctx, rows, y, *updates):
        ctx.rows = rows
        out = y.clone()
        for (start, stop), update in zip(rows, updates):
            out[..., start:stop] += update
        return out

    @staticmethod
    def backward(ctx, grad):
        return (None, grad, *(grad[..., a:b] for a, b in ctx.rows))
