"""A scaled norm and a projection that keep their input, and no more."""
from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

__all__ = ['scaled_norm_linear']


def scaled_norm_linear(y: Tensor, scale: Tensor, shift: Tensor, skip: Tensor,
                       weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    r"""A norm beside a scaled skip, projected::

        n = (y - mean) / std
        u = scale n + shift + skip y
        t = W u + b

    Kept are ``y`` and two numbers per token. With ``G = dt^T n`` and
    ``H = dt^T y``, both as small as ``W`` and products with ``y`` alone::

        G = (dt / std)^T y - (sum of dt mean / std) 1^T

    no map of full width but the gradient of ``y`` is made::

        dW = G scale + (sum dt) shift^T + H skip
        dscale = columns of W * G,  dskip = columns of W * H
        dshift = W^T sum dt,        db = sum dt
        dy = norm backward of (scale W^T dt) + skip W^T dt

    Args:
        y (Tensor): (..., d).
        scale (Tensor): (d, ), of the norm.
        shift (Tensor): (d, ), of the norm.
        skip (Tensor): (d, ), of what goes past the norm.
        weight (Tensor): (dim, d).
        bias (Tensor): (dim, ).
        eps (float): Of the norm.

    Returns:
        Tensor: (..., dim).
    """
    return _ScaledNormLinear.apply(y, scale, shift, skip, weight, bias, eps)


class _ScaledNormLinear(Function):

    @staticmethod
    def forward(ctx, y, scale, shift, skip, weight, bias, eps):
        u, mean, rstd = torch.native_layer_norm(y, scale.shape, scale, shift,
                                                eps)
        # Detached: torch 2.1 forgets the hooks of a parameter that a function
        # keeps while there are hooks for what is kept.
        ctx.save_for_backward(y, mean, rstd, scale, shift, skip.detach(),
                              weight.detach())
        ctx.eps = eps
        return F.linear(u.addcmul_(y.to(u), skip.to(u)), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad) -> Tuple:
        y, mean, rstd, scale, shift, skip, weight = ctx.saved_tensors
        # The GEMMs in the precision of the gradient, which autocast chose.
        dt = grad.flatten(0, -2)
        rstd_dt = dt * rstd.view(-1, 1).to(dt)
        both = torch.cat([rstd_dt, dt], dim=1).t() @ y.flatten(0, -2).to(dt)
        by_norm, by_skip = both.to(weight).chunk(2)
        by_norm = by_norm - (mean.view(1, -1).to(dt) @ rstd_dt).t().to(weight)
        total = dt.sum(0).to(weight)
        grads = [
            None, (weight * by_norm).sum(0), total @ weight,
            (weight * by_skip).sum(0),
            torch.outer(total, shift).addcmul_(by_norm,
                                               scale).addcmul_(by_skip, skip),
            total, None
        ]
        if ctx.needs_input_grad[0]:
            du = (dt @ weight.to(dt)).view_as(y).to(y)
            grads[0] = torch.ops.aten.native_layer_norm_backward(
                du, y, scale.shape, mean, rstd, scale, shift,
                [True, False, False])[0].addcmul_(du, skip.to(du))
        return tuple(grads)
