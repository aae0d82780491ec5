"""State of the random numbers of a run, to go on where it stopped."""
import random
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List

import numpy as np
import torch
from mmengine.dist import all_gather_object, get_rank

__all__ = [
    'gather_randomness', 'own_randomness', 'restore_randomness', 'seed_all'
]


def gather_randomness() -> List[Dict[str, Any]]:
    """The state of every rank; all ranks have to call this."""
    return all_gather_object(_state())


@contextmanager
def own_randomness(seed: int = 0) -> Iterator[None]:
    """Draw from other numbers than the run, which goes on as if nothing had
    been drawn."""
    state = _state()
    seed_all(seed)
    try:
        yield
    finally:
        _restore(state)


def seed_all(seed: int) -> None:
    """Begin the numbers of Python, numpy and torch anew."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _state() -> Dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state = dict(
        python=random.getstate(),
        numpy=(kind, torch.from_numpy(keys.astype(np.int64)), position,
               has_gauss, gauss),
        torch=torch.get_rng_state())
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def restore_randomness(runner, states: List[Dict[str, Any]]) -> None:
    """Put the state of this rank back before the next batch is read.

    A loop over iterations reads and drops the batches that were seen, which
    draws numbers as well, so this waits until they are through.
    """
    if get_rank() >= len(states):
        return
    state, loop = states[get_rank()], runner.train_loop
    batches = getattr(loop, 'dataloader_iterator', None)
    if batches is None:
        _restore(state)
    else:
        loop.dataloader_iterator = _Resumed(batches, loop.iter, state)


class _Resumed:
    """Batches, of which the first ``skip`` are dropped by the loop."""

    def __init__(self, batches, skip: int, state: Dict[str, Any]) -> None:
        self.batches = batches
        self.skip = skip
        self.state = state

    def __iter__(self):
        return self

    def __next__(self):
        if self.skip == 0:
            # Making an iterator over the data draws a number, too.
            if hasattr(self.batches, '_ensure_iterator'):
                self.batches._ensure_iterator()
            _restore(self.state)
        self.skip -= 1
        return next(self.batches)

    def skip_iter(self, count: int) -> None:
        """What newer loops call instead of reading them."""
        self.batches.skip_iter(count)
        self.skip = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)


def _restore(state: Dict[str, Any]) -> None:
    random.setstate(_tuples(state['python']))
    kind, keys, *rest = state['numpy']
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state['torch'].cpu())
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value,
                                                    (list, tuple)) else value
