"""A depthwise filter of token maps, and its gradients."""
from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['depthwise', 'depthwise_backward']

# The largest tile that oneDNN is fast for (measured on a CPU).
TILE = 32


def depthwise(tokens: Tensor, kernel: Tensor, hw_shape: Tuple[int,
                                                              int]) -> Tensor:
    """Each channel of a token map with a filter of its own, padded by zeros.

    Args:
        tokens (Tensor): (B, H * W, C).
        kernel (Tensor): (C, 1, k, k), k odd.
        hw_shape (tuple[int, int]): H and W.

    Returns:
        Tensor: (B, H * W, C).
    """
    grid = F.conv2d(
        _grid(tokens, hw_shape),
        kernel,
        padding=kernel.shape[-1] // 2,
        groups=len(kernel))
    return grid.permute(0, 2, 3, 1).flatten(1, 2)


def depthwise_backward(grad: Tensor, tokens: Tensor, kernel: Tensor,
                       hw_shape: Tuple[int, int]) -> Tuple[Tensor, Tensor]:
    """Gradients of ``tokens`` and ``kernel``.

    The first is ``grad``, filtered with the kernel turned by half a circle,
    so it is computed as a forward: that of PyTorch is up to 300 times slower
    for maps with channels last (CPU, torch 2.1, 7 x 7), which token maps are.
    For the second see :func:`kernel_grad`.
    """
    d_tokens = depthwise(grad, kernel.flip(2, 3).to(grad), hw_shape)
    if grad.device.type == 'cpu' and grad.dtype != torch.float64:
        return d_tokens, kernel_grad(grad, tokens, kernel, hw_shape)
    d_kernel = torch.ops.aten.convolution_backward(
        _grid(grad, hw_shape), _grid(tokens.to(grad),
                                     hw_shape), kernel.to(grad),
        None, [1, 1], [kernel.shape[-1] // 2] * 2, [1, 1], False, [0, 0],
        len(kernel), [False, True, False])[1]
    return d_tokens, d_kernel.to(kernel)


def kernel_grad(grad: Tensor,
                tokens: Tensor,
                kernel: Tensor,
                hw_shape: Tuple[int, int],
                tile: int = TILE) -> Tensor:
    r"""The gradient of a depthwise kernel, as a forward of a convolution::

        dK[c, i, j] = sum over y, x of  t[c, y + i, x + j] do[c, y, x]

    is the map of k x k places that ``do[c]``, as a filter, makes of ``t[c]``.
    Such a filter is large, so it is taken apart into tiles, each a channel of
    its own with the piece of ``t`` that it sees, and the results are added up.

    In oneDNN this takes a fifth to two thirds of the time of PyTorch's own
    (fp32, 7 x 7, from 128 to 16 tokens a side), and rounds less.

    Args:
        grad (Tensor): (B, H * W, C), of the output.
        tokens (Tensor): (B, H * W, C), the input.
        kernel (Tensor): (C, 1, k, k), for its shape and precision.
        hw_shape (tuple[int, int]): H and W.
        tile (int): Largest side of a tile.

    Returns:
        Tensor: (C, 1, k, k).
    """
    edge = kernel.shape[-1] // 2
    # As few tiles as possible, of the same size.
    sides = [-(-n // -(-n // tile)) for n in hw_shape]
    lower, right = (-n % side for n, side in zip(hw_shape, sides))
    filters = F.pad(
        grad.to(kernel).unflatten(1, hw_shape), (0, 0, 0, right, 0, lower))
    pieces = F.pad(
        tokens.to(kernel).unflatten(1, hw_shape),
        (0, 0, edge, edge + right, edge, edge + lower))
    # (B, H, W, C) -> (B, tiles down, tiles across, C, height, width)
    for dim, side in enumerate(sides, 1):
        filters = filters.unfold(dim, side, side)
        pieces = pieces.unfold(dim, side + 2 * edge, side)
    filters = filters.reshape(-1, 1, *sides)
    pieces = pieces.reshape(1, len(filters), *pieces.shape[-2:])
    sums = F.conv2d(pieces, filters, groups=len(filters))
    return sums.view(-1, *kernel.shape).sum(0)


def _grid(tokens: Tensor, hw_shape: Tuple[int, int]) -> Tensor:
    """(B, H * W, C) -> (B, C, H, W), with channels last in memory"""
    return tokens.unflatten(1, hw_shape).permute(0, 3, 1, 2)
