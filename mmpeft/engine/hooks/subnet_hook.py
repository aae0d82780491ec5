from random import Random
from typing import Optional, Sequence

from mmengine.hooks import Hook

from ...delta_parts import unwrap
from ...registry import HOOKS
from ..subnets import SubnetSpace

__all__ = ['SubnetHook']


@HOOKS.register_module()
class SubnetHook(Hook):
    """Train a NOAH as a supernet: in each iteration another subnet of it.

    `Neural Prompt Search <https://arxiv.org/abs/2206.04673>`_ (2022). For each
    kind of part a depth is drawn, and for each of so many first blocks a
    width; the other blocks have none. It depends on ``seed`` and the number of
    the iteration alone, so all ranks draw the same, and a resumed run goes on
    with what would have come. Validating and testing take the largest subnet.

    The choices are those of the 19 published subnets of VTAB-1k; for the
    other data sets the paper has 5, 10, 50 and 100. ``tools/search_noah.py``
    searches among the same.

    Args:
        num_tokens (Sequence[int]): Numbers of prompts. Defaults to (1, 5,
            10).
        rank (Sequence[int]): Ranks. Defaults to (1, 5, 10).
        dim (Sequence[int]): Channels of the adapter. Defaults to (1, 5, 10).
        depths (Sequence[int], optional): Numbers of blocks. None means a
            quarter, half, three quarters and all, the paper's 3, 6, 9 and 12
            of 12. Defaults to None.
        seed (int): Seed of the draws. Defaults to 0.

    Raises:
        PEFTError: If the model has no NOAH, or a narrower one.
    """

    # Everything else sees the widths of this iteration.
    priority = 'VERY_HIGH'

    def __init__(self,
                 num_tokens: Sequence[int] = (1, 5, 10),
                 rank: Sequence[int] = (1, 5, 10),
                 dim: Sequence[int] = (1, 5, 10),
                 depths: Optional[Sequence[int]] = None,
                 seed: int = 0) -> None:
        self.choices = dict(num_tokens=num_tokens, rank=rank, dim=dim)
        self.depths = depths
        self.seed = seed
        self._space: Optional[SubnetSpace] = None

    def space(self, model) -> SubnetSpace:
        """The subnets of a model."""
        return SubnetSpace(model, self.choices, self.depths)

    def before_run(self, runner) -> None:
        self._space = self.space(unwrap(runner.model))

    def before_train_iter(self,
                          runner,
                          batch_idx: int,
                          data_batch=None) -> None:
        rng = Random(f'{self.seed} {runner.iter}')
        self._space.activate(self._space.sample(rng))

    def before_val_epoch(self, runner) -> None:
        self._space.activate(self._space.largest())

    def before_test_epoch(self, runner) -> None:
        self._space.activate(self._space.largest())
