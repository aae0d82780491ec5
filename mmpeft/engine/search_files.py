"""What a search of subnets leaves: its record, and a config."""
import hashlib
import json
import math
import os.path as osp
from argparse import Namespace
from dataclasses import asdict
from numbers import Real
from typing import Any, Dict, Optional

from mmengine.config import Config
from mmengine.dist import broadcast_object_list, is_main_process

from ..config import find_peft_backbones, load_config
from ..errors import PEFTError
from ..methods.noah import NOAH
from ..plan import parse_methods
from ..whole_file import whole_file
from .evolution import Evolution
from .subnets import Subnet, SubnetSpace

__all__ = ['Record', 'is_hook', 'write_config']

VERSION = 1
WIDTHS = ('num_tokens', 'rank', 'dim')


class Record:
    """Metrics of all subnets that were validated, in a file.

    It is complete after each of them, so a search that is killed at any point
    goes on. What the metrics do not depend on (limits, seed, sizes of
    generations) may change between two searches that share it.

    Args:
        path (str): The file, which need not exist.
        cfg (Config): What they are validated with.
        checkpoint (str): File of the supernet.
        space (SubnetSpace): Its subnets.

    Raises:
        PEFTError: If the file is of another search.
    """

    def __init__(self, path: str, cfg: Config, checkpoint: str,
                 space: SubnetSpace) -> None:
        self.path = path
        self.about = dict(
            version=VERSION,
            config=_hash_of([
                cfg.get(k) for k in ('model', 'val_dataloader', 'val_cfg',
                                     'val_evaluator')
            ]),
            checkpoint=_hash_of_file(checkpoint),
            space=space.describe())
        self.params: Dict[Subnet, int] = {}
        #: By subnet; a value that is not finite is None.
        self.metrics: Dict[Subnet, Dict[str, Optional[float]]] = {}
        # One rank reads, so that all go on from the same.
        read = [self._read() if is_main_process() else None]
        broadcast_object_list(read)
        if isinstance(read[0], str):
            raise PEFTError(read[0])
        for row in read[0]:
            self._put(*row)

    def _read(self) -> Any:
        """The rows of the file, or what is wrong with it."""
        if not osp.isfile(self.path):
            return []
        way_out = 'choose another --work-dir, or delete it.'
        try:
            with open(self.path) as file:
                content = json.load(file)
            about = dict(content['about'])
            rows = [(tuple(map(tuple, row['subnet'])), row['params'],
                     dict(row['metrics'])) for row in content['subnets']]
        except (ValueError, TypeError, KeyError):
            return f'{self.path} is no record of a search; {way_out}'
        other = [k for k in self.about if about.get(k) != self.about[k]]
        if other:
            return (f'{self.path} is of a search with another '
                    f'{" and ".join(other)}; {way_out}')
        return rows

    def _put(self, subnet: Subnet, params: int, metrics: dict) -> None:
        self.params[subnet] = params
        self.metrics[subnet] = metrics

    def add(self, subnet: Subnet, params: int, metrics: dict) -> None:
        """Keep what is a number, and write the file."""
        self._put(
            subnet, params, {
                name: float(value) if math.isfinite(value) else None
                for name, value in metrics.items() if isinstance(value, Real)
            })
        if is_main_process():
            rows = [
                dict(subnet=s, params=self.params[s], metrics=m)
                for s, m in self.metrics.items()
            ]
            with whole_file(self.path) as temporary, open(temporary,
                                                          'w') as file:
                json.dump(dict(about=self.about, subnets=rows), file)


def is_hook(hook: dict, name: str) -> bool:
    """Whether a config is of a hook of that name."""
    kind = hook['type']
    kind = kind if isinstance(kind, str) else kind.__name__
    return kind.rpartition('.')[2] == name


