"""Read method configs: names, arguments, and which blocks they mean."""
import ast
import difflib
import inspect
import re
from typing import Any, Dict, List, Optional, Sequence, Union

from .backbones.attached import BlockPEFT
from .backbones.base import Block
from .errors import PEFTError
from .methods.base import Method, PEFTModule, Selector
from .methods.side import SideNetwork
from .registry import METHODS

__all__ = ['MethodPlan', 'parse_methods', 'parse_method_string']


def parse_methods(method: Union[dict, str, Sequence]) -> List['MethodPlan']:
    """Plans of one method or a list of them.

    Raises:
        PEFTError: For unknown methods or arguments, or names used twice.
    """
    if isinstance(method, (dict, str)):
        method = [method]
    if not isinstance(method, (list, tuple)) or not all(
            isinstance(item, (dict, str)) for item in method):
        raise PEFTError("A method is a dict such as dict(type='Mona'), a text "
                        "such as 'LoRA:rank=8+LNTune', or a list of such, but "
                        f'got {method!r}.')
    cfgs = []
    for item in method:
        cfgs += parse_method_string(item) if isinstance(item, str) else [item]
    if not cfgs:
        raise PEFTError('The list of methods is empty; use "Full" or "Frozen" '
                        'for a baseline.')
    plans = [MethodPlan(cfg) for cfg in cfgs]
    names = [p.name for p in plans]
    for name in names:
        if names.count(name) > 1:
            raise PEFTError(f'Two methods are named {name!r}; give one of '
                            "them another name, such as name='second'.")
    return plans


class MethodPlan:
    """One method config, checked.

    Args:
        cfg (dict): ``type``, optional ``name``, ``layers``, ``overrides``,
            and the arguments of the method.
    """

    def __init__(self, cfg: dict) -> None:
        self.cfg = {k: v for k, v in cfg.items() if k != '_scope_'}
        kwargs = dict(self.cfg)
        if 'type' not in kwargs:
            raise PEFTError(f'A method needs a type, but got {dict(cfg)!r}.')
        self.cls = _find(kwargs.pop('type'))
        self.is_module = issubclass(self.cls, PEFTModule)
        self.is_network = issubclass(self.cls, SideNetwork)
        self.is_selector = not (self.is_module or self.is_network)
        self.name = kwargs.pop('name', None) or self.cls.key or _snake(
            self.cls.__name__)
        self.layers = kwargs.pop('layers', None)
        self.overrides = kwargs.pop('overrides', None) or {}
        self.kwargs = kwargs
        if not re.fullmatch(r'[a-z_][a-z0-9_]*', self.name) or hasattr(
                BlockPEFT, self.name):
            raise PEFTError(
                f'name={self.name!r} cannot be part of a parameter '
                'key; use lower-case letters, digits and "_".')
        if self.overrides and not self.is_module:
            what = 'is one network' if self.is_network else \
                'selects stock parameters'
            raise PEFTError(f'{self.cls.__name__} {what} and has nothing to '
                            'override per block; use `layers`.')
        for given in (kwargs, *self.overrides.values()):
            self._check_arguments(given)

    @property
    def restricted(self) -> bool:
        """Whether ``layers`` was given."""
        return self.layers is not None

    def choose(self, blocks: Sequence[Block]) -> List[Block]:
        """The blocks that ``layers`` means."""
        if self.layers is None:
            return list(blocks)
        return match_blocks(self.layers, blocks, 'layers')

    def kwargs_for(self, block: Block,
                   blocks: Sequence[Block]) -> Dict[str, Any]:
        """Arguments in one block, later overrides winning."""
        kwargs = dict(self.kwargs)
        for pattern, values in self.overrides.items():
            if block in match_blocks(pattern, blocks, 'overrides'):
                kwargs.update(values)
        return kwargs

    def construct(self, place: Any = None, kwargs: Optional[dict] = None):
        """Build the method: a module at a site, a network beside a trunk."""
        kwargs = self.kwargs if kwargs is None else kwargs
        if self.is_module:
            return self.cls.build(place, **kwargs)
        return self.cls(place, **kwargs) if self.is_network else self.cls(
            **kwargs)

    def selector(self) -> Optional[Selector]:
        """What it trains of the stock parameters; None if nothing."""
        if self.is_selector:
            return self.construct()
        return self.cls.selector(**self.kwargs) if self.is_module else None

    def _check_arguments(self, kwargs: dict) -> None:
        known = [
            p for p in inspect.signature(self.cls).parameters
            if p not in ('site', 'trunk', 'args', 'kwargs')
        ]
        for key in kwargs:
            if key not in known:
                raise PEFTError(f'{self.cls.__name__} has no argument '
                                f'{key!r}{_nearest(key, known)}. It takes '
                                f'{", ".join(known + _COMMON)}.')


