"""Ranks, and how far two orders agree."""
import math
from itertools import permutations
from typing import NamedTuple, Optional, Sequence

import numpy as np

__all__ = ['Agreement', 'agreement', 'places', 'spearman', 'kendall']

# up to this many values all orders are tried, 5040 of them
_ALL_ORDERS = 7
_DRAWS = 10_000


class Agreement(NamedTuple):
    """Two orders of the same ``count`` things.

    ``p`` of each coefficient is the share of orders, drawn at random, that
    agree or disagree with the other at least as much.
    """
    count: int
    spearman: float
    spearman_p: float
    kendall: float
    kendall_p: float


def _mid_ranks(values: Sequence[float]) -> np.ndarray:
    """1 for the largest; equal values share the mean of their ranks."""
    values = np.asarray(values, float)
    above = (values[None] > values[:, None]).sum(1)
    same = (values[None] == values[:, None]).sum(1)
    return above + (same + 1) / 2


def places(values: Sequence[float]) -> np.ndarray:
    """1 for the largest; equal values share the best place, as in sports.

    Args:
        values (Sequence[float]): ``(n, )``, or ``(..., n)`` to rank each row.
    """
    values = np.asarray(values, float)
    return 1 + (values[..., None, :] > values[..., :, None]).sum(-1)


def _pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of ``(n, )`` with each row of ``(..., n)``; nan if either is flat."""
    a = a - a.mean()
    b = b - b.mean(-1, keepdims=True)
    scale = math.sqrt((a * a).sum()) * np.sqrt((b * b).sum(-1))
    with np.errstate(divide='ignore', invalid='ignore'):
        return (b * a).sum(-1) / scale


def _signs(values: np.ndarray) -> np.ndarray:
    """``(..., n)`` -> ``(..., n(n-1)/2)``: which of each pair is larger."""
    first, second = np.triu_indices(values.shape[-1], 1)
    return np.sign(values[..., first] - values[..., second])


def _tau(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Kendall's tau-b of ``(n, )`` with each row of ``(..., n)``."""
    a, b = _signs(a), _signs(b)
    scale = math.sqrt((a * a).sum()) * np.sqrt((b * b).sum(-1))
    with np.errstate(divide='ignore', invalid='ignore'):
        return (b * a).sum(-1) / scale


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rho; equal values share the mean of their ranks."""
    return float(_pearson(_mid_ranks(a), _mid_ranks(b)))


def kendall(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's tau-b."""
    return float(_tau(np.asarray(a, float), np.asarray(b, float)))


def agreement(a: Sequence[float],
              b: Sequence[float],
              seed: int = 0) -> Optional[Agreement]:
    """Compares the orders of two sequences of the same things.

    Args:
        a (Sequence[float]): A value for each thing.
        b (Sequence[float]): Another.
        seed (int): Of the orders drawn where there are too many to try all.
            Defaults to 0.

    Returns:
        Agreement, optional: None for fewer than three things, or where all
        values of a sequence are equal.
    """
    if len(a) != len(b):
        raise ValueError(f'{len(a)} values cannot be compared with {len(b)}.')
    if len(a) < 3 or len(set(a)) < 2 or len(set(b)) < 2:
        return None
    count = len(a)
    if count <= _ALL_ORDERS:
        orders = np.array(list(permutations(range(count))))
    else:
        rng = np.random.default_rng(seed)
        orders = np.argsort(rng.random((_DRAWS, count)), axis=1)
        orders[0] = np.arange(count)  # the order that was found is one, too
    ranks_a, ranks_b = _mid_ranks(a), _mid_ranks(b)
    rho, tau = spearman(a, b), kendall(a, b)
    all_rho = _pearson(ranks_a, ranks_b[orders])
    all_tau = _tau(ranks_a, ranks_b[orders])
    # coefficients of equal orders differ in their last bits
    return Agreement(count, rho, float((abs(all_rho)
                                        >= abs(rho) - 1e-9).mean()), tau,
                     float((abs(all_tau) >= abs(tau) - 1e-9).mean()))