def _hash_of(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _hash_of_file(path: str) -> str:
    if not osp.isfile(path):  # a URL
        return _hash_of(path)
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        for block in iter(lambda: file.read(1 << 20), b''):
            digest.update(block)
    return digest.hexdigest()


def write_config(args: Namespace, how: Evolution, found: dict) -> None:
    """Write the config of a subnet: that of the supernet with fixed widths,
    and without the hook that draws them.

    Args:
        args (Namespace): With ``config``, ``checkpoint``, ``budget``,
            ``min_params``, ``cfg_options``.
        how (Evolution): Settings of the search.
        found (dict): As ``run_search`` returns it.

    Raises:
        PEFTError: If it does not read as it was meant.
    """
    out = found['config']
    cfg = load_config(args.config)
    path, node = next(
        (p, n) for p, n in find_peft_backbones(cfg).items() if any(
            plan.cls is NOAH for plan in parse_methods(n['method'])))
    methods = [
        _fixed(plan.cfg, found['subnet']) if plan.cls is NOAH else plan.cfg
        for plan in parse_methods(node['method'])
    ]
    change: Any = dict(method=methods)
    if len(methods) == 1:
        change['method'] = dict(_delete_=True, **methods[0])
    for key in reversed(path.split('.')[1:]):
        if key.isdigit():
            raise PEFTError(f'{path} is in a list, where configs cannot '
                            'change an item; write the whole model into '
                            f'{args.config} or search a model without it.')
        change = {key: change}
    hooks = [dict(h) for h in cfg.custom_hooks if not is_hook(h, 'SubnetHook')]
    base = args.config
    if '::' not in base:
        base = osp.relpath(osp.abspath(base), osp.dirname(osp.abspath(out)))
    settings = ', '.join(f'{k} {v}' for k, v in asdict(how).items())
    notes = [
        f'{found["metric"]} {found["value"]} with {found["params"]:,} '
        'parameters in the supernet', f'of {args.checkpoint}; '
        f'{args.min_params:,} to {args.budget:,} parameters,', settings
    ]
    if args.cfg_options:
        notes.append(f'--cfg-options {" ".join(args.cfg_options)}')
    text = '\n'.join(
        [f'_base_ = {base.replace(osp.sep, "/")!r}', ''] +
        ['# Found by tools/search_noah.py:'] + [f'# {note}'
                                                for note in notes] +
        [f'model = {_code(change)}', f'custom_hooks = '
         f'{_code(hooks)}', ''])
    with whole_file(out) as temporary, open(temporary, 'w') as file:
        file.write(text)
    read = find_peft_backbones(load_config(out))[path]['method']
    if [p.cfg for p in parse_methods(read)] != methods:
        raise PEFTError(f'{out} does not read as it was meant; this is a '
                        f'mistake of ours. The methods are {methods!r}.')


def _fixed(method: dict, subnet: Dict[int, Dict[str, int]]) -> dict:
    """The method config of a subnet."""
    kept = {
        k: v
        for k, v in method.items() if k not in (*WIDTHS, 'overrides', 'type')
    }
    overrides = {
        str(block): widths
        for block, widths in subnet.items() if any(widths.values())
    }
    return dict(
        type='NOAH', **dict.fromkeys(WIDTHS, 0), **kept, overrides=overrides)


def _code(value: Any, indent: int = 0) -> str:
    """A value as Python, in the style of configs."""
    pad = ' ' * (indent + 4)
    if isinstance(value, dict) and any(
            isinstance(v, (dict, list)) for v in value.values()):
        named = all(str(k).isidentifier() for k in value)
        items = [(f'{k}=' if named else f'{k!r}: ') + _code(v, indent + 4)
                 for k, v in value.items()]
    elif isinstance(value, dict):
        pairs = ', '.join(f'{k}={v!r}' for k, v in value.items())
        return f'dict({pairs})'
    elif isinstance(value, list) and value:
        items, named = [_code(v, indent + 4) for v in value], None
    else:
        return repr(value)
    opening, closing = {
        True: ('dict(', ')'),
        False: ('{', '}'),
        None: ('[', ']')
    }[named]
    inner = ''.join(f'{pad}{item},\n' for item in items)
    return f'{opening}\n{inner}{" " * indent}{closing}'
