"""Attention in windows that keeps queries, keys and values, and no more."""
from typing import Iterator, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

__all__ = ['window_attention']

# On a CPU the scores of a few windows at a time stay in its cache.
CHUNK_BYTES = 2**20


def window_attention(qkv: Tensor, bias: Tensor, mask: Optional[Tensor],
                     num_heads: int, scale: float) -> Tensor:
    r"""Attention of the tokens of a window, with relative positions::

        P = softmax(scale q k^T + bias + mask)
        o = P v

    Stock code keeps q (scaled), k, v as copies and P; here ``qkv`` is kept,
    and backward makes P again::

        dv = P^T do,   dS = P * (do v^T - rowsum(P * do v^T))
        dq = scale dS k,   dk = scale dS^T q,   dbias = sum of dS over windows

    Args:
        qkv (Tensor): (B * windows, N, 3 C), samples first.
        bias (Tensor): (heads, N, N), of the relative positions.
        mask (Tensor, optional): (windows, N, N), added to the scores.
        num_heads (int): Heads.
        scale (float): Factor on the scores.

    Returns:
        Tensor: (B * windows, N, C).
    """
    return _WindowAttention.apply(qkv, bias, mask, num_heads, scale)


class _WindowAttention(Function):

    @staticmethod
    def forward(ctx, qkv, bias, mask, num_heads, scale):
        ctx.save_for_backward(qkv, bias, mask)
        ctx.num_heads, ctx.scale = num_heads, scale
        windows, size, width = qkv.shape
        out = qkv.new_empty(windows, size, width // 3)
        for part, masked in _chunks(qkv, mask, num_heads):
            q, k, v = _heads(qkv[part], num_heads)
            weights = _weights(q, k, bias, masked, scale)
            mixed = torch.bmm(weights, v)
            out[part].view(-1, size, num_heads,
                           v.shape[-1]).copy_(_tokens(mixed, num_heads))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        qkv, bias, mask = ctx.saved_tensors
        num_heads, scale = ctx.num_heads, ctx.scale
        size = qkv.shape[1]
        grad_qkv = torch.empty_like(qkv)
        grad_bias = torch.zeros_like(bias) if ctx.needs_input_grad[1] else None
        for part, masked in _chunks(qkv, mask, num_heads):
            q, k, v = _heads(qkv[part], num_heads)
            weights = _weights(q, k, bias, masked, scale)
            # (n, N, C) -> (n * heads, N, C / heads)
            d_out = grad[part].unflatten(-1, (num_heads, -1)).transpose(
                1, 2).reshape(q.shape)
            parts = q.new_empty(3, *q.shape)
            torch.bmm(weights.transpose(1, 2), d_out, out=parts[2])
            d_scores = torch._softmax_backward_data(
                torch.bmm(d_out, v.transpose(1, 2)), weights, -1,
                weights.dtype)
            if grad_bias is not None:
                grad_bias += d_scores.view(-1, *bias.shape).sum(0)
            d_scores.mul_(scale)
            torch.bmm(d_scores, k, out=parts[0])
            torch.bmm(d_scores.transpose(1, 2), q, out=parts[1])
            grad_qkv[part].view(-1, size, 3, num_heads, q.shape[-1]).copy_(
                parts.unflatten(1, (-1, num_heads)).permute(1, 3, 0, 2, 4))
        return grad_qkv, grad_bias, None, None, None


def _chunks(qkv: Tensor, mask: Optional[Tensor],
            num_heads: int) -> Iterator[Tuple[slice, Optional[Tensor]]]:
    """Windows that are done together, and their masks."""
    windows, size = qkv.shape[:2]
    step = windows
    if qkv.device.type == 'cpu':
        step = max(1, CHUNK_BYTES // (4 * num_heads * size * size))
    # Chunks end with a sample where windows have masks of their own.
    period = windows if mask is None else len(mask)
    if step >= windows:
        yield slice(None), mask
        return
    for first in range(0, windows, period):
        for start in range(0, period, step):
            stop = min(start + step, period)
            yield (slice(first + start, first + stop),
                   None if mask is None else mask[start:stop])


def _heads(qkv: Tensor, num_heads: int) -> Tensor:
    """(n, N, 3 C) -> (3, n * heads, N, C / heads)"""
    qkv = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return qkv.reshape(3, -1, *qkv.shape[3:])


def _tokens(mixed: Tensor, num_heads: int) -> Tensor:
    """(n * heads, N, C / heads) -> (n, N, heads, C / heads)"""
    return mixed.unflatten(0, (-1, num_heads)).transpose(1, 2)


def _weights(q: Tensor, k: Tensor, bias: Tensor, mask: Optional[Tensor],
             scale: float) -> Tensor:
    """Softmax of the scores, (n * heads, N, N), in the precision of ``q``."""
    # Half precision has too few digits for sums of scores.
    scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale).to(bias.dtype)
    each = scores.view(-1, *bias.shape)
    each.add_(bias)
    if mask is not None:
        # (B, windows, heads, N, N) + (windows, 1, N, N)
        each.view(-1, len(mask), *bias.shape).add_(mask.unsqueeze(1))
    return scores.softmax(-1).to(q.dtype)
