"""Which stock configs a sweep is about, without loading all two thousand."""
import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Dict, Iterator, Set

from mmengine.model import BaseModel
from mmengine.registry import MODELS

from mmpeft.config import configs_root

__all__ = ['candidates', 'transformers']

# What the source of a file with attention over tokens has in it; VAN has a
# convolution of that name.
ATTENTION = re.compile(r'\bnum_heads\b')
BACKBONES = re.compile(r'\.(backbones|selfsup|multimodal)\.')
# Not configs of one model: shared by inclusion, or read by scripts.
INCLUDED = ('_base_', 'common')


def transformers() -> Dict[str, type]:
    """Registered backbones that have attention over tokens, by scoped
    name."""
    found = {}
    for scope in ('mmdet', 'mmseg', 'mmpretrain'):
        importlib.import_module(f'{scope}.models')
        registry = MODELS.children[scope]
        for name, cls in registry.module_dict.items():
            if inspect.isclass(cls) and not issubclass(cls, BaseModel) \
                    and BACKBONES.search(cls.__module__) \
                    and ATTENTION.search(_source(cls)):
                found[f'{scope}.{name}'] = cls
    return found


def _source(cls: type) -> str:
    return '\n'.join(
        inspect.getsource(inspect.getmodule(c)) for c in cls.__mro__
        if BACKBONES.search(c.__module__))


def candidates(library: str, names: Set[str]) -> Iterator[str]:
    """Configs of a library that name one of some types, bases included."""
    root = configs_root(library)
    known: Dict[Path, bool] = {}
    quoted = re.compile('["\'](?:\\w+\\.)?(?:' +
                        '|'.join(sorted(map(re.escape, names))) + ')["\']')
    for path in sorted(root.rglob('*.py')):
        relative = path.relative_to(root)
        if relative.parts[0] not in INCLUDED \
                and _names(path, quoted, known):
            yield f'{library}::{relative.as_posix()}'


def _names(path: Path, quoted: re.Pattern, known: Dict[Path, bool]) -> bool:
    path = path.resolve()
    if path not in known:
        text = path.read_text()
        known[path] = bool(quoted.search(text)) or any(
            _names(base, quoted, known) for base in _bases(path, text))
    return known[path]


def _bases(path: Path, text: str) -> Iterator[Path]:
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id',
                                                    '') == '_base_':
            value = ast.literal_eval(node.value)
            for base in [value] if isinstance(value, str) else value:
                package, colons, relative = base.partition('::')
                base = configs_root(package) / relative if colons else \
                    path.parent / base
                # A broken base is for the loading to say.
                if base.is_file():
                    yield base
