"""From a full checkpoint to a delta, and what is in one."""
import os.path as osp
from argparse import Namespace
from typing import Any, Dict, List

from ..config import find_peft_backbones
from ..delta import save_delta
from ..delta_file import Header, read_delta
from ..delta_parts import missing_in
from ..errors import PEFTError
from .checkpoint import KEPT_META, check_out, load_exactly, read_checkpoint
from .count import build_model, without_init
from .delta_loading import recorded_base, sources_of
from .run import read_config

__all__ = ['extract_delta', 'describe_delta']


def extract_delta(args: Namespace) -> Header:
    """Write the delta in ``args.checkpoint`` to ``args.out``.

    Raises:
        PEFTError: If files or config do not fit.
    """
    if not args.out.endswith('.safetensors'):
        raise PEFTError(f'{args.out!r}: let the name of a delta end in '
                        '_delta.safetensors, by which mmengine knows it.')
    check_out(args.out, args.force, args.checkpoint)
    cfg = read_config(args)
    if not find_peft_backbones(cfg):
        raise PEFTError(f'{args.config} attaches no method; give the config '
                        'the checkpoint was trained with, or its --method.')
    checkpoint = read_checkpoint(args.checkpoint)
    with without_init():
        model = build_model(cfg)
    load_exactly(model, checkpoint['state_dict'], args.checkpoint)
    sources = checkpoint.get('peft_sources') or sources_of(cfg)
    found = recorded_base(sources, {n for n, _ in model.named_parameters()})
    meta = checkpoint.get('meta') or {}
    return save_delta(
        model,
        args.out,
        sources=sources,
        meta={k: meta[k]
              for k in KEPT_META if k in meta},
        extra=missing_in(model, found))


def describe_delta(path: str) -> Dict[str, Any]:
    """What a delta is, as ``tools/inspect_peft.py --json`` prints it.

    Raises:
        PEFTError: If the file is damaged or no delta.
    """
    tensors, header = read_delta(path)
    by_part: Dict[str, List[int]] = {}
    for name, value in tensors.items():
        part = by_part.setdefault(_part(name, header), [0, 0])
        part[0] += 1
        part[1] += value.numel()
    return dict(
        path=path,
        bytes=osp.getsize(path),
        format_version=header.format_version,
        backbones=header.backbones,
        base=dict(
            fingerprint=header.base['fingerprint'],
            tensors=len(header.base['names']),
            sources=header.base['sources']),
        parts={
            k: dict(tensors=t, parameters=n)
            for k, (t, n) in sorted(by_part.items())
        },
        packages=header.packages,
        meta=header.meta)


def _part(name: str, header: Header) -> str:
    if name in set(header.base['names']):
        return 'base, in no source'
    if '.peft.' in f'.{name}':
        return f'.{name}'.split('.peft.', 1)[1].split('.')[0]
    return name.split('.')[0]
