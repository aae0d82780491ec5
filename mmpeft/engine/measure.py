"""What a model costs: bytes that a forward keeps, and seconds of a step."""
import gc
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

__all__ = ['Kept', 'TrainStep', 'interleave', 'kept_by_forward', 'loss_of']


class Kept(NamedTuple):
    """Bytes that are alive when a forward returns.

    Attributes:
        saved (int): For backward, or in a closure, or in a cache.
        outputs (int): In storages that the outputs look at.
    """

    saved: int
    outputs: int


class StorageRecorder(TorchDispatchMode):
    """Remembers, weakly, every storage that is made while it is active.

    It sees the operations below autograd, so neither checkpointing nor a
    custom autograd function nor a closure hides memory from it. What a kernel
    takes for itself and gives back is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: Dict[int, Tuple[StorageWeakRef, tuple]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = set(map(_address, _tensors((args, kwargs or {}))))
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            if _address(tensor) not in known:
                # The weak reference keeps the address from being used again.
                reference = StorageWeakRef(tensor.untyped_storage())
                self._made[reference.cdata] = (reference,
                                               (str(func),
                                                tuple(tensor.shape)))
        return out

    def alive(self) -> List[Tuple[int, int, tuple]]:
        """Address, bytes, and (operation, shape) of what is alive."""
        found = []
        for address, (reference, made) in self._made.items():
            # A storage can grow and shrink after it was made.
            storage = torch.UntypedStorage._new_with_weak_ptr(address)
            if storage is not None:
                found.append((address, storage.nbytes(), made))
        return found


def _tensors(tree: Any) -> List[Tensor]:
    return [t for t in tree_flatten(tree)[0] if isinstance(t, Tensor)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def kept_by_forward(model: Callable,
                    *inputs: Any,
                    listing: Optional[list] = None) -> Kept:
    """Bytes of the storages made by a forward that are alive after it.

    Call the model once before, so that its caches do not count.

    Args:
        model (nn.Module | Callable): In the mode, and with gradients enabled,
            as it is to be measured.
        *inputs: What it is called with.
        listing (list, optional): Gets (bytes, operation, shape) of each.

    Returns:
        Kept: Deterministic, on any device.
    """
    with StorageRecorder() as recorder:
        output = model(*inputs)
    gc.collect()
    seen = set(map(_address, _tensors(output)))
    sizes = dict(saved=0, outputs=0)
    for address, size, made in recorder.alive():
        sizes['outputs' if address in seen else 'saved'] += size
        if listing is not None:
            listing.append((size, *made))
    return Kept(**sizes)


def loss_of(output: Any) -> Tensor:
    """Sum over the output tensors of the mean of their squares."""
    return sum((t.float()**2).mean() for t in _tensors(output))


class TrainStep:
    """A step: forward, loss, backward, AdamW.

    Args:
        model (nn.Module): Put into training mode.
        *inputs: What it is called with.
        autocast (torch.dtype, optional): Precision of the forward. Defaults
            to None, that of the weights.
        loss (Callable): The loss of what the model returns. Defaults to
            :func:`loss_of`.
        forward_ends (Callable): Called between forward and loss.
    """

    def __init__(self,
                 model: nn.Module,
                 *inputs: Any,
                 autocast: Optional[torch.dtype] = None,
                 loss: Callable[[Any], Tensor] = loss_of,
                 forward_ends: Callable[[], None] = lambda: None) -> None:
        model.train()  # that of a stock Swin returns None
        self.model, self.inputs = model, inputs
        self.autocast, self.loss = autocast, loss
        self.forward_ends = forward_ends
        parameters = list(model.parameters())
        self.device = parameters[0].device.type
        trained = [p for p in parameters if p.requires_grad]
        # Frozen has nothing to train, and a step is its forward.
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6) \
            if trained else None

    def forward(self) -> Any:
        """The outputs, in the precision of the step."""
        with torch.autocast(
                self.device, self.autocast, enabled=self.autocast is not None):
            return self.model(*self.inputs)

    def __call__(self) -> None:
        output = self.forward()
        self.forward_ends()
        if self.optimizer is not None:
            self.loss(output).backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def interleave(
        calls: Dict[str, Callable[[], Any]],
        repeats: int,
        clock: Callable[[], float] = time.perf_counter,
        synchronize: Callable[[], None] = lambda: None,
        progress: Callable[[], None] = lambda: None) -> Dict[str, List[float]]:
    """Seconds of each call, one of each in turn, so that a machine that is
    busy for a while slows all of them alike.

    Args:
        calls (dict[str, Callable]): What is measured.
        repeats (int): Rounds that count, after one that does not.
        clock (Callable): Gives seconds. ``time.process_time`` hides other
            processes, where there is one thread.
        synchronize (Callable): Waits for the device.
        progress (Callable): Called after each call.
    """
    seconds: Dict[str, List[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            synchronize()
            start = clock()
            call()
            synchronize()
            if turn:
                seconds[name].append(clock() - start)
            progress()
    return seconds
