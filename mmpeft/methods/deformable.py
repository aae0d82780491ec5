"""Deformable attention between the tokens of a ViT and a pyramid."""
import math
from typing import List, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..sites import TokenLayout
from .drop_path import drop_path
from .highway import recompute

__all__ = ['ConvFFN', 'DeformableAttention', 'Extractor', 'Injector', 'split']

#: Height and width of each map of a pyramid.
Sizes = Sequence[Tuple[int, int]]


def split(tokens: Tensor, sizes: Sizes) -> List[Tensor]:
    """Maps (B, C, H, W) out of their tokens (B, N, C)."""
    parts = tokens.split([height * width for height, width in sizes], dim=1)
    return [TokenLayout(hw).to_grid(t) for t, hw in zip(parts, sizes)]


def centers(sizes: Sizes, like: Tensor) -> Tensor:
    """Where the tokens of some maps are.

    Returns:
        Tensor: (N, 2), x and y as parts of the width and the height, in
        float32 at least: bfloat16 has 256 steps from edge to edge.
    """
    dtype, found = torch.promote_types(like.dtype, torch.float32), []
    for height, width in sizes:
        y, x = ((torch.arange(n, device=like.device, dtype=dtype) + .5) / n
                for n in (height, width))
        y, x = y[:, None].expand(height, width), x.expand(height, width)
        found.append(torch.stack([x, y], dim=-1).flatten(0, 1))
    return torch.cat(found)


class DeformableAttention(nn.Module):
    """Each query reads a few points of each map, which it chooses::

        out = W_o sum_lp a_lp V_l(p + o_lp),    V = W_v v

    with the place ``p`` of the query, offsets ``o`` in tokens of the map
    ``l``, linear in the query like the logits of ``a``, whose softmax is over
    all points of a head. Between tokens ``V`` is bilinear, outside the map 0.

    At first the offsets of a head are its points on a ray, 1, 2, ... tokens
    away, the rays are all around, and the points count the same.

    Args:
        dims (int): Width of the tokens.
        inner_dims (int): Width of ``V``.
        num_heads (int): Heads.
        num_points (int): Points of a head in each map.
        num_levels (int): Maps.
    """

    def __init__(self, dims: int, inner_dims: int, num_heads: int,
                 num_points: int, num_levels: int) -> None:
        super().__init__()
        self.shape = (num_heads, num_levels, num_points)
        points = math.prod(self.shape)
        self.offsets = nn.Linear(dims, points * 2)
        self.weights = nn.Linear(dims, points)
        self.value = nn.Linear(dims, inner_dims)
        self.proj = nn.Linear(inner_dims, dims)

    def reset_parameters(self) -> None:
        num_heads, num_levels, num_points = self.shape
        for linear in (self.value, self.proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        for linear in (self.offsets, self.weights):
            nn.init.zeros_(linear.weight)
        nn.init.zeros_(self.weights.bias)
        angles = torch.arange(num_heads) * (2 * math.pi / num_heads)
        rays = torch.stack([angles.cos(), angles.sin()], dim=-1)
        # On the edge of a square, so that the first point is a token.
        rays = rays / rays.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1., num_points + 1)[:, None]
        ring = rays[:, None, None] * steps.expand(num_levels, -1, -1)
        with torch.no_grad():
            self.offsets.bias.copy_(ring.flatten())

    def forward(self, q: Tensor, v: Tensor, q_sizes: Sizes,
                v_sizes: Sizes) -> Tensor:
        """(B, N, d), (B, M, d) -> (B, N, d), both the tokens of maps."""
        num_heads = self.shape[0]
        offsets = self.offsets(q).unflatten(-1, (*self.shape, 2))
        weights = self.weights(q).unflatten(-1, (num_heads, -1)).softmax(-1)
        weights = weights.unflatten(-1, self.shape[1:])
        places = centers(q_sizes, q)[:, None, None]
        out = 0.
        for level, grid in enumerate(split(self.value(v), v_sizes)):
            # Heads go with the batch; -1 and 1 are the edges of the map.
            grid = grid.unflatten(1, (num_heads, -1)).flatten(0, 1)
            size = places.new_tensor(grid.shape[:-3:-1])
            points = 2 * (places + offsets[:, :, :, level] / size) - 1
            seen = F.grid_sample(
                grid.to(points),
                points.transpose(1, 2).flatten(0, 1),
                align_corners=False)
            share = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)
            out = out + (seen * share[:, None]).sum(-1)
        out = out.unflatten(0, (-1, num_heads)).flatten(1, 2)
        return self.proj(out.transpose(1, 2).to(self.proj.weight))


