"""From a checkpoint file to a merged one."""
import os.path as osp
from argparse import Namespace

from ..config import find_peft_backbones
from ..errors import PEFTError
from ..merging import merged_state_dict
from ..version import __version__
from .checkpoint import (is_delta, load_exactly, read_checkpoint, strip_method,
                         write_checkpoint)
from .count import build_model, without_init
from .delta_loading import load_with_base
from .run import read_config

__all__ = ['merge_checkpoint']

# Training state has no meaning for a merged model.
KEPT_META = ('dataset_meta', 'epoch', 'iter', 'seed', 'experiment_name',
             'time', 'mmengine_version')


def _same(out: str, checkpoint: str) -> bool:
    # A checkpoint that does not exist has its own sentence, later.
    return osp.exists(checkpoint) and osp.samefile(out, checkpoint)


def merge_checkpoint(args: Namespace) -> int:
    """Merge ``args.checkpoint`` into ``args.out``.

    Returns:
        int: Number of tensors written.

    Raises:
        PEFTError: If files or config do not fit.
        MergeError: If the merge would not be exact.
    """
    if osp.exists(args.out) and (not args.force
                                 or _same(args.out, args.checkpoint)):
        raise PEFTError(f'{args.out} exists already; choose another file, or '
                        '--force (never the checkpoint itself).')
    cfg = read_config(args)
    if not find_peft_backbones(cfg):
        raise PEFTError(f'{args.config} attaches no method; give the config '
                        'the checkpoint was trained with, or its --method.')
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
    meta = checkpoint.get('meta') or {}
    meta = {k: meta[k] for k in KEPT_META if k in meta}
    meta.update(cfg=stock_cfg.pretty_text, mmpeft_version=__version__)
    write_checkpoint(dict(meta=meta, state_dict=merged), args.out)
    return len(merged)
