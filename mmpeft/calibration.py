"""The look at data that some methods take before training."""
from contextlib import contextmanager
from functools import partial
from typing import Any, Callable, Iterable, Iterator, List, Optional, Tuple

import torch
import torch.nn as nn
from mmengine.dist import all_reduce, broadcast
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from .backbones.attached import BlockPEFT
from .delta_parts import peft_states, unwrap
from .engine.randomness import own_randomness
from .errors import PEFTError
from .label_maps import label_maps
from .methods.calibrated import Calibrated
from .state import refuse_random_base

__all__ = ['calibrate', 'task_loss', 'uncalibrated']


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Optional[Callable[[nn.Module, Any], Tensor]] = None,
    labels: Optional[Callable[[nn.Module, Any], Optional[Tensor]]] = None
) -> nn.Module:
    """Let methods that need it look at data, once, before training.

    SCT chooses channels by what the frozen model makes of the data, GPS
    weights by the gradient of the loss. A Runner with ``CalibrateHook`` does
    this by itself.

    The model is as it was afterwards but for the choices: parameters,
    statistics, gradients, modes and random numbers. Blocks run without
    drop-path and dropout. All ranks have to call this, each with its share of
    the data and as many batches as the others; all get the same choices. What
    has been chosen before stays.

    Examples:
        >>> mmpeft.apply(model, 'SCT')
        >>> mmpeft.calibrate(model, itertools.islice(train_loader, 100))

    Args:
        model (nn.Module): A model or backbone with methods attached, its base
            loaded.
        batches (Iterable): What the model is trained on, as its data loader
            gives it.
        loss (Callable, optional): ``(model, batch) -> loss``. None takes that
            of a model of OpenMMLab.
        labels (Callable, optional): ``(model, batch) -> classes``, as
            :func:`mmpeft.label_maps.label_maps` has them. None takes those of
            the data samples; without any all tokens are of one class.

    Returns:
        nn.Module: The same model.

    Raises:
        PEFTError: If there is no batch, or the parameters are in shards.
    """
    inner = unwrap(model)
    waiting = uncalibrated(inner)
    if not waiting:
        return model
    choices = {}
    with _as_it_was(inner), own_randomness():
        watch = _Watch(inner, waiting, labels)
        try:
            watch.over(batches, loss or task_loss)
        finally:
            watch.release()
        for module in waiting:
            total = module.total(watch.num_classes)
            all_reduce(total)
            choices[module] = module.chosen(total)
            broadcast(choices[module])
    # Only now, so that what is interrupted has changed nothing.
    for module, index in choices.items():
        module.settle_on(index)
    return model


def uncalibrated(model: nn.Module) -> List[Calibrated]:
    """Attached modules that have yet to look at data."""
    return [
        m for m in model.modules()
        if isinstance(m, Calibrated) and not m.is_calibrated
    ]


