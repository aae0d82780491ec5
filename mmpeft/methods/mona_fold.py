"""Mona with everything linear in it multiplied out."""
import copy
from typing import TYPE_CHECKING, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from ..sites import TokenLayout
from .folded import Folded

if TYPE_CHECKING:
    from .mona import Mona, MonaOp

__all__ = ['FoldedMona', 'fold_op']


class FoldedMona(Folded):
    """The function of :class:`Mona` without dropout, in fewer steps::

        u = LN'(y) + gammax * y         LN' has scale gamma w, shift gamma b
        t = K (W1 u + b1)               one depthwise 7 x 7
        y <- y + W2 gelu(P t + p) + b2  one pointwise

    where ``w`` and ``b`` are scale and shift of Mona's norm, and

    - ``t + (DW3 t + DW5 t + DW7 t) / 3 = K t + k``: kernels of 3 and 5 are
      kernels of 7 with zeros around them (the padding of the map is zero for
      all three), the skip is a 1 in the middle, and ``k`` is the mean of the
      three biases;
    - ``s + C s + c`` with ``s = K t + k`` is ``P K t + p``: ``P = C + 1`` and
      ``p = P k + c``, as the bias ``k`` is the same at every place.

    All of it is exact but for rounding; products are made in float64 and
    rounded once. The norm could go into ``W1`` as a whole, ``W1 gamma w LN(y)
    + W1 gammax y + ...``, but two products of full width take longer than the
    one pass that this saves (measured on a CPU).

    Args:
        mona (Mona): In evaluation mode.
    """

    def __init__(self, mona: 'Mona') -> None:
        super().__init__()
        self.eps = mona.norm.eps
        dtype = mona.project1.weight.dtype
        op = copy.deepcopy(mona.adapter_conv).double()
        kernel, point, shift = fold_op(op)
        gamma = mona.gamma.detach().double()
        tensors = dict(
            scale=gamma * mona.norm.weight,
            shift=gamma * mona.norm.bias,
            gammax=mona.gammax,
            down=mona.project1.weight,
            down_bias=mona.project1.bias,
            kernel=kernel,
            point=point,
            point_bias=shift,
            up=mona.project2.weight,
            up_bias=mona.project2.bias)
        for name, value in tensors.items():
            # A copy: training on with the unfolded twin changes nothing here.
            value = value.detach().to(dtype, copy=True).contiguous()
            self.register_buffer(name, value, persistent=False)

    def forward(self, x: Tensor, y: Tensor, layout: TokenLayout) -> Tensor:
        """(B, N, d), (B, N, d) -> (B, N, d), N = extra tokens + H * W"""
        extra = layout.num_extra_tokens
        tokens = y[:, extra:] if extra else y
        u = F.layer_norm(tokens, self.scale.shape, self.scale, self.shift,
                         self.eps)
        t = F.linear(
            torch.addcmul(u, tokens, self.gammax), self.down, self.down_bias)
        # (B, H*W, dim) -> (B, dim, H, W) and back
        t = layout.to_tokens(
            F.conv2d(
                layout.to_grid(t),
                self.kernel,
                padding=3,
                groups=len(self.point)))
        t = F.gelu(F.linear(t, self.point, self.point_bias))
        tokens = tokens + F.linear(t, self.up, self.up_bias)
        return torch.cat([y[:, :extra], tokens], dim=1) if extra else tokens


def fold_op(op: 'MonaOp') -> Tuple[Tensor, Tensor, Tensor]:
    """Kernel (dim, 1, 7, 7), matrix (dim, dim) and its bias (dim, ), which
    gradients pass through."""
    convs = (op.conv1, op.conv2, op.conv3, op.projector)
    return _FoldOp.apply(*(c.weight for c in convs), *(c.bias for c in convs))


class _FoldOp(Function):
    """In few operations: the tensors are so small that each of them takes
    longer to start than to do. Gradients, from those of the results::

        dDWi = the middle of dK / 3,   dC = dP + dp k^T
        dc = dp,                       d(bias of DWi) = P^T dp / 3
    """

    @staticmethod
    def forward(ctx, conv1, conv2, conv3, projector, *biases):
        kernel = conv3.clone()
        kernel[:, :, 1:6, 1:6] += conv2
        kernel[:, :, 2:5, 2:5] += conv1
        kernel /= 3
        kernel[:, :, 3, 3] += 1
        point = projector.flatten(1).clone()
        point.diagonal().add_(1)
        bias = (biases[0] + biases[1] + biases[2]) / 3
        ctx.save_for_backward(point, bias)
        return kernel, point, torch.addmv(biases[3], point, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_kernel, d_point, d_shift):
        point, bias = ctx.saved_tensors
        third = d_kernel / 3
        d_bias = (point.t() @ d_shift) / 3
        d_point = torch.addr(d_point, d_shift, bias)
        return (third[:, :, 2:5, 2:5], third[:, :, 1:6, 1:6], third,
                d_point[:, :, None, None], d_bias, d_bias, d_bias, d_shift)
