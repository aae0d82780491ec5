"""Which learning rates of a grid to try, and which one is best."""
from typing import Dict, List, Optional, Tuple

__all__ = ['climb', 'ranked', 'RULES']


def ranked(scores: Dict[int, Optional[float]]) -> List[int]:
    """What did not fail, best first; a tie goes to the smaller index."""
    done = [i for i, score in scores.items() if score is not None]
    return sorted(done, key=lambda i: (-scores[i], i))


def climb(count: int, scores: Dict[int, Optional[float]]) -> Tuple[List, List]:
    """Climb a grid from its middle.

    The middle is tried (one entry or two); while the lowest or the highest
    that was tried is the best, or as good, the next one beyond it is.

    Args:
        count (int): Entries of the grid, in ascending order.
        scores (dict[int, float | None]): Of what was tried; None if it
            failed, which counts as tried and not as good.

    Returns:
        tuple[list[int], list[int]]: What to try next, nothing when the walk
        is over; and what was tried, best first, when it is.
    """
    low, high = (count - 1) // 2, count // 2
    while True:
        tried = range(low, high + 1)
        missing = [i for i in tried if i not in scores]
        if missing:
            return missing, []
        order = ranked({i: scores[i] for i in tried})
        best = [i for i in order if scores[i] == scores[order[0]]] or [low]
        if low in best and low > 0:
            low -= 1
        elif high in best and high < count - 1:
            high += 1
        else:
            return [], order


def try_all(count: int, scores: Dict[int,
                                     Optional[float]]) -> Tuple[List, List]:
    """Try the whole grid; arguments and results as those of :func:`climb`."""
    missing = [i for i in range(count) if i not in scores]
    return (missing, []) if missing else ([], ranked(scores))


#: How a plan may choose from its grid.
RULES = dict(climb=climb, all=try_all)
