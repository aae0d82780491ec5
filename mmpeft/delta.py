"""From a model to a delta, and back onto the same base."""
import hashlib
import importlib
import inspect
from typing import Any, Dict, List, Optional, Sequence, Set

import torch.nn as nn
from mmengine.model import is_model_wrapper
from torch import Tensor

from .backbones.base import class_path
from .delta_file import Header, digest, read_delta, write_delta
from .errors import PEFTError
from .plan import MethodPlan
from .state import PEFTState
from .version import __version__

__all__ = [
    'apply_delta', 'backbones_of', 'check_base', 'check_methods',
    'check_names', 'delta_names', 'fingerprint', 'load_delta', 'make_header',
    'missing_in', 'peft_states', 'save_delta'
]

PACKAGES = ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain',
            'timm')


def save_delta(
    model: nn.Module,
    path: str,
    sources: Sequence[dict] = (),
    meta: Optional[dict] = None,
    state: Optional[Dict[str, Tensor]] = None,
    extra: Sequence[str] = ()
) -> Header:
    """Write what a model learned, without its frozen base.

    Args:
        model (nn.Module): A model or backbone with methods attached.
        path (str): File to write; ``mmengine`` knows it as a delta if its
            name ends in ``.safetensors``.
        sources (Sequence[dict]): Where the base came from, each with
            ``checkpoint``, ``at`` (path in the model) and ``prefix`` (in the
            file).
        meta (dict, optional): Goes into the header.
        state (dict, optional): State dict to take the tensors from, such as
            that of an average over time. Defaults to the model's own.
        extra (Sequence[str]): Frozen parameters to write all the same,
            because no source has them, such as output norms.

    Returns:
        Header: The header of the file.

    Raises:
        PEFTError: If nothing is attached.
    """
    model = unwrap(model)
    header = make_header(model, sources, meta)
    names = delta_names(model) | set(extra)
    state = model.state_dict() if state is None else state
    write_delta(path, {k: v for k, v in state.items() if k in names}, header)
    return header


def load_delta(model: nn.Module, path: str) -> Header:
    """Load a delta into a model that holds its base.

    Everything is checked before the first tensor is written.

    Args:
        model (nn.Module): Built with the methods of the delta, its base
            weights loaded.
        path (str): The file.

    Raises:
        PEFTError: If the file is damaged, or of another method, base or
            architecture; then the model is unchanged.
    """
    model = unwrap(model)
    tensors, header = read_delta(path)
    extra = set(header.base['names'])
    check_methods(model, header, path)
    check_tensors(model, {
        k: v
        for k, v in tensors.items() if k not in extra
    }, path)
    check_base(model, header, path, {
        k: v
        for k, v in tensors.items() if k in extra
    })
    apply_delta(model, tensors)
    return header


