"""An activation and its dropout, which keep their input and a mask."""
from typing import Callable, Optional

import torch
import torch.nn as nn
from torch import Tensor

from ..recompute import recomputed

__all__ = ['activate', 'draw', 'drop']


def activate(act: Callable, x: Tensor, dropout: nn.Dropout) -> Tensor:
    """``dropout(act(x))``, made again in backward.

    Kept are ``x`` and, with dropout, a byte per number.

    Args:
        act (Callable): Cheap, and the same each time.
        x (Tensor): Any shape.
        dropout (nn.Dropout): Its rate, and whether it is training.
    """
    keep = draw(x, dropout)
    if keep is None:
        return recomputed(act, x)
    return recomputed(_masked, x, act, keep, dropout.p)


def draw(x: Tensor, dropout: nn.Dropout) -> Optional[Tensor]:
    """What a dropout keeps of ``x``, bools, or None for all of it: the same
    draw as that of PyTorch on a CPU."""
    if not dropout.training or dropout.p == 0:
        return None
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout.p)


def drop(x: Tensor, keep: Optional[Tensor], rate: float) -> Tensor:
    """The dropout of that draw, and its gradient."""
    return x if keep is None else (x * keep).mul_(1 / (1 - rate))


def _masked(x: Tensor, act: Callable, keep: Tensor, rate: float) -> Tensor:
    return drop(act(x), keep, rate)
