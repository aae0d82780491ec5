"""From a checkpoint file to a merged one, and back."""
from argparse import Namespace
from typing import Any, Dict, Optional

import torch
import torch.nn as nn
from mmengine.config import Config
from torch import Tensor

from ..config import find_peft_backbones
from ..delta_parts import peft_states, unwrap, write_tensors
from ..errors import MergeError, PEFTError
from ..merging import merged_state_dict
from ..version import __version__
from .checkpoint import (KEPT_META, check_out, is_delta, load_exactly,
                         read_checkpoint, strip_method, write_checkpoint)
from .count import build_model, without_init
from .delta_loading import load_with_base
from .run import read_config

__all__ = ['merge_checkpoint', 'unmerge', 'unmerge_checkpoint']


def merge_checkpoint(args: Namespace) -> int:
    """Merge ``args.checkpoint`` into ``args.out``.

    Returns:
        int: Number of tensors written.

    Raises:
        PEFTError: If files or config do not fit.
        MergeError: If the merge would not be exact.
    """
    cfg = _config(args)
    if is_delta(args.checkpoint):
        model = build_model(cfg)
        header = load_with_base(model, args.checkpoint, args.base)
        checkpoint = dict(meta=header.meta)
    else:
        checkpoint = read_checkpoint(args.checkpoint)
        with without_init():
            model = build_model(cfg)
        load_exactly(model, checkpoint['state_dict'], args.checkpoint)
    merged = merged_state_dict(model)
    stock_cfg = strip_method(cfg)
    with without_init():
        # The promise, checked on every file: strict in the stock model.
        load_exactly(build_model(stock_cfg), merged, args.out)
    _write(args.out, merged, checkpoint.get('meta'), stock_cfg)
    return len(merged)


def unmerge(model: nn.Module,
            merged: Dict[str, Tensor],
            delta: str,
            base: Optional[str] = None) -> nn.Module:
    """Take merged weights apart again, into base and delta.

    A merged weight was rounded: taking the update off again gives other bits
    than the base had in 2 of 10,000 weights if the update is 1e-4 of their
    size, and in 7 of 100 if it is a tenth. So the base is not computed but
    read, where the delta was trained on it or where ``base`` says, compared
    with its fingerprint, and merging must give what is in ``merged``.

    Args:
        model (nn.Module): Built with the methods of the delta; holds base and
            delta afterwards.
        merged (dict[str, Tensor]): State dict of the merged model.
        delta (str): File of the delta that was merged.
        base (str, optional): File with the base. None takes what the model
            holds, or what the delta or the config name.

    Returns:
        nn.Module: The same model.

    Raises:
        PEFTError: If delta or base do not fit, or the base is not at hand.
        MergeError: If this base and this delta give other merged weights;
            then the model is unchanged, too.
    """
    model = unwrap(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    known = [(s, set(s.loaded), s.base_checked)
             for s in peft_states(model).values()]
    try:
        load_with_base(model, delta, base)
        _compare(merged, merged_state_dict(model), delta)
    except BaseException:
        write_tensors(model, before)
        for state, loaded, checked in known:
            state.loaded, state.base_checked = loaded, checked
        raise
    return model


def unmerge_checkpoint(args: Namespace) -> int:
    """Write the full checkpoint that ``args.checkpoint`` was merged from.

    Returns:
        int: Number of tensors written.

    Raises:
        PEFTError: If files or config do not fit.
    """
    cfg = _config(args)
    checkpoint = read_checkpoint(args.checkpoint)
    model = build_model(cfg)
    unmerge(model, checkpoint['state_dict'], args.unmerge, args.base)
    state = model.state_dict()
    _write(args.out, state, checkpoint.get('meta'), cfg)
    return len(state)


def _config(args: Namespace) -> Config:
    check_out(args.out, args.force, args.checkpoint,
              getattr(args, 'base', None), getattr(args, 'unmerge', None))
    cfg = read_config(args)
    if not find_peft_backbones(cfg):
        raise PEFTError(f'{args.config} attaches no method; give the config '
                        'the checkpoint was trained with, or its --method.')
    return cfg


def _write(out: str, state: Dict[str, Tensor], meta: Any, cfg: Config) -> None:
    meta = {k: meta[k] for k in KEPT_META if k in (meta or {})}
    meta.update(cfg=cfg.pretty_text, mmpeft_version=__version__)
    write_checkpoint(dict(meta=meta, state_dict=state), out)


def _near(a: Any, b: Tensor) -> bool:
    if not isinstance(a, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    a = a.cpu()
    return torch.equal(a, b) or a.is_floating_point() and torch.allclose(
        a.double(), b.double(), rtol=torch.finfo(a.dtype).eps, atol=0)


def _compare(found: Dict[str, Tensor], wanted: Dict[str, Tensor],
             delta: str) -> None:
    # Products in float64 may differ in their last bit between machines, and
    # so may, now and then, how they are rounded.
    odd = list(found.keys() ^ wanted.keys())
    for key in found.keys() & wanted.keys():
        if not _near(found[key], wanted[key].cpu()):
            odd.append(key)
    if odd:
        raise MergeError(
            f'These weights are not the base of {delta} merged with it: '
            f'{len(odd)} of {len(wanted)} tensors differ, such as '
            f'{min(map(str, odd))!r}. They were merged from another delta, or '
            'trained on since.')