class Reader(nn.Module):
    """One kind of tokens reads another.

    Args:
        attention (DeformableAttention): How.
        dims (int): Width of the tokens.
        with_cp (bool): Whether backward computes it again.
    """

    def __init__(self, attention: DeformableAttention, dims: int,
                 with_cp: bool) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.query_norm = nn.LayerNorm(dims, eps=1e-6)
        self.value_norm = nn.LayerNorm(dims, eps=1e-6)
        self.attention = attention

    def read(self, q: Tensor, v: Tensor, q_sizes: Sizes,
             v_sizes: Sizes) -> Tensor:
        """What the tokens ``q`` get of ``v``, (B, N, d)."""

        def attend(q: Tensor, v: Tensor) -> Tensor:
            return self.attention(
                self.query_norm(q), self.value_norm(v), q_sizes, v_sizes)

        return recompute(self.with_cp, attend, q, v)


class Injector(Reader):
    """``x + gamma * attention(norm(x); norm(c))``, and ``gamma`` starts at 0.

    Args:
        attention (DeformableAttention): Over all maps of the pyramid.
        dims (int): Width ``d``.
        with_cp (bool): Whether backward computes the attention again.
    """

    def __init__(self, attention: DeformableAttention, dims: int,
                 with_cp: bool) -> None:
        super().__init__(attention, dims, with_cp)
        self.gamma = nn.Parameter(torch.empty(dims))

    def forward(self, x: Tensor, c: Tensor, x_size: Tuple[int, int],
                sizes: Sizes) -> Tensor:
        """(B, H * W, d), (B, N, d) -> (B, H * W, d)"""
        branch = self.read(x, c, [x_size], sizes)
        # Autocast would make the stream float32.
        return x + (self.gamma.to(branch.dtype) * branch).to(x.dtype)


class ConvFFN(nn.Module):
    """``W2 gelu(dw3x3(W1 c))``, and the convolution sees each map alone.

    Args:
        dims (int): Width of the tokens.
        hidden_dims (int): Channels of the convolution.
    """

    def __init__(self, dims: int, hidden_dims: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dims, hidden_dims)
        self.conv = nn.Conv2d(
            hidden_dims, hidden_dims, 3, padding=1, groups=hidden_dims)
        self.fc2 = nn.Linear(hidden_dims, dims)

    def forward(self, c: Tensor, sizes: Sizes) -> Tensor:
        """(B, N, d) -> (B, N, d)"""
        maps = map(self.conv, split(self.fc1(c), sizes))
        return self.fc2(
            F.gelu(torch.cat([*map(TokenLayout.to_tokens, maps)], dim=1)))


class Extractor(Reader):
    """What the pyramid reads of the ViT::

        c <- c + attention(norm(c); norm(x))
        c <- c + drop_path(ffn(norm(c)))

    Args:
        attention (DeformableAttention): Over the one map of the ViT.
        dims (int): Width ``d``.
        hidden_dims (int): Channels of the convolution of its ``ffn``.
        drop_path_rate (float): Probability that a sample skips its ``ffn``.
        with_cp (bool): Whether backward computes both branches again.
    """

    def __init__(self, attention: DeformableAttention, dims: int,
                 hidden_dims: int, drop_path_rate: float,
                 with_cp: bool) -> None:
        super().__init__(attention, dims, with_cp)
        self.ffn_norm = nn.LayerNorm(dims, eps=1e-6)
        self.ffn = ConvFFN(dims, hidden_dims)
        self.drop_path_rate = drop_path_rate

    def forward(self, c: Tensor, x: Tensor, sizes: Sizes,
                x_size: Tuple[int, int]) -> Tensor:
        """(B, N, d), (B, H * W, d) -> (B, N, d)"""
        c = c + self.read(c, x, sizes, [x_size])

        def feed(c: Tensor) -> Tensor:
            return self.ffn(self.ffn_norm(c), sizes)

        branch = recompute(self.with_cp, feed, c)
        if self.training:
            branch = drop_path(branch, self.drop_path_rate)
        return c + branch
