"""Whether a delta belongs to a model."""
from typing import Dict, Optional

import torch.nn as nn
from torch import Tensor

from .delta_file import Header
from .delta_parts import (arguments_of, backbones_of, base_of, delta_names,
                          fingerprint, plain)
from .errors import PEFTError
from .plan import MethodPlan

__all__ = [
    'check_base', 'check_methods', 'check_names', 'check_tensors',
    'source_text', 'title'
]


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


def _defaults(mine: dict, other: dict) -> dict:
    """Defaults of the method of this model, where the other is the same."""
    if mine['type'] != other['type']:
        return {}
    return plain(arguments_of(MethodPlan(dict(type=mine['type'])).cls))


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
    base = base_of(model)
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
    base = {**base_of(model), **(extra or {})}
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


def _call(method: dict) -> str:
    arguments = ', '.join(f'{k}={v}' for k, v in method.items() if k != 'type')
    return f'{method.get("type")}({arguments})'


def _list(paths) -> str:
    return ', '.join(repr(p) for p in paths) or 'no place'
