"""Tell from a class alone which blocks its backbone is made of."""
import dis
import inspect
import re
from types import CodeType, FunctionType
from typing import Iterator, Sequence

import torch.nn as nn

__all__ = ['class_path', 'makes_other_blocks']


def class_path(cls: type) -> str:
    """Full path of a class; what families are told apart by."""
    return f'{cls.__module__}.{cls.__qualname__}'


def makes_other_blocks(cls: type, block_pattern: str,
                       block_types: Sequence[str]) -> bool:
    """Whether the constructor of a subclass fills the place of the blocks
    with something else.

    EVA-02 is a subclass of ViT that puts its own ``layers`` there. Building
    it would tell, too, but a config is to be understood without that.
    """
    init = vars(cls).get('__init__')
    place = re.search(r'<stage_path>(\w+)', block_pattern)
    if not isinstance(init, FunctionType) or place is None:
        return False
    fills = any(step.opname == 'STORE_ATTR' and step.argval == place[1]
                for step in dis.get_instructions(init))
    return fills and not any(
        class_path(named) in block_types for named in _named(cls))


def _named(cls: type, depth: int = 4) -> Iterator[type]:
    """Modules that a constructor names, and those that theirs name."""
    init = vars(cls).get('__init__')
    if not depth or not isinstance(init, FunctionType):
        return
    scopes = [init.__globals__]
    for name in _names(init.__code__):
        for named in [s[name] for s in scopes if name in s]:
            if inspect.ismodule(named):
                # vit.Block: what is behind the point comes next.
                scopes.append(vars(named))
            # Its own bases are named for `super`.
            elif inspect.isclass(named) and issubclass(named, nn.Module) \
                    and named not in cls.__mro__:
                yield named
                yield from _named(named, depth - 1)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
