"""Channels of outputs that a method makes, and who reads them."""
from typing import Any, Iterator, Optional, Sequence, Tuple

import torch.nn as nn

from .errors import PEFTError
from .methods.side import SideNetwork
from .state import PEFTState

__all__ = ['check_readers', 'out_channels']

#: What models of the three libraries call what reads their backbone, without
#: a neck and with one.
HEADS = ('decode_head', 'auxiliary_head', 'head', 'panoptic_head')
NECK = ('neck', )
#: Attributes of necks that make maps of several sizes out of maps of one.
RESCALES = ('scales', 'rescales')


def out_channels(backbone: nn.Module) -> Optional[Tuple[int, ...]]:
    """Channels of the maps a backbone gives, if a method replaces its own."""
    for network in backbone.peft.children():
        if isinstance(network, SideNetwork) and network.replaces_outputs:
            return network.out_channels
    return None


def check_readers(model: nn.Module) -> None:
    """Refuse a neck or head that is made for other outputs.

    Args:
        model (nn.Module): A built model, or a backbone.

    Raises:
        PEFTError: Names the part, its channels and those of the outputs.
    """
    for path, parent in model.named_modules():
        backbone = getattr(parent, 'backbone', None)
        if not isinstance(getattr(backbone, 'peft', None), PEFTState):
            continue
        given = out_channels(backbone)
        if given:
            _check_sizes(parent, path)
        for name, reader in _readers(parent) if given else ():
            wanted = getattr(reader, 'in_channels', None)
            expected = _expected(reader, wanted, given)
            if expected is None or _as_list(wanted) == expected:
                continue
            at = f'{path}.{name}' if path else name
            raise PEFTError(
                f'The backbone gives {len(given)} maps of {_text(given)} '
                f'channels, as its method makes them, but {at} '
                f'({type(reader).__name__}) is made for '
                f'{_text(_as_list(wanted))}. Set model.{at}.in_channels='
                f'{expected if len(expected) > 1 else expected[0]}'
                f'{_places(reader)}.')


def _check_sizes(parent: nn.Module, path: str) -> None:
    """Refuse a neck that would make a pyramid of what is one."""
    neck = getattr(parent, 'neck', None)
    for part in neck.modules() if isinstance(neck, nn.Module) else ():
        for attribute in RESCALES:
            factors = getattr(part, attribute, None)
            if isinstance(factors, (list, tuple)) and set(factors) - {1}:
                at = f'{path}.neck' if path else 'neck'
                raise PEFTError(
                    'The backbone gives maps of different sizes, as its '
                    f'method makes them, but model.{at} has a '
                    f'{type(part).__name__}, which would scale them by '
                    f'{_text(factors)}, as if they were of one size. Take it '
                    'out of the neck (model.neck=None if it is all there is).')


def _readers(parent: nn.Module) -> Iterator[Tuple[str, nn.Module]]:
    """What reads the outputs; a neck without channels passes them on."""
    neck = getattr(parent, 'neck', None)
    passes = neck is None or getattr(neck, 'in_channels', None) is None
    for name in (HEADS if neck is None else NECK + HEADS * passes):
        part = getattr(parent, name, None)
        parts = enumerate(part) if isinstance(part, nn.ModuleList) else ()
        if isinstance(part, nn.Module) and not parts:
            yield name, part
        for i, one in parts:
            yield f'{name}.{i}', one


def _expected(reader: nn.Module, wanted: Any,
              given: Sequence[int]) -> Optional[list]:
    """Channels that a reader should be made for; None if it has none, or
    reads a map that is not there."""
    if wanted is None:
        return None
    at = getattr(reader, 'in_index', None)
    if isinstance(at, (list, tuple)):
        chosen = [given[i] for i in at if -len(given) <= i < len(given)]
        if len(chosen) < len(at):
            return None
        if getattr(reader, 'input_transform', None) == 'resize_concat':
            return [sum(chosen)]
        return chosen
    if isinstance(wanted, (list, tuple)):
        return list(given)
    at = -1 if at is None else at
    return [given[at]] if -len(given) <= at < len(given) else None


def _as_list(channels: Any) -> list:
    return list(channels) if isinstance(channels,
                                        (list, tuple)) else [channels]


def _text(channels: Sequence[int]) -> str:
    return ', '.join(map(str, channels))


def _places(reader: nn.Module) -> str:
    at = getattr(reader, 'in_index', None)
    return '' if at is None else f' (its in_index is {at})'
