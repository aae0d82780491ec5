"""Numbers as the cells of a report show them."""
from typing import Optional, Sequence

from .markdown import spread
from .summary import MethodSummary

__all__ = [
    'NOTHING', 'millions', 'percent', 'place', 'score_text', 'scaled', 'signed'
]

NOTHING = spread([])
MEBI = 2.**20


def percent(value: Optional[float]) -> str:
    """Two digits; the values are percent already."""
    return NOTHING if value is None else f'{value:.2f}'


def signed(value: float) -> str:
    """With its sign."""
    return f'{value:+.2f}'


def millions(value: Optional[float]) -> str:
    """Parameters in millions, four digits that count."""
    if value is None:
        return NOTHING
    if value == 0:
        return '0'
    value /= 1e6
    return f'{value:.2f}' if value >= 10 else f'{value:.4f}'


def scaled(value: Optional[float], unit: float, digits: int) -> str:
    """``value`` in a unit."""
    return NOTHING if value is None else f'{value / unit:.{digits}f}'


def place(rank: Optional[int], all_ranks: Sequence[Optional[int]]) -> str:
    """``3``, or ``=3`` where others share it."""
    if rank is None:
        return '–'
    return f'={rank}' if list(all_ranks).count(rank) > 1 else str(rank)


def score_text(method: MethodSummary) -> str:
    """Mean and sample standard deviation."""
    return spread(list(method.scores.values()))
