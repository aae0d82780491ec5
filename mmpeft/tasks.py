"""Several tasks on one base: deltas that take turns in one model."""
from collections import OrderedDict
from contextlib import contextmanager
from typing import Dict, Iterator, List, Optional

import torch
import torch.nn as nn
from torch import Tensor

from .build import attach as put
from .delta_file import read_delta
from .delta_parts import peft_states, unwrap, write_tensors
from .errors import MergeError, PEFTError
from .injection import eject
from .merging import merged_state_dict
from .state import guard
from .task_set import Tasks, compare, make_task, remember

__all__ = [
    'active', 'attach', 'detach', 'disable', 'list_tasks', 'merge_tasks',
    'set_active'
]

KEY = '_peft_tasks'


def attach(model: nn.Module,
           delta: str,
           name: str,
           activate: bool = True) -> nn.Module:
    """Add a delta to a model that holds its base.

    Examples:
        >>> model = init_detector(stock_config, base)
        >>> mmpeft.attach(model, 'cars_delta.safetensors', 'cars')
        >>> mmpeft.attach(model, 'ships_delta.safetensors', 'ships')
        >>> mmpeft.set_active(model, 'cars')

    Args:
        model (nn.Module): The stock model; nothing of it is copied but what
            a delta replaces, such as the head.
        delta (str): A file as ``PEFTCheckpointHook`` writes it.
        name (str): What it is called from now on.
        activate (bool): Whether to put it in at once. Defaults to True.

    Returns:
        nn.Module: The model.

    Raises:
        PEFTError: If the file is damaged or of another base, if the model
            has methods attached by its config, or if the name is taken; then
            the model is unchanged.
    """
    model = unwrap(model)
    known = getattr(model, KEY, None)
    if known is None:
        if peft_states(model):
            raise PEFTError('This model has methods attached by its config; '
                            'tasks are added to the stock model.')
        known = Tasks(OrderedDict(), {})
    if name in known.found:
        raise PEFTError(f'There is a task {name!r} already; detach it first, '
                        'or choose another name.')
    tensors, header = read_delta(delta)
    before = known.active
    set_active(model, None)
    try:
        task = make_task(model, tensors, header, delta)
        remember(model, known, task)
        known.found[name] = task
        model.__dict__[KEY] = known
        if any(p.build.modules or p.build.networks or p.build.shared
               for p in task.prepared.values()):
            _load(model, known, name, tensors)
    except BaseException:
        set_active(model, None)
        known.found.pop(name, None)
        if not known.found:
            model.__dict__.pop(KEY, None)
        set_active(model, before)
        raise
    set_active(model, name if activate else before)
    return model


def list_tasks(model: nn.Module) -> List[str]:
    """Names of the tasks of a model, in the order they were attached."""
    known = getattr(unwrap(model), KEY, None)
    return list(known.found) if known else []


def active(model: nn.Module) -> Optional[str]:
    """Name of the task that is in; None if that is the base."""
    known = getattr(unwrap(model), KEY, None)
    return known.active if known else None


def set_active(model: nn.Module, name: Optional[str]) -> None:
    """Put in another task, or none.

    What one leaves and the next needs is moved; nothing is built, and the
    base is not copied.

    Raises:
        PEFTError: If there is no task of that name.
    """
    model = unwrap(model)
    known = getattr(model, KEY, None)
    if name is not None and (known is None or name not in known.found):
        raise PEFTError(f'There is no task {name!r}; there are '
                        f'{", ".join(list_tasks(model)) or "none"}.')
    if known is None or name == known.active:
        return
    if known.active is not None:
        _take_out(model, known)
    if name is not None:
        task = known.found[name]
        for path, prepared in task.prepared.items():
            backbone = model.get_submodule(path)
            put(backbone, prepared.state, prepared.build)
            backbone.peft = prepared.state
            guard(backbone, fresh=False)
        write_tensors(model, task.stock)
    known.active = name


def detach(model: nn.Module, name: str) -> None:
    """Forget a task; without the last one the model is stock again.

    Raises:
        PEFTError: If there is no task of that name.
    """
    model = unwrap(model)
    if name not in list_tasks(model):
        raise PEFTError(f'There is no task {name!r}; there are '
                        f'{", ".join(list_tasks(model)) or "none"}.')
    known = getattr(model, KEY)
    if known.active == name:
        set_active(model, None)
    del known.found[name]
    if not known.found:
        del model.__dict__[KEY]


@contextmanager
def disable(model: nn.Module) -> Iterator[nn.Module]:
    """The base, bit for bit, for as long as this lasts."""
    name = active(model)
    set_active(model, None)
    try:
        yield model
    finally:
        set_active(model, name)


def merge_tasks(model: nn.Module, weights: Dict[str, float],
                rest: str) -> 'OrderedDict[str, Tensor]':
    """State dict of the stock model with a weighted sum of changes.

    ``W = W_0 + sum_t w_t (W_t - W_0)`` in float64, rounded once, for the
    weights that were changed by what is merged; heads and whatever else a
    task replaces cannot be averaged and are those of one task.

    Args:
        model (nn.Module): With the tasks attached.
        weights (dict[str, float]): By name of a task.
        rest (str): The task whose heads are taken.

    Raises:
        MergeError: If a method cannot be merged, or trains stock weights of
            the backbone, which then have no change that could be weighted.
        PEFTError: If there is no such task.
    """
    model = unwrap(model)
    known = getattr(model, KEY, Tasks(OrderedDict(), {}))
    with disable(model):
        base = OrderedDict(
            (k, v.clone()) for k, v in model.state_dict().items())
    for name in {*weights, rest}:
        if name not in known.found:
            raise PEFTError(f'There is no task {name!r}; there are '
                            f'{", ".join(list_tasks(model)) or "none"}.')
        inside = [
            k for k in known.found[name].stock if any(
                k.startswith(f'{p}.' if p else '')
                for p in known.found[name].prepared)
        ]
        if inside:
            raise MergeError(
                f'Task {name!r} trains {len(inside)} stock tensors of the '
                f'backbone, such as {inside[0]!r}; only methods that add to '
                'frozen weights can be summed, such as LoRA.')
    before, total = known.active, {}
    try:
        for name, weight in weights.items():
            set_active(model, name)
            merged = merged_state_dict(model)
            for key in set(merged) - set(known.found[name].stock):
                if not torch.equal(merged[key], base[key]):
                    change = merged[key].double() - base[key].double()
                    total[key] = total.get(key, 0) + weight * change
    finally:
        set_active(model, before)
    for key, change in total.items():
        base[key] = (base[key].double() + change).to(base[key].dtype)
    base.update((k, v.clone()) for k, v in known.found[rest].stock.items())
    return base


def _load(model: nn.Module, known: Tasks, name: str,
          tensors: Dict[str, Tensor]) -> None:
    """Write the attached tensors once, with the task in its place."""
    set_active(model, name)
    mine = {k: v for k, v in tensors.items() if '.peft.' in f'.{k}'}
    compare(f'The delta of {name!r} does not fit this model', mine, {
        k: v
        for k, v in model.state_dict().items() if '.peft.' in f'.{k}'
    })
    model.load_state_dict(mine, strict=False)
    set_active(model, None)


def _take_out(model: nn.Module, known: Tasks) -> None:
    task = known.found[known.active]
    own = model.state_dict(keep_vars=True)
    # What moved while it was in stays with it.
    task.stock = {k: own[k].detach().clone() for k in task.stock}
    for path in task.prepared:
        eject(model.get_submodule(path))
    write_tensors(model, {k: known.base[k] for k in task.stock})
