"""Deltas where mmengine expects checkpoints."""
import logging
import os.path as osp
from typing import Any, Dict, Iterable, List, Optional, Set

import torch.nn as nn
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor

from ..delta import (apply_delta, check_base, check_methods, check_tensors,
                     fingerprint, source_text)
from ..delta_file import Header, read_delta
from ..errors import PEFTError

__all__ = [
    'complete', 'ensure_base', 'load_with_base', 'recorded_base', 'register',
    'sources_of'
]

# Whether somebody with the model at hand completes what is read.
_with_model = False


def register() -> None:
    """Let mmengine read a delta by name, in every tool and inferencer."""
    CheckpointLoader.register_scheme(
        r'.*\.safetensors$', load_from_delta, force=True)


def expect_model(expected: bool) -> None:
    """Say whether :func:`complete` will follow the next load."""
    global _with_model
    _with_model = expected


def load_from_delta(filename: str, map_location: Any = None) -> Dict[str, Any]:
    """A delta as a checkpoint, together with its base.

    Raises:
        PEFTError: If the base cannot be put together from its recorded
            source by the names of the tensors alone.
    """
    tensors, header = read_delta(osp.expanduser(filename))
    state = dict(tensors)
    names = set(header.base['names'])
    base = recorded_base(header.base['sources'], names)
    base.update({k: v for k, v in tensors.items() if k in names})
    if fingerprint(base) == header.base['fingerprint']:
        state.update(base)
    elif not _with_model:
        raise PEFTError(
            f'{filename} is a delta, and its base is not at hand as it is: '
            f'{source_text(header)} Test it with tools/test.py, give the base '
            'with --base, or build the model, load its base and call '
            'mmpeft.load_delta(model, path).')
    meta = dict(header.meta)
    return dict(
        state_dict=state,
        meta=meta,
        message_hub=dict(),
        peft_delta=dict(path=filename, tensors=list(tensors), header=header))


def recorded_base(sources: Iterable[dict],
                  names: Set[str]) -> Dict[str, Tensor]:
    """The frozen weights, as far as the files they came from have them."""
    from .checkpoint import read_checkpoint
    found = {}
    for source in sources:
        path, at = source.get('checkpoint'), source.get('at') or ''
        if not isinstance(path, str) or not osp.isfile(path):
            continue
        prefix = source.get('prefix') or ''
        for key, value in read_checkpoint(path)['state_dict'].items():
            if key.startswith(prefix):
                name = '.'.join(p for p in (at, key[len(prefix):]) if p)
                if name in names:
                    found[name] = value
    return found


def complete(model: nn.Module,
             checkpoint: Dict[str, Any],
             base: Optional[str] = None) -> None:
    """Check a delta that mmengine has read against the model it is for.

    Nothing but the base of the model has changed if this refuses.

    Args:
        model (nn.Module): What the checkpoint will be loaded into.
        checkpoint (dict): As :func:`load_from_delta` returned it.
        base (str, optional): File with the base; None takes what the model
            holds, or what the config names.

    Raises:
        PEFTError: If it is of another method, architecture or base.
    """
    model = model.module if is_model_wrapper(model) else model
    about = checkpoint['peft_delta']
    header, path = about['header'], about['path']
    if isinstance(header, dict):  # a .pth without the frozen weights
        header = Header(**header)
    state = checkpoint['state_dict']
    names = set(header.base['names'])
    check_methods(model, header, path)
    check_tensors(model,
                  {k: state[k]
                   for k in about['tensors'] if k not in names}, path)
    if base or not names <= set(state):
        extra = {k: state[k] for k in about['tensors'] if k in names}
        ensure_base(model, header, path, extra, base)
    own = model.state_dict()
    # Strict loading and averages of weights want all of it.
    averages = checkpoint.get('ema_state_dict')
    for name, value in own.items():
        state.setdefault(name, value)
        if averages is not None:
            averages.setdefault(f'module.{name}', value)


def load_with_base(model: nn.Module,
                   path: str,
                   base: Optional[str] = None) -> Header:
    """Load a delta into a fresh model, its base from wherever that is.

    Raises:
        PEFTError: If it is of another method, architecture or base.
    """
    tensors, header = read_delta(path)
    checkpoint = dict(
        state_dict=tensors,
        peft_delta=dict(path=path, tensors=list(tensors), header=header))
    complete(model, checkpoint, base)
    apply_delta(model, checkpoint['state_dict'])
    return header


def ensure_base(model: nn.Module,
                header: Header,
                path: str,
                extra: Dict[str, Tensor],
                base: Optional[str] = None) -> None:
    """Bring the base of a delta into a model.

    Raises:
        PEFTError: If no source has it.
    """
    from .checkpoint import read_checkpoint
    files: List[str] = [base] if base else []
    if not files:
        if _matches(model, header, path, extra):
            return
        if hasattr(model, 'init_weights'):
            _init_weights(model)
        files = [
            s['checkpoint'] for s in header.base['sources']
            if not s.get('at') and osp.isfile(str(s.get('checkpoint')))
        ]
    for file in files:
        model.load_state_dict(
            read_checkpoint(file)['state_dict'], strict=False)
    if not _matches(model, header, path, extra):
        try:
            check_base(model, header, path, extra)
        except PEFTError as error:
            raise PEFTError(f'{error} Give that file with --base.') from None


def _init_weights(model: nn.Module) -> None:
    try:
        model.init_weights()
    except OSError as error:
        # The comparison below says whose file it was.
        print_log(str(error), logger='current', level=logging.WARNING)


def _matches(model: nn.Module, header: Header, path: str,
             extra: Dict[str, Tensor]) -> bool:
    try:
        check_base(model, header, path, extra)
    except PEFTError:
        return False
    return True


def sources_of(cfg: Config) -> List[dict]:
    """Where the frozen weights of a run come from, in the order of loading.

    ``init_cfg`` of parts of the model first, then ``load_from``.
    """
    found: List[dict] = []
    _collect(cfg.get('model'), '', found)
    if cfg.get('load_from') and not cfg.get('resume'):
        found.append(dict(checkpoint=cfg.load_from, at='', prefix=''))
    return found


def _collect(node: Any, at: str, found: List[dict]) -> None:
    if not isinstance(node, dict):
        return
    init = node.get('init_cfg')
    for item in init if isinstance(init, (list, tuple)) else [init]:
        if isinstance(item, dict) and str(
                item.get('type')).endswith('Pretrained'):
            found.append(
                dict(
                    checkpoint=item.get('checkpoint'),
                    at=at,
                    prefix=item.get('prefix') or ''))
    for key, child in node.items():
        if key != 'init_cfg':
            _collect(child, f'{at}.{key}' if at else key, found)
