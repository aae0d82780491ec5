from typing import Any, Iterator, List

import torch
from mmengine.dist import get_dist_info
from mmengine.hooks import Hook

from ...calibration import calibrate, task_loss, uncalibrated
from ...contrast import contrastive_loss
from ...delta_parts import unwrap
from ...errors import PEFTError
from ...methods.base import check_width
from ...registry import HOOKS
from ..randomness import seed_all
from .peft_checkpoint_hook import in_shards

__all__ = ['CalibrateHook']

LOSSES = ('task', 'contrastive')


@HOOKS.register_module()
class CalibrateHook(Hook):
    """Let methods that need it look at training data before the first step.

    For SCT and GPS; see :func:`mmpeft.calibrate`. Samples are drawn from the
    training data by a seed of their own, through its pipeline, each with the
    same augmentation whatever the number of ranks; the random numbers and the
    order of the data of the run stay as they are without this. The choice is
    in every checkpoint, and a run that is resumed, or starts from weights that
    have it, does not look again. One that was interrupted does, and chooses
    the same.

    Args:
        num_samples (int): How many to look at; all, if there are fewer.
            Defaults to 1000, as many as the papers' benchmark (VTAB-1k) has.
        loss (str): Whose gradient GPS chooses by: ``'task'``, that of the
            model, or ``'contrastive'``, the supervised contrastive loss of
            two views of each image, for classification. Defaults to
            ``'task'``.
        seed (int): Of the samples and their augmentation. Defaults to 0.

    Raises:
        PEFTError: If the training data cannot be read by number, or the
            parameters are in shards.
    """

    # Behind what loads, before what counts.
    priority = 'ABOVE_NORMAL'

    def __init__(self,
                 num_samples: int = 1000,
                 loss: str = 'task',
                 seed: int = 0) -> None:
        check_width('CalibrateHook', 'num_samples', num_samples, float('inf'))
        if loss not in LOSSES:
            raise PEFTError(f'CalibrateHook: loss={loss!r} must be one of '
                            f'{", ".join(LOSSES)}.')
        self.num_samples = num_samples
        self.loss = loss
        self.seed = seed

    def before_train(self, runner) -> None:
        model = unwrap(runner.model)
        waiting = uncalibrated(model)
        if not waiting:
            return
        names = ', '.join(sorted({type(m).__name__ for m in waiting}))
        if in_shards(runner.model):
            raise PEFTError(
                f'{names} cannot look at data while the parameters are in '
                'shards; let a run of one iteration without FSDP do so, and '
                'start from its checkpoint with load_from.')
        loader = runner.train_loop.dataloader
        dataset = loader.dataset
        if not (hasattr(dataset, '__len__')
                and hasattr(dataset, '__getitem__')):
            raise PEFTError(
                f'{names} cannot look at the samples of '
                f'{type(dataset).__name__} by number; call mmpeft.calibrate('
                'model, batches) before training.')
        mine = self._share(len(dataset))
        runner.logger.info(f'{names} {len(waiting)} times looks at '
                           f'{len(mine)} samples on this rank.')
        contrast = self.loss == 'contrastive'
        calibrate(
            model,
            self._batches(loader, mine, _size(runner, loader), contrast),
            loss=contrastive_loss if contrast else task_loss)

    def _share(self, size: int) -> List[int]:
        """Numbers of the samples of this rank, as many as on the others."""
        rank, ranks = get_dist_info()
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(size, generator=generator).tolist()
        count = max(min(self.num_samples, size) // ranks, 1)
        return [order[(i * ranks + rank) % size] for i in range(count)]

    def _batches(self, loader, numbers: List[int], batch_size: int,
                 contrast: bool) -> Iterator[Any]:
        for start in range(0, len(numbers), batch_size):
            batch = numbers[start:start + batch_size]
            views = [
                loader.collate_fn(
                    [self._sample(loader.dataset, n, view) for n in batch])
                for view in range(1 + contrast)
            ]
            # Heads draw samples of their own.
            seed_all(self.seed + start)
            yield views if contrast else views[0]

    def _sample(self, dataset, number: int, view: int) -> Any:
        """One sample, augmented alike in every run."""
        seed_all(self.seed + 2 * number + view)
        return dataset[number]


def _size(runner, loader) -> int:
    """Samples of a batch."""
    return loader.batch_size or getattr(loader.batch_sampler, 'batch_size', 1)