def task_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss of a model of OpenMMLab for a batch of its data loader."""
    if not hasattr(model, 'data_preprocessor'):
        raise PEFTError(f'{type(model).__name__} is no model of OpenMMLab, '
                        'whose loss were known; give mmpeft.calibrate a loss='
                        'function of (model, batch).')
    data = model.data_preprocessor(batch, True)
    return model.parse_losses(model._run_forward(data, mode='loss'))[0]


class _Seen(BaseException):
    """The backbone has run, and nobody needs what follows."""


class _Watch:
    """Shows the modules what passes them.

    Args:
        model (nn.Module): All of it.
        waiting (list[Calibrated]): Who is to choose.
        labels (Callable, optional): As for :func:`calibrate`.
    """

    def __init__(self, model: nn.Module, waiting: List[Calibrated],
                 labels: Optional[Callable]) -> None:
        self.model = model
        self.label_of = labels
        self.labels: Optional[Tensor] = None
        self.num_classes = 1
        # Checkpointed blocks run once more in backward.
        self.forward = False
        self.weights = [w for m in waiting for w in m.stock_weights()]
        for weight in self.weights:
            weight.requires_grad_()
        self.handles: list = []
        mine = set(waiting)
        hosts = {
            model.get_submodule(path): state
            for path, state in peft_states(model).items()
        }
        for host in hosts:
            for owner in host.modules():
                if isinstance(owner, BlockPEFT):
                    for modules in owner.values():
                        for module in mine & set(modules.values()):
                            self._hook(module, partial(self.show, owner))
        if not self.weights and len(hosts) == 1:
            self._hook(next(iter(hosts)), self.stop)
        if isinstance(getattr(model, 'data_preprocessor', None), nn.Module):
            self._hook(model.data_preprocessor, self.take_labels)

    def _hook(self, module: nn.Module, hook: Callable) -> None:
        self.handles.append(module.register_forward_hook(hook))

    def release(self) -> None:
        for handle in self.handles:
            handle.remove()

    def take_labels(self, module: nn.Module, args: tuple, data: Any) -> None:
        """Forward hook of the preprocessor."""
        if isinstance(data, dict) and isinstance(data.get('inputs'), Tensor):
            self.keep(
                label_maps(
                    data.get('data_samples'), data['inputs'].shape[-2:]))

    def keep(self, labels: Optional[Tensor]) -> None:
        self.labels = labels
        if labels is not None:
            self.num_classes = max(self.num_classes, int(labels.max()) + 1)

    def show(self, owner: BlockPEFT, module: Calibrated, args: tuple,
             output: Tensor) -> None:
        """Forward hook of a module."""
        if self.forward:
            module.see(output.detach(), args[2] or owner.layout, self.labels)

    def stop(self, *args) -> None:
        """Forward hook of the backbone."""
        raise _Seen

    def over(self, batches: Iterable[Any], loss: Callable) -> None:
        """Look at all batches."""
        count = 0
        for count, batch in enumerate(batches, 1):
            if self.label_of is not None:
                self.keep(self.label_of(self.model, batch))
            self.forward = True
            try:
                with torch.set_grad_enabled(bool(self.weights)):
                    value = loss(self.model, batch)
            except _Seen:
                continue
            finally:
                self.forward = False
            if self.weights:
                value.backward()
        if count == 0:
            raise PEFTError('mmpeft.calibrate was given no batch to look at.')
        most = torch.tensor([self.num_classes])
        all_reduce(most, op='max')
        self.num_classes = int(most)


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Still the model, and leave nothing behind but what was chosen."""
    modes = {m: m.training for m in model.modules()}
    flags = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    buffers = [(m, name, b, b.clone()) for m in modes
               for name, b in m._buffers.items() if b is not None]
    mixing = _without_mixing(model)
    try:
        model.train()
        for path in peft_states(model):
            host = model.get_submodule(path)
            refuse_random_base(host, ())
            host.eval()
        for module in modes:
            if isinstance(module, (_BatchNorm, _DropoutNd)):
                module.eval()
        for parameter in flags:
            parameter.requires_grad_(False)
            parameter.grad = None
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, (flag, grad) in flags.items():
            parameter.requires_grad_(flag)
            parameter.grad = grad
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer
            buffer.data.copy_(value)
        if mixing is not None:
            model.data_preprocessor.batch_augments = mixing


def _without_mixing(model: nn.Module) -> Any:
    """Take Mixup and CutMix away, which leave an image without a class."""
    preprocessor = getattr(model, 'data_preprocessor', None)
    mixing = getattr(preprocessor, 'batch_augments', None)
    if type(mixing).__name__ != 'RandomBatchAugment':
        return None
    preprocessor.batch_augments = _unmixed
    return mixing


def _unmixed(inputs: Tensor, scores: Tensor) -> Tuple[Tensor, Tensor]:
    """In the place of mmpretrain's batch augmentation: images, and scores of
    classes, which are those of one class each."""
    return inputs, scores.float()
