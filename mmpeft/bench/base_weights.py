"""Weights that a plan trains itself, where nobody has brought them."""
import glob
import hashlib
import os.path as osp
from pathlib import Path
from typing import Callable

import torch

from ..config import load_config
from ..errors import PEFTError
from ..whole_file import whole_file
from .cell_config import add_hooks, config_text, fit_budget
from .cell_run import CellRun, tidy
from .launch import Launcher
from .plan import Base

__all__ = ['base_run', 'finish', 'publish']


def publish(checkpoint: str, out: str, **meta) -> None:
    """The weights of a stock checkpoint, without the optimizer.

    ``EMAHook`` saves the averaged weights as ``state_dict``. Window indices
    are left out: every library makes its own.
    """
    state = torch.load(checkpoint, map_location='cpu', weights_only=False)
    weights = {
        key: value
        for key, value in state['state_dict'].items()
        if not key.endswith('relative_position_index')
    }
    with whole_file(str(out)) as temporary:
        torch.save(dict(state_dict=weights, meta=meta), temporary)


def base_run(base: Base, folder: str, launcher: Launcher,
             jobs: int) -> CellRun:
    """The run that makes a base, for :func:`finish`.

    It trains all of the stock model (``--method Full`` adds nothing to it,
    but lets it go on where it was killed).

    Args:
        base (Base): From the plan.
        folder (str): Of the results.
        launcher (Launcher): How it is started.
        jobs (int): On a CPU, its threads: nothing runs beside it.
    """
    cfg = load_config(base.config)
    cfg.merge_from_dict(base.options)
    plain = cfg.to_dict()
    plain.pop('work_dir', None)
    length = fit_budget(plain, None, base.config)
    plain.setdefault('randomness', dict(seed=0))
    add_hooks(plain, -(-length // 10))
    text = config_text(plain)
    return CellRun(
        osp.join(folder, 'bases',
                 Path(base.out).stem), text,
        hashlib.sha256(text.encode()).hexdigest(), ['--method', 'Full'],
        launcher, {
            key: str(jobs) if key.endswith('NUM_THREADS') else value
            for key, value in launcher.devices(0).items()
        })


def finish(base: Base, run: CellRun, tell: Callable[[str], None]) -> bool:
    """Train, and publish the weights; False if it was stopped.

    Raises:
        PEFTError: If the training failed.
    """
    tell(f'{base.out} is not there; training {base.config}')
    result = run.run()
    if result is None:
        return False
    if 'reason' in result:
        raise PEFTError(f'{base.out} could not be made: {result["reason"]}')
    work_dir = glob.escape(run.work_dir)
    newest = max(glob.glob(osp.join(work_dir, '*.pth')), key=osp.getmtime)
    publish(newest, base.out, config=base.config)
    tidy(run.folder, 'tune', 'nothing')
    return True