_COMMON = ['name', 'layers', 'overrides']


def match_blocks(pattern: Any, blocks: Sequence[Block],
                 where: str) -> List[Block]:
    """Blocks meant by a number, ``'stage:N'``, a regular expression matching
    a whole block path, or a list of these.

    Raises:
        PEFTError: If a pattern matches no block.
    """
    patterns = pattern if isinstance(pattern, (list, tuple)) else [pattern]
    chosen = set()
    for item in patterns:
        matched = [b for b in blocks if _matches(item, b, blocks)]
        if not matched:
            stages = sorted({b.stage for b in blocks})
            raise PEFTError(
                f'{where}: {item!r} matches no block. There are blocks 0 to '
                f'{len(blocks) - 1} (or -1 to -{len(blocks)}), '
                f'{", ".join(f"stage:{s}" for s in stages)}, and the paths '
                f'{blocks[0].path} to {blocks[-1].path}.')
        chosen.update(b.path for b in matched)
    return [b for b in blocks if b.path in chosen]


def _matches(item: Any, block: Block, blocks: Sequence[Block]) -> bool:
    if isinstance(item, str) and re.fullmatch(r'-?\d+', item):
        item = int(item)
    if isinstance(item, int):
        # Counted over all blocks, so that -1 is the last one in the backbone.
        count = len(blocks)
        return block.index == (item if item >= 0 else count + item)
    if isinstance(item, str) and item.startswith('stage:'):
        return item == f'stage:{block.stage}'
    try:
        return re.fullmatch(str(item), block.path) is not None
    except re.error as error:
        raise PEFTError(f'{item!r} is not a regular expression: '
                        f'{error}.') from None


def parse_method_string(text: str) -> List[dict]:
    """``'LoRA:rank=8,targets=[q,v]+LNTune'`` -> list of method configs."""
    cfgs = []
    for part in _split(text, '+'):
        name, _, arguments = part.partition(':')
        cfg = dict(type=name.strip())
        for argument in _split(arguments, ',') if arguments else []:
            key, equals, value = argument.partition('=')
            if not equals:
                raise PEFTError(f'{argument!r} in --method {text!r} is not '
                                'KEY=VALUE; write Method:key=value,key=value.')
            cfg[key.strip()] = _value(value.strip())
        cfgs.append(cfg)
    return cfgs


def _split(text: str, separator: str) -> List[str]:
    """Split outside brackets and quotes."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in '[({') - (char in '])}')
        if char == separator and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return parts + [text[start:]]


def _value(text: str) -> Any:
    """A Python literal; bare words are strings, also inside a list."""
    if text[:1] in '[(' and text[-1:] in '])':
        return [
            _value(t.strip()) for t in _split(text[1:-1], ',') if t.strip()
        ]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _find(name: Union[str, type]) -> type:
    if isinstance(name, type):
        return name
    METHODS.import_from_location()
    known = sorted(METHODS.module_dict)
    bare = name.split('.', 1)[1] if name.startswith('mmpeft.') else name
    if bare in METHODS.module_dict:
        return METHODS.module_dict[bare]
    try:
        cls = METHODS.get(name) if '.' in name else None
    except (RuntimeError, ImportError):
        cls = None
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise PEFTError(f'There is no method {name!r}'
                        f'{_nearest(name, known)}. Known: {", ".join(known)}.')
    return cls


def _nearest(word: str, known: Sequence[str]) -> str:
    lower = {k.lower(): k for k in known}
    near = difflib.get_close_matches(str(word).lower(), lower, n=1)
    return f' (did you mean {lower[near[0]]!r}?)' if near else ''


def _snake(name: str) -> str:
    name = re.sub(r'([A-Z]+)([A-Z][a-z])', r'\1_\2', name)
    return re.sub(r'([a-z0-9])([A-Z])', r'\1_\2', name).lower()
