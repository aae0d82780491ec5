"""The tasks that a model has, and how one is made of a delta."""
from collections import OrderedDict
from dataclasses import dataclass
from typing import Dict, Optional

import torch.nn as nn
from torch import Tensor

from .delta_checks import source_text, title
from .delta_file import Header
from .delta_parts import fingerprint
from .errors import PEFTError
from .injection import Prepared, prepare
from .registry import METHODS

__all__ = ['Task', 'Tasks', 'compare', 'make_task', 'remember']


@dataclass
class Task:
    """One delta, ready to be put in.

    Attributes:
        header (Header): Of its file.
        prepared (dict): By path of a backbone, what is attached there; the
            modules are built once and keep their weights.
        stock (dict): What it has instead of tensors of the base: heads,
            norms, biases, statistics.
    """

    header: Header
    prepared: Dict[str, Prepared]
    stock: Dict[str, Tensor]


@dataclass
class Tasks:
    """The tasks of a model, in a plain attribute: no key changes.

    Attributes:
        found (OrderedDict): By name.
        base (dict): The model's own tensors, of those that tasks replace.
        active (str, optional): The one that is in; None is the base.
    """

    found: 'OrderedDict[str, Task]'
    base: Dict[str, Tensor]
    active: Optional[str] = None


def make_task(model: nn.Module, tensors: Dict[str, Tensor], header: Header,
              path: str) -> Task:
    """Everything a task needs, checked; the model is stock and is only
    read."""
    own = model.state_dict(keep_vars=True)
    names = header.base['names']
    lost = [n for n in names if n not in own]
    if lost:
        raise PEFTError(f'{path} belongs to another model: this one has no '
                        f'{lost[0]!r}, nor {len(lost) - 1} others of its '
                        'base.')
    if fingerprint({n: own[n] for n in names}) != header.base['fingerprint']:
        raise PEFTError(
            f'{path} was trained on another base than the {len(names)} '
            f'weights of this model; {source_text(header)}')
    prepared = {}
    for at, about in header.backbones.items():
        methods = [_known_method(m, path) for m in about['method']]
        try:
            prepared[at] = prepare(
                model.get_submodule(at), methods, allow_random_base=True)
        except PEFTError as error:
            raise PEFTError(f'{path} is not for this model: '
                            f'{error}') from error
        # Whatever the arguments in the file may bring about.
        except Exception as error:
            raise PEFTError(f'{path} holds methods for {at!r} that cannot be '
                            f'built here ({type(error).__name__}: '
                            f'{error}).') from error
    stock = {
        k: v
        for k, v in tensors.items()
        if '.peft.' not in f'.{k}' and k not in set(names)
    }
    plain = {k: v for k, v in tensors.items() if '.peft.' not in f'.{k}'}
    wanted = {n for n, _ in model.named_parameters()} - set(names)
    compare(f'{path} does not fit this model', plain,
            {k: own[k]
             for k in wanted | (plain.keys() & own.keys())})
    return Task(header, prepared, stock)


def _known_method(method: dict, path: str) -> dict:
    """A method config from a file: never a name that would be imported."""
    METHODS.import_from_location()
    if not isinstance(method,
                      dict) or method.get('type') not in METHODS.module_dict:
        raise PEFTError(f'{path} names a method that is not registered: '
                        f'{method!r:.80}.')
    return dict(method)


def remember(model: nn.Module, known: Tasks, task: Task) -> None:
    own = model.state_dict()
    for key in task.stock:
        if key not in known.base:
            known.base[key] = own[key].clone()


def compare(what: str, mine: Dict[str, Tensor], wanted: Dict[str,
                                                             Tensor]) -> None:
    odd = [
        k for k in sorted({*mine, *wanted}) if k not in mine or k not in wanted
        or mine[k].shape != wanted[k].shape or mine[k].dtype != wanted[k].dtype
    ]
    if odd:
        there, here = ('missing' if t is None else title(t)
                       for t in (mine.get(odd[0]), wanted.get(odd[0])))
        raise PEFTError(f'{what}: {len(odd)} tensors differ, such as '
                        f'{odd[0]!r}, which is {there} and here {here}.')
