"""A scale and a shift of each channel, in as few passes as it takes."""
from typing import Iterator

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

__all__ = ['scale_shift']

# On a CPU what is read for one gradient is still in its cache for the next.
CHUNK_BYTES = 2**20


def scale_shift(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    r"""``scale y + shift``, with all three gradients in one pass::

        dy = scale do,   dscale = sum of y do,   dshift = sum of do

    PyTorch takes two passes forward and four backward.

    Args:
        y (Tensor): (..., d).
        scale (Tensor): (d, ).
        shift (Tensor): (d, ).

    Returns:
        Tensor: (..., d).
    """
    return _ScaleShift.apply(y, scale, shift)


class _ScaleShift(Function):

    @staticmethod
    def forward(ctx, y, scale, shift):
        # Detached: see scaled_norm_linear.
        ctx.save_for_backward(y, scale.detach())
        return torch.addcmul(shift, y, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, scale = ctx.saved_tensors
        rows, d_out = y.flatten(0, -2), grad.flatten(0, -2)
        d_y = torch.empty_like(d_out) if ctx.needs_input_grad[0] else None
        d_scale, d_shift = torch.zeros_like(scale), torch.zeros_like(scale)
        for part in _chunks(d_out):
            piece = d_out[part]
            ones = piece.new_ones(1, len(piece))
            d_shift += (ones @ piece)[0]
            d_scale += (ones @ (piece * rows[part]))[0]
            if d_y is not None:
                torch.mul(piece, scale, out=d_y[part])
        return None if d_y is None else d_y.view_as(grad), d_scale, d_shift


def _chunks(rows: Tensor) -> Iterator[slice]:
    step = len(rows)
    if rows.device.type == 'cpu':
        step = max(1, CHUNK_BYTES // (4 * rows.shape[1]))
    for start in range(0, len(rows), step):
        yield slice(start, start + step)
