"""Plain formulas, written from the papers with nothing but tensor operations.

Nothing of mmpeft and no layer of torch is used, so that an error in either
cannot hide itself. ``p`` is a mapping from stock parameter names of one block
to tensors.
"""
import math
from typing import Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

Parameters = Dict[str, Tensor]


def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    y = torch.matmul(x, weight.t())
    return y if bias is None else y + bias


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean)**2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * weight + bias


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def relu(x: Tensor) -> Tensor:
    return x * (x > 0)


def depthwise(t: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, H, W), one filter for each channel."""
    size = weight.shape[-1]
    t = F.conv2d(t, weight, padding=size // 2, groups=t.shape[1])
    return t + bias[:, None, None]


def position_bias(table: Tensor, window: int) -> Tensor:
    """(heads, window^2, window^2) from the table of relative positions."""
    rows = []
    for i in range(window**2):
        for j in range(window**2):
            dy = i // window - j // window + window - 1
            dx = i % window - j % window + window - 1
            rows.append(dy * (2 * window - 1) + dx)
    bias = table[torch.tensor(rows)].reshape(window**2, window**2, -1)
    return bias.permute(2, 0, 1)


def region(position: int, size: int, window: int, shift: int) -> int:
    """Tokens that a shift brought together see each other only within one of
    three regions along each axis."""
    return (position >= size - window) + (position >= size - shift)


def attention_branch(x: Tensor, hw: Tuple[int, int], p: Parameters, heads: int,
                     window: int, shift: int) -> Tensor:
    """Norm and shifted-window attention, window by window."""
    batch, _, dims = x.shape
    height, width = hw
    x = layer_norm(x, p['norm1.weight'], p['norm1.bias'])
    high = math.ceil(height / window) * window
    wide = math.ceil(width / window) * window
    grid = x.new_zeros(batch, high, wide, dims)
    grid[:, :height, :width] = x.reshape(batch, height, width, dims)
    grid = torch.roll(grid, (-shift, -shift), (1, 2))
    bias = position_bias(p['attn.w_msa.relative_position_bias_table'], window)
    result = torch.zeros_like(grid)
    for top in range(0, high, window):
        for left in range(0, wide, window):
            area = (slice(None), slice(top, top + window),
                    slice(left, left + window))
            labels = torch.tensor([
                (3 * region(top + i, high, window, shift) +
                 region(left + j, wide, window, shift)) if shift else 0
                for i in range(window) for j in range(window)
            ])
            mask = -100. * (labels[:, None] != labels[None, :])
            tokens = grid[area].reshape(batch, window**2, dims)
            out = attend(tokens, p, heads, bias + mask.to(x))
            result[area] = out.reshape(batch, window, window, dims)
    result = torch.roll(result, (shift, shift), (1, 2))
    return result[:, :height, :width].reshape(batch, -1, dims)


def attend(tokens: Tensor, p: Parameters, heads: int, bias: Tensor) -> Tensor:
    """Multi-head attention of (B, N, C) tokens."""
    dims = tokens.shape[-1]
    qkv = linear(tokens, p['attn.w_msa.qkv.weight'], p['attn.w_msa.qkv.bias'])
    q, k, v = qkv[..., :dims], qkv[..., dims:2 * dims], qkv[..., 2 * dims:]
    size = dims // heads
    outs = []
    for head in range(heads):
        part = slice(head * size, head * size + size)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)
        weights = torch.exp(scores + bias[head])
        weights = weights / weights.sum(-1, keepdim=True)
        outs.append(weights @ v[..., part])
    return linear(
        torch.cat(outs, -1), p['attn.w_msa.proj.weight'],
        p['attn.w_msa.proj.bias'])


def mlp_branch(x: Tensor, p: Parameters) -> Tensor:
    x = layer_norm(x, p['norm2.weight'], p['norm2.bias'])
    x = gelu(linear(x, p['ffn.layers.0.0.weight'], p['ffn.layers.0.0.bias']))
    return linear(x, p['ffn.layers.1.weight'], p['ffn.layers.1.bias'])


class SeededDropPath:
    """Drop-path with the random numbers that the stock one draws.

    Whoever calls it in another order, or on another tensor, sees other
    results.
    """

    def __init__(self, rate: float, seed: int, dtype: torch.dtype) -> None:
        self.keep = 1 - rate
        # Another precision draws other numbers.
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, branch: Tensor) -> Tensor:
        drawn = torch.rand((branch.shape[0], 1, 1),
                           dtype=self.dtype,
                           generator=self.generator).to(branch)
        return branch / self.keep * torch.floor(self.keep + drawn)


def parameters(module: torch.nn.Module,
               dtype=torch.float64) -> Dict[str, Tensor]:
    """Copies of the parameters of a module as leaves of their own."""
    return {
        n: v.detach().to(dtype).requires_grad_()
        for n, v in module.named_parameters()
    }
