"""Build the stock backbone that a config names, or say what is wrong."""
import difflib
import importlib.util
import inspect
import re
from typing import Any, Dict, Sequence, Union

import torch.nn as nn

from .config import STOCK
from .errors import PEFTError
from .registry import MODELS

__all__ = ['build_stock']


def build_stock(stock: Union[str, type], kwargs: Dict[str, Any],
                ours: Sequence[str]) -> nn.Module:
    """Build a stock backbone.

    Args:
        stock (str | type): Its name or class.
        kwargs (dict): Its arguments.
        ours (Sequence[str]): Arguments of ``PEFTBackbone``, which stand beside
            them in a config.

    Raises:
        PEFTError: If there is no such backbone, or none with such arguments.
    """
    if not isinstance(stock, str) and (isinstance(stock, nn.Module)
                                       or not callable(stock)):
        raise PEFTError(
            'stock is the type of the stock backbone, such as '
            "'mmdet.SwinTransformer', with its arguments beside it, but got "
            f'one of {type(stock).__name__}; mmpeft.apply takes a model that '
            'is built.')
    try:
        return MODELS.build(dict(type=stock, **kwargs))
    except KeyError as error:
        if not isinstance(stock, str) or 'registry' not in str(error):
            raise
        raise PEFTError(
            f'There is no stock backbone {stock!r}{_near(stock)}; write it as '
            'in the stock config, with its library: '
            "'mmdet.SwinTransformer'.") from error
    except TypeError as error:
        key = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if key is None or key[1] not in kwargs:
            raise
        known = [*ours, *_arguments(stock)]
        name = stock if isinstance(stock, str) else stock.__name__
        raise PEFTError(
            f'The stock backbone {name!r} takes no argument {key[1]!r}'
            f'{_hint(key[1], known)}; write both as in the stock config: '
            'backbones of one name differ between libraries.') from error


def _near(name: str) -> str:
    """A backbone or a library with a similar name, or what is missing."""
    scope, dot, bare = name.rpartition('.')
    library = scope.partition('.')[0]
    if library and importlib.util.find_spec(library) is None:
        close = difflib.get_close_matches(library, STOCK, 1)
        if close and close[0] != library:
            return f' (did you mean {close[0] + dot + bare!r}?)'
        return f', as {library} is not installed'
    with MODELS.switch_scope_and_registry(scope or None) as registry:
        return _hint(bare, registry.module_dict, scope + dot)


def _hint(name: str, known: Sequence[str], prefix: str = '') -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f' (did you mean {prefix + close[0]!r}?)' if close else ''


def _arguments(stock: Union[str, type]) -> Sequence[str]:
    """Arguments of a class; none if it cannot be told."""
    cls = MODELS.get(stock) if isinstance(stock, str) else stock
    return list(inspect.signature(cls).parameters)
