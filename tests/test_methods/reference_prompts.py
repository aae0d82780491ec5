"""Plain window attention with extra tokens, keys and values.

In the manner of ``reference``: window by window and head by head, with nothing
but tensor operations.
"""
import math
from typing import Callable, Optional, Tuple

import torch
from torch import Tensor

from .reference import Parameters, layer_norm, linear, position_bias, region


def attention(x: Tensor,
              hw: Tuple[int, int],
              p: Parameters,
              heads: int,
              window: int,
              shift: int,
              tokens: Optional[Tensor] = None,
              extra: Optional[Tuple[Tensor, Tensor]] = None,
              added: Optional[Callable] = None) -> Tuple:
    """Norm and shifted-window attention, in which others take part.

    Args:
        tokens (Tensor, optional): (B, p, C) tokens of each sample behind the
            norm; they are in every window of that sample.
        extra (tuple[Tensor, Tensor], optional): (p, C) keys and values that
            are in every window of every sample.
        added (callable, optional): Tokens of a window, pad included -> what
            is added to their queries, keys and values.

    Returns:
        tuple: The branch (B, H * W, C), and what the tokens have seen, mean
        over the windows (B, p, C).
    """
    batch, _, dims = x.shape
    height, width = hw
    x = layer_norm(x, p['norm1.weight'], p['norm1.bias'])
    high = math.ceil(height / window) * window
    wide = math.ceil(width / window) * window
    bias = position_bias(p['attn.w_msa.relative_position_bias_table'], window)
    if tokens is None:
        tokens = x.new_zeros(batch, 0, dims)
    outs, seen = [], []
    for sample in range(batch):
        grid = x.new_zeros(high, wide, dims)
        grid[:height, :width] = x[sample].reshape(height, width, dims)
        grid = torch.roll(grid, (-shift, -shift), (0, 1))
        result, windows = torch.zeros_like(grid), []
        for top in range(0, high, window):
            for left in range(0, wide, window):
                labels = torch.tensor([
                    (3 * region(top + i, high, window, shift) +
                     region(left + j, wide, window, shift)) if shift else 0
                    for i in range(window) for j in range(window)
                ])
                mask = -100. * (labels[:, None] != labels[None, :])
                area = (slice(top, top + window), slice(left, left + window))
                inside = grid[area].reshape(-1, dims)
                own, asked = attend(inside, tokens[sample], extra, p, heads,
                                    bias + mask.to(x), added)
                result[area] = own.reshape(window, window, dims)
                windows.append(asked)
        result = torch.roll(result, (shift, shift), (0, 1))
        outs.append(result[:height, :width].reshape(-1, dims))
        seen.append(sum(windows) / len(windows))
    return torch.stack(outs), torch.stack(seen)


def attend(own: Tensor, tokens: Tensor, extra: Optional[Tuple[Tensor, Tensor]],
           p: Parameters, heads: int, bias: Tensor,
           added: Optional[Callable]) -> Tuple[Tensor, Tensor]:
    """One window: (N, C) tokens of its own and (p, C) others."""
    size, dims = own.shape
    both = torch.cat([own, tokens])
    qkv = linear(both, p['attn.w_msa.qkv.weight'], p['attn.w_msa.qkv.bias'])
    if added is not None:
        qkv = qkv + added(both)
    q, k, v = qkv[:, :dims], qkv[:, dims:2 * dims], qkv[:, 2 * dims:]
    if extra is not None:
        k, v = torch.cat([k, extra[0]]), torch.cat([v, extra[1]])
    outs, width = [], dims // heads
    for head in range(heads):
        part = slice(head * width, head * width + width)
        scores = q[:, part] @ k[:, part].t() / math.sqrt(width)
        # Only where a token of the window looks at another one.
        full = torch.zeros_like(scores)
        full[:size, :size] = bias[head]
        weights = torch.exp(scores + full)
        weights = weights / weights.sum(-1, keepdim=True)
        outs.append(weights @ v[:, part])
    out = linear(
        torch.cat(outs, -1), p['attn.w_msa.proj.weight'],
        p['attn.w_msa.proj.bias'])
    return out[:size], out[size:]


def merged_tokens(tokens: Tensor, p: Parameters) -> Tensor:
    """Patch merging of tokens that stand for all four neighbours.

    The stock layer orders channels first and neighbours second.
    """
    four = torch.stack([tokens] * 4, dim=-1).flatten(-2)
    four = layer_norm(four, p['norm.weight'], p['norm.bias'])
    return linear(four, p['reduction.weight'], None)
