"""Drop-path of branches that are no part of the stock blocks."""
from torch import Tensor

__all__ = ['drop_path']


def drop_path(branch: Tensor, rate: float) -> Tensor:
    """A branch without the samples that skip it, for training.

    Args:
        branch (Tensor): (B, N, d).
        rate (float): Probability that a sample skips it; the others make up
            for it.
    """
    if not rate:
        return branch
    keep = 1 - rate
    kept = branch.new_empty(branch.shape[0], 1, 1).bernoulli_(keep)
    return branch * kept / keep
