"""How sure a mean over seeds is, by drawing the seeds again."""
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np

from .ranks import places

__all__ = ['DRAWS', 'mean_interval', 'place_intervals']

DRAWS = 10_000
_TAILS = (2.5, 97.5)
Interval = Tuple[float, float]


def _resampled_means(values: Sequence[float],
                     rng: np.random.Generator) -> np.ndarray:
    values = np.asarray(values, float)
    drawn = rng.integers(0, len(values), (DRAWS, len(values)))
    return values[drawn].mean(1)


def mean_interval(values: Sequence[float],
                  seed: int = 0) -> Optional[Interval]:
    """95 % percentile interval of the mean.

    Too narrow for few values: of normal ones, it holds the true mean in 50,
    75, 84 and 89 % of cases with 2, 3, 5 and 10 of them.

    Returns:
        tuple[float, float], optional: None for fewer than two values.
    """
    if len(values) < 2:
        return None
    means = _resampled_means(values, np.random.default_rng(seed))
    low, high = np.percentile(means, _TAILS)
    return float(low), float(high)


def place_intervals(scores: Dict[str, List[float]],
                    seed: int = 0) -> Dict[str, Optional[Tuple[int, int]]]:
    """95 % interval of the place of each mean among all of them.

    The seeds of every method are drawn independently. A method with one seed
    stays where it is, so with such a method the intervals are too narrow.

    Returns:
        dict: None for all if no method has two seeds.
    """
    if all(len(values) < 2 for values in scores.values()):
        return dict.fromkeys(scores)
    rng = np.random.default_rng(seed)
    means = np.stack([_resampled_means(v, rng) for v in scores.values()], 1)
    found = np.sort(places(means), 0)  # whole numbers, so no percentile
    ends = (found[int(DRAWS * tail / 100)] for tail in _TAILS)
    return {m: (int(a), int(b)) for m, a, b in zip(scores, *ends)}
