"""The rule behind the numbers in ``tests/data`` and how they are compared.

The numbers were recorded from the code released with Mona; the note beside
them says how. Parameters and inputs follow a rule that depends on names and
shapes only, so no tensor of either side had to be stored.
"""
import os.path as osp
import zlib
from typing import Dict, Sequence

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

DATA = osp.join(osp.dirname(osp.dirname(osp.abspath(__file__))), 'data')
NUM_DIGITS = 16


def draw(name: str, shape: Sequence[int]) -> np.ndarray:
    """Standard normal numbers that belong to a name.

    The stream of ``RandomState`` is frozen over the versions of numpy.
    """
    seed = zlib.crc32(name.encode())
    return np.random.RandomState(seed).standard_normal(tuple(shape))


def value(name: str, shape: Sequence[int]) -> np.ndarray:
    """Value of a parameter: matrices keep the scale of their input, scales
    are near 1, biases near 0."""
    numbers = draw(name, shape)
    if len(shape) > 1:
        return numbers / np.sqrt(np.prod(shape[1:]))
    leaf = name.rsplit('.', 1)[-1]
    return 0.1 * numbers + (leaf in ('weight', 'gamma', 'gammax'))


def fill(module: nn.Module) -> None:
    """Set every parameter of a module by the rule."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(value(name, parameter.shape)))


def tensor(name: str, *shape: int, dtype=torch.float64) -> Tensor:
    """An input by the rule."""
    return torch.from_numpy(draw(name, shape)).to(dtype)


def digest(name: str, array: np.ndarray) -> np.ndarray:
    """A few numbers in place of a large array: each one is the product of the
    whole array and a seeded vector."""
    array = np.asarray(array, dtype=np.float64).ravel()
    return draw('digest ' + name, (NUM_DIGITS, array.size)) @ array


def load(case: str) -> Dict[str, np.ndarray]:
    """Recorded arrays of one case."""
    with np.load(osp.join(DATA, f'{case}.npz')) as file:
        return dict(file)


def difference(ours, recorded) -> float:
    """Largest difference, relative to the largest entry."""
    ours, recorded = (
        np.asarray(
            a.detach() if isinstance(a, Tensor) else a, dtype=np.float64)
        for a in (ours, recorded))
    assert ours.shape == recorded.shape, (ours.shape, recorded.shape)
    return float(np.abs(ours - recorded).max() / np.abs(recorded).max())


def grad_digests(grads: Dict[str, Tensor]) -> np.ndarray:
    """One row of digits for each gradient, sorted by name."""
    return np.stack([digest(n, grads[n].numpy()) for n in sorted(grads)])
