"""Checkpoints: which model they belong to, and writing them safely."""
import logging
import os.path as osp
from typing import Any, Dict, Optional

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.runner.checkpoint import CheckpointLoader

from ..config import PEFT_ARGUMENTS, find_peft_backbones
from ..delta_file import is_safetensors
from ..errors import MissingFileError, PEFTError
from ..plan import parse_methods
from ..safe_pickle import check_pickle
from ..state import load_whole
from ..whole_file import whole_file
from .count import build_model, without_init
from .delta_loading import check_whole
from .safe_loading import guard_loading

__all__ = [
    'is_delta', 'read_checkpoint', 'write_checkpoint', 'strip_method',
    'match_checkpoint', 'load_exactly', 'check_out', 'KEPT_META'
]

# What a delta or a merged file remembers of the checkpoint it was made of:
# the state of its training has no meaning for either.
KEPT_META = ('epoch', 'iter', 'seed', 'experiment_name', 'time',
             'dataset_meta', 'mmengine_version')


def read_checkpoint(path: str) -> Dict[str, Any]:
    """A checkpoint as ``{'state_dict': ..., 'meta': ..., ...}``, on CPU.

    Raises:
        PEFTError: If the file is missing, is no checkpoint, or may run code.
    """
    if '://' not in path and not osp.isfile(path):
        raise MissingFileError(f'There is no checkpoint {path!r}; looked at '
                               f'{osp.abspath(path)}.')
    if '://' in path:
        guard_loading()
    elif is_delta(path):
        from .delta_loading import register  # it reads bases through this
        register()
    elif not path.endswith('.safetensors'):
        check_pickle(path, content=True)
    try:
        checkpoint = CheckpointLoader.load_checkpoint(path, map_location='cpu')
    except PEFTError:
        raise
    except Exception as error:
        raise PEFTError(f'{path} cannot be read as a checkpoint '
                        f'({type(error).__name__}: '
                        f'{str(error).partition(chr(10))[0]}).') from error
    if not isinstance(checkpoint, dict):
        raise PEFTError(f'{path} holds a {type(checkpoint).__name__} and not '
                        'a checkpoint.')
    if 'state_dict' not in checkpoint:
        checkpoint = dict(state_dict=checkpoint)
    for key in ('state_dict', 'meta'):
        if not isinstance(checkpoint.get(key, {}), (dict, type(None))):
            raise PEFTError(f'{path} is no checkpoint: its {key} is a '
                            f'{type(checkpoint[key]).__name__}.')
    return checkpoint


def is_delta(path: str) -> bool:
    """Whether a file is a delta, by its content.

    Raises:
        PEFTError: If it is one that mmengine will not take for one.
    """
    if not osp.isfile(path) or not is_safetensors(path):
        return False
    if not path.endswith('.safetensors'):
        raise PEFTError(f'{path} is a safetensors file; let its name end in '
                        '.safetensors, by which mmengine tells it apart.')
    return True


def write_checkpoint(checkpoint: Dict[str, Any], path: str) -> None:
    """Write a checkpoint completely or not at all."""
    with whole_file(path) as temporary, open(temporary, 'wb') as file:
        torch.save(checkpoint, file)


def check_out(out: str, force: bool, *read: Optional[str]) -> None:
    """Refuse to write over a file, unless that is meant.

    Args:
        out (str): The file to write.
        force (bool): Whether it may exist.
        *read (str, optional): Files that are read, and never replaced.

    Raises:
        PEFTError: If it exists and should not.
    """
    # A file that does not exist has its own sentence, later.
    if osp.exists(out) and (not force or any(
            osp.exists(file) and osp.samefile(out, file)
            for file in read if file)):
        raise PEFTError(f'{out} exists already; choose another file, or '
                        '--force (never a file that is read).')


def strip_method(cfg: Config) -> Config:
    """The stock config that a PEFT config was made of, as a copy."""
    cfg = Config(cfg.to_dict())
    for node in find_peft_backbones(cfg).values():
        stock = node['stock']
        for key in PEFT_ARGUMENTS:
            node.pop(key, None)
        node['type'] = stock
    hooks = cfg.get('default_hooks') or {}
    for name in [n for n, h in hooks.items() if _is_ours(h)]:
        hooks.pop(name)
    hooks = cfg.get('custom_hooks')
    if hooks:
        cfg.custom_hooks = [h for h in hooks if not _is_ours(h)]
    imports = cfg.get('custom_imports')
    if imports:
        imports = imports['imports']
        imports = [imports] if isinstance(imports, str) else imports
        imports = [m for m in imports if m.split('.')[0] != 'mmpeft']
        if imports:
            cfg.custom_imports['imports'] = imports
        else:
            cfg.pop('custom_imports')
    return cfg


def match_checkpoint(cfg: Config, path: str) -> Config:
    """The config that a checkpoint belongs to: the given one, or, for a
    merged file, the stock one below it.

    Raises:
        PEFTError: If the methods in the file are not those of the config, or
            if it holds none, and lacks parameters of the stock model, too.
    """
    if is_delta(path):
        return cfg  # compared with the model when it is loaded
    state = read_checkpoint(path)['state_dict']
    inside = {_method_name(k) for k in state if '.peft.' in f'.{k}'}
    wanted = {
        plan.name
        for node in find_peft_backbones(cfg).values()
        for plan in parse_methods(node['method']) if not plan.is_selector
    }
    if inside == wanted:
        return cfg
    if not inside:
        # Told apart by content: stock keys only, so it has been merged, or
        # it is a stock checkpoint. Never in silence: what was meant may have
        # been a file with adapters.
        print_log(
            f'{path} holds no {_names(wanted)}: merged, or a stock '
            'checkpoint. It is tested as the stock model.',
            logger='current',
            level=logging.WARNING)
        stock = strip_method(cfg)
        with without_init():
            # Weights of a backbone are no merged model: with them, mmengine
            # would warn, and test a head of random numbers.
            check_whole(build_model(stock), state, path)
        return stock
    raise PEFTError(
        f'{path} holds {_names(inside)}, but the config attaches '
        f'{_names(wanted)}; test it with the config it was trained with, or '
        'give the same --method.')


def load_exactly(model: torch.nn.Module, state: Dict[str, Any],
                 path: str) -> None:
    """Load every tensor of a model from a state dict.

    Raises:
        PEFTError: If a tensor is missing, left over, or of another shape.
    """
    own = model.state_dict()
    missing = [k for k in own if k not in state]
    extra = [k for k in state if k not in own]
    other = [k for k in own if k in state and state[k].shape != own[k].shape]
    for what, keys in (('lacks', missing), ('has besides', extra),
                       ('has in another shape', other)):
        if keys:
            raise PEFTError(
                f'{path} does not belong to this config: it {what} '
                f'{len(keys)} of the {len(own)} tensors, such as '
                f'{keys[0]!r}.')
    load_whole(model, state)


def _is_ours(hook: Any) -> bool:
    return isinstance(hook, dict) and str(hook.get('type',
                                                   '')).startswith('mmpeft.')


def _method_name(key: str) -> str:
    return f'.{key}'.split('.peft.', 1)[1].split('.')[0]


def _names(names) -> str:
    return ', '.join(sorted(names)) or 'no method'
