"""Deltas where mmengine expects checkpoints."""
import logging
import os.path as osp
import re
from typing import Any, Dict, Iterable, List, Optional, Set

import torch.nn as nn
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor

from ..delta import apply_delta
from ..delta_checks import (check_base, check_methods, check_names,
                            check_tensors, source_text)
from ..delta_file import Header, parse_header, read_delta
from ..delta_parts import fingerprint, unwrap, write_tensors
from ..errors import PEFTError

__all__ = [
    'check_whole', 'complete', 'ensure_base', 'load_with_base',
    'recorded_base', 'register', 'sources_of'
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
    # Texts of configs are Python, and stock tools execute them.
    meta = {k: v for k, v in header.meta.items() if k not in ('cfg', 'config')}
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
            if isinstance(key, str) and key.startswith(prefix):
                name = '.'.join(p for p in (at, key[len(prefix):]) if p)
                if name in names:
                    found[name] = value
    return found


def complete(model: nn.Module,
             checkpoint: Dict[str, Any],
             base: Optional[str] = None) -> None:
    """Check a delta that mmengine has read against the model it is for.

    The model is unchanged if this refuses.

    Args:
        model (nn.Module): What the checkpoint will be loaded into.
        checkpoint (dict): As :func:`load_from_delta` returned it.
        base (str, optional): File with the base; None takes what the model
            holds, or what the config names.

    Raises:
        PEFTError: If it is of another method, architecture or base.
    """
    model = unwrap(model)
    about = _about(checkpoint)
    header, path = about['header'], about['path']
    state = checkpoint['state_dict']
    names = set(header.base['names'])
    check_methods(model, header, path)
    check_tensors(model,
                  {k: state[k]
                   for k in about['tensors'] if k not in names}, path)
    check_names(model, header, path, state)
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


def _about(checkpoint: Dict[str, Any]) -> Dict[str, Any]:
    """What a file says about the delta in it; a .pth may say anything."""
    about = checkpoint['peft_delta']
    if isinstance(about, dict) and isinstance(about.get('header'), Header):
        return about  # of a delta that was checked when it was read
    path, state = 'This checkpoint', checkpoint['state_dict']
    try:
        header = parse_header(path, about['header'])
        lost = [
            k for k in about['tensors'] if not isinstance(state[k], Tensor)
        ]
    except (TypeError, KeyError) as error:
        raise PEFTError(f'{path} is damaged: what it says of its delta cannot '
                        f'be read ({type(error).__name__}: '
                        f'{error}).') from error
    if lost:
        raise PEFTError(f'{path} is damaged: {lost[0]!r} is no tensor.')
    return dict(about, header=header, path=path)


def check_whole(model: nn.Module,
                state: Any,
                path: str = 'The checkpoint') -> None:
    """Refuse a full checkpoint that lacks parameters of a model.

    Stock would warn, and go on with random numbers.

    Raises:
        PEFTError: If a parameter is missing, or of another shape.
    """
    # mmengine takes off what wrappers put before names; so does this.
    found = {
        re.sub(r'^module\.', '', str(k)): v
        for k, v in (state if isinstance(state, dict) else {}).items()
    }
    own = {re.sub(r'^module\.', '', k): v for k, v in model.named_parameters()}
    lost = [
        k for k, v in own.items()
        if getattr(found.get(k), 'shape', None) != v.shape
    ]
    if lost:
        raise PEFTError(
            f'{path} does not belong to this model: {len(lost)} of '
            f'its {len(own)} parameters are missing or of another shape, '
            f'such as {lost[0]!r}.')


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
    if not base and _matches(model, header, path, extra):
        return
    before = {k: v.clone() for k, v in model.state_dict().items()}
    files: List[str] = [base] if base else []
    try:
        if not files:
            if hasattr(model, 'init_weights'):
                _init_weights(model)
            files = [
                s['checkpoint'] for s in header.base['sources']
                if not s.get('at') and osp.isfile(str(s.get('checkpoint')))
            ]
        for file in files:
            _load_base(model, file)
        try:
            check_base(model, header, path, extra)
        except PEFTError as error:
            raise PEFTError(f'{error} Give that file with --base.') from None
    except BaseException:
        write_tensors(model, before)
        raise


def _load_base(model: nn.Module, file: str) -> None:
    from .checkpoint import read_checkpoint
    try:
        model.load_state_dict(
            read_checkpoint(file)['state_dict'], strict=False)
    except (RuntimeError, TypeError, AttributeError) as error:
        text = ' '.join(str(error).split())
        raise PEFTError(f'{file} does not fit this model: {text}') from error


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
