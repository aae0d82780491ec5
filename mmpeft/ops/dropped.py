"""An activation and its dropout, which keep their input and a mask."""
from typing import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..recompute import recomputed

__all__ = ['activate', 'gelu_dropout']


def gelu_dropout(x: Tensor, dropout: nn.Dropout) -> Tensor:
    """``dropout(gelu(x))``; see :func:`activate`."""
    return activate(F.gelu, x, dropout)


def activate(act: Callable, x: Tensor, dropout: nn.Dropout) -> Tensor:
    """``dropout(act(x))``, made again in backward.

    Kept are ``x`` and, with dropout, a byte per number: the same draw as
    that of PyTorch on a CPU.

    Args:
        act (Callable): Cheap, and the same each time.
        x (Tensor): Any shape.
        dropout (nn.Dropout): Its rate, and whether it is training.
    """
    if not dropout.training or dropout.p == 0:
        return recomputed(act, x)
    keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout.p)
    return recomputed(_masked, x, act, keep, 1 / (1 - dropout.p))


def _masked(x: Tensor, act: Callable, keep: Tensor, scale: float) -> Tensor:
    return act(x).masked_fill(~keep, 0) * scale