def apply_delta(model: nn.Module, tensors: Dict[str, Tensor]) -> None:
    """Write checked tensors into a model; its base counts as loaded."""
    model.load_state_dict(tensors, strict=False)
    for state in peft_states(model).values():
        state.base_checked = True


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside a wrapper for several ranks."""
    return model.module if is_model_wrapper(model) else model


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


def _base(model: nn.Module) -> Dict[str, Tensor]:
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
    base = _base(model)
    missing = [
        n for n, p in base.items() if n not in found
        or found[n].dtype != p.dtype or not found[n].equal(p.cpu())
    ]
    size = sum(base[n].numel() for n in missing)
    return missing if 10 * size <= sum(p.numel() for p in base.values()) \
        else []


def make_header(model: nn.Module,
                sources: Sequence[dict] = (),
                meta: Optional[dict] = None) -> Header:
    """The header of a delta of a model.

    Raises:
        PEFTError: If nothing is attached.
    """
    if not peft_states(model):
        raise PEFTError(f'{type(model).__name__} has no method attached, so '
                        'there is no delta of it.')
    base = _base(model)
    return Header(
        backbones=backbones_of(model),
        base=dict(
            fingerprint=fingerprint(base),
            names=sorted(base),
            sources=list(sources)),
        packages=_versions(),
        meta=_plain(meta or {}))


def check_methods(model: nn.Module, header: Header, path: str) -> None:
    """Refuse a delta of other methods or another stock backbone."""
    own = backbones_of(model)
    if set(own) != set(header.backbones):
        raise PEFTError(
            f'{path} belongs to a model with methods at '
            f'{_list(header.backbones)}, this one has them at {_list(own)}.')
    for at, theirs in header.backbones.items():
        if own[at]['stock'] != theirs['stock']:
            raise PEFTError(f'{path} was trained on {theirs["stock"]}, and '
                            f'this backbone is {own[at]["stock"]}.')
        for mine, other in zip(own[at]['method'], theirs['method']):
            # What a method learned to take since then has its default.
            if mine != {**_defaults(mine, other), **other}:
                raise PEFTError(f'{path} holds {_call(other)}, and this '
                                f'backbone has {_call(mine)}.')
        if len(own[at]['method']) != len(theirs['method']):
            raise PEFTError(
                f'{path} holds {len(theirs["method"])} methods, and this '
                f'backbone has {len(own[at]["method"])}.')


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
    return _plain(
        dict(
            type=plan.cls.__name__,
            name=plan.name,
            layers=plan.layers,
            overrides=plan.overrides,
            **{
                **_arguments(plan.cls),
                **plan.kwargs
            }))


def _arguments(cls: type) -> Dict[str, Any]:
    """Arguments of a method that have a default."""
    return {
        p.name: p.default
        for p in inspect.signature(cls.__init__).parameters.values()
        if p.default is not inspect.Parameter.empty
    }


def _defaults(mine: dict, other: dict) -> dict:
    """Defaults of the method of this model, where the other is the same."""
    if mine['type'] != other['type']:
        return {}
    return _plain(_arguments(MethodPlan(dict(type=mine['type'])).cls))


def check_tensors(model: nn.Module, tensors: Dict[str, Tensor],
                  path: str) -> None:
    """Refuse tensors that are not exactly those the model would write."""
    own = model.state_dict(keep_vars=True)
    names = delta_names(model)
    for what, keys in (('lacks', sorted(names - set(tensors))),
                       ('has besides', sorted(set(tensors) - names))):
        if keys:
            raise PEFTError(f'{path} {what} {len(keys)} of the {len(names)} '
                            f'tensors that train here, such as {keys[0]!r}.')
    _check_shapes(own, tensors, path)


def check_names(model: nn.Module,
                header: Header,
                path: str,
                found: Dict[str, Tensor] = {}) -> None:
    """Refuse a model with other frozen weights than those of the delta.

    Args:
        model (nn.Module): Its values are not looked at.
        header (Header): Of the delta.
        path (str): Its file, for the message.
        found (dict): Frozen tensors that will be loaded.
    """
    base = _base(model)
    if sorted(base) != header.base['names']:
        raise PEFTError(
            f'{path} was trained with {len(header.base["names"])} frozen '
            f'weights, and this model has {len(base)}, not the same.')
    _check_shapes(base, {k: v for k, v in found.items() if k in base}, path)


def _check_shapes(own: Dict[str, Tensor], tensors: Dict[str, Tensor],
                  path: str) -> None:
    for name, value in tensors.items():
        mine = own[name]
        if value.shape != mine.shape or value.dtype != mine.dtype:
            raise PEFTError(
                f'{path}: {name!r} is {title(value)}, and here it is '
                f'{title(mine)}.')


def title(tensor: Tensor) -> str:
    """Type and shape of a tensor, for a message."""
    return f'{str(tensor.dtype)[6:]} {tuple(tensor.shape)}'


def check_base(model: nn.Module,
               header: Header,
               path: str,
               extra: Optional[Dict[str, Tensor]] = None) -> None:
    """Refuse a model whose frozen weights are not those of the delta.

    Args:
        model (nn.Module): With its base loaded.
        header (Header): Of the delta.
        path (str): Its file, for the message.
        extra (dict, optional): Frozen tensors that the delta brings along.
    """
    check_names(model, header, path, extra or {})
    base = {**_base(model), **(extra or {})}
    if fingerprint(base) != header.base['fingerprint']:
        raise PEFTError(f'{path} was trained on another base than the '
                        f'{len(base)} frozen weights of this model; '
                        f'{source_text(header)}')


def source_text(header: Header) -> str:
    """Where the base came from, for a message."""
    sources = [str(s.get('checkpoint')) for s in header.base['sources']]
    if not sources:
        return 'it does not say where that came from.'
    return f'its base came from {", ".join(sources)}.'


def _versions() -> Dict[str, str]:
    found = dict(mmpeft=__version__)
    for name in PACKAGES:
        try:
            found[name] = str(importlib.import_module(name).__version__)
        except ImportError:
            continue
    return found


def _plain(value: Any) -> Any:
    """Only what JSON has; a class by its name."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, type):
        return value.__name__
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, 'tolist'):
        return value.tolist()
    return str(value)


def _call(method: dict) -> str:
    arguments = ', '.join(f'{k}={v}' for k, v in method.items() if k != 'type')
    return f'{method.get("type")}({arguments})'


def _list(paths) -> str:
    return ', '.join(repr(p) for p in paths) or 'no place'
