"""What of a model belongs to a delta, and what is its base."""
import hashlib
import inspect
from typing import Any, Dict, List, Set

import torch.nn as nn
from mmengine.model import is_model_wrapper
from torch import Tensor

from .backbones.base import class_path
from .delta_file import digest
from .plan import MethodPlan
from .state import PEFTState

__all__ = [
    'arguments_of', 'backbones_of', 'base_of', 'delta_names', 'fingerprint',
    'missing_in', 'peft_states', 'plain', 'unwrap', 'write_tensors'
]


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside a wrapper for several ranks."""
    return model.module if is_model_wrapper(model) else model


def write_tensors(model: nn.Module, values: Dict[str, Tensor]) -> None:
    """Write tensors into a model in place, past hooks that would note it."""
    own = model.state_dict(keep_vars=True)
    for name, value in values.items():
        own[name].data.copy_(value)


def peft_states(model: nn.Module) -> Dict[str, PEFTState]:
    """By path, what the backbones with something attached remember."""
    return {
        name.rpartition('peft')[0].rstrip('.'): module
        for name, module in model.named_modules()
        if isinstance(module, PEFTState)
    }


def delta_names(model: nn.Module) -> Set[str]:
    """Names in the state dict that belong to a delta.

    What was attached; stock parameters that train; and buffers of what may
    have moved: of modules that train, and of all outside the backbones that
    have parameters or statistics at all (a frozen neck in training mode moves
    its BatchNorm statistics).
    """
    states = peft_states(model)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    inside = tuple(f'{path}.' if path else '' for path in states)
    persistent = model.state_dict(keep_vars=True)
    parameters = dict(model.named_parameters())
    for name in persistent:
        if '.peft.' in f'.{name}':
            names.add(name)
        elif name not in parameters:
            owner = model.get_submodule(name.rpartition('.')[0])
            trains = any(
                p.requires_grad for p in owner.parameters(recurse=False))
            if trains or not name.startswith(inside):
                names.add(name)
    return names & set(persistent)


def base_of(model: nn.Module) -> Dict[str, Tensor]:
    """The frozen parameters, by name."""
    return {
        n: p
        for n, p in model.named_parameters()
        if not p.requires_grad and '.peft.' not in f'.{n}'
    }


def fingerprint(tensors: Dict[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes, in order of the names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        total.update(f'{name} {value.dtype} {tuple(value.shape)} '
                     f'{digest(value)}\n'.encode())
    return total.hexdigest()


def missing_in(model: nn.Module, found: Dict[str, Tensor]) -> List[str]:
    """Frozen parameters that are not, bit for bit, among the found tensors.

    Empty if that is more than a tenth of the base: then the base was
    converted on its way into the model, and belongs in no delta.
    """
    base = base_of(model)
    missing = [
        n for n, p in base.items() if n not in found
        or found[n].dtype != p.dtype or not found[n].equal(p.cpu())
    ]
    size = sum(base[n].numel() for n in missing)
    return missing if 10 * size <= sum(p.numel() for p in base.values()) \
        else []


def backbones_of(model: nn.Module) -> Dict[str, dict]:
    """By path, stock class and methods of the backbones of a model, with all
    their arguments."""
    return {
        path:
        dict(
            stock=class_path(type(model.get_submodule(path))),
            method=[_whole(MethodPlan(cfg)) for cfg in state.plans])
        for path, state in peft_states(model).items()
    }


def _whole(plan: MethodPlan) -> dict:
    """A method config with its defaults, so that equal ones look equal."""
    return plain(
        dict(
            type=plan.cls.__name__,
            name=plan.name,
            layers=plan.layers,
            overrides=plan.overrides,
            **{
                **arguments_of(plan.cls),
                **plan.kwargs
            }))


def arguments_of(cls: type) -> Dict[str, Any]:
    """Arguments of a method that have a default."""
    return {
        p.name: p.default
        for p in inspect.signature(cls.__init__).parameters.values()
        if p.default is not inspect.Parameter.empty
    }


def plain(value: Any) -> Any:
    """Only what JSON has; a class by its name."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, type):
        return value.__name__
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, 'tolist'):
        return value.tolist()
    return str(value)
