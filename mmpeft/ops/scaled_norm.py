"""A scaled norm and a projection whose gradients need its input alone."""
from typing import List, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['scaled_norm_linear', 'scaled_norm_linear_backward']


def scaled_norm_linear(y: Tensor, scale: Tensor, shift: Tensor, skip: Tensor,
                       weight: Tensor, bias: Tensor,
                       eps: float) -> Tuple[Tensor, Tensor, Tensor]:
    r"""A norm beside a scaled skip, projected::

        n = (y - mean) / std
        u = scale n + shift + skip y
        t = W u + b

    Args:
        y (Tensor): (..., d).
        scale (Tensor): (d, ), of the norm.
        shift (Tensor): (d, ), of the norm.
        skip (Tensor): (d, ), of what goes past the norm.
        weight (Tensor): (dim, d).
        bias (Tensor): (dim, ).
        eps (float): Of the norm.

    Returns:
        tuple[Tensor, Tensor, Tensor]: (..., dim), and what the gradients need
        besides ``y``: the mean of each token and one over its deviation.
    """
    u, mean, rstd = torch.native_layer_norm(y, scale.shape, scale, shift, eps)
    t = F.linear(u.addcmul_(y.to(u), skip.to(u)), weight, bias)
    return t, mean, rstd


def scaled_norm_linear_backward(grad: Tensor, y: Tensor, mean: Tensor,
                                rstd: Tensor, scale: Tensor, shift: Tensor,
                                skip: Tensor, weight: Tensor,
                                needs_y: bool) -> List:
    r"""Gradients of all tensors of :func:`scaled_norm_linear`, in order.

    With ``G = dt^T n`` and ``H = dt^T y``, both as small as ``W`` and products
    with ``y`` alone::

        G = (dt / std)^T y - (sum of dt mean / std) 1^T

    no map of full width but the gradient of ``y`` is made::

        dW = G scale + (sum dt) shift^T + H skip
        dscale = columns of W * G,  dskip = columns of W * H
        dshift = W^T sum dt,        db = sum dt
        dy = norm backward of (scale W^T dt) + skip W^T dt
    """
    # The GEMMs in the precision of the gradient, which autocast chose.
    dt = grad.flatten(0, -2)
    rstd_dt = dt * rstd.view(-1, 1).to(dt)
    both = torch.cat([rstd_dt, dt], dim=1).t() @ y.flatten(0, -2).to(dt)
    by_norm, by_skip = both.to(weight).chunk(2)
    by_norm = by_norm - (mean.view(1, -1).to(dt) @ rstd_dt).t().to(weight)
    total = dt.sum(0).to(weight)
    d_y = None
    if needs_y:
        du = (dt @ weight.to(dt)).view_as(y).to(y)
        d_y = torch.ops.aten.native_layer_norm_backward(
            du, y, scale.shape, mean, rstd, scale, shift,
            [True, False, False])[0].addcmul_(du, skip.to(du))
    d_weight = torch.outer(total,
                           shift).addcmul_(by_norm,
                                           scale).addcmul_(by_skip, skip)
    return [
        d_y, (weight * by_norm).sum(0), total @ weight,
        (weight * by_skip).sum(0), d_weight, total
    ]
