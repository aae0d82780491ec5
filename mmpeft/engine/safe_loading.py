"""What the tools let mmengine open, and from where a run goes on."""
import glob
import logging
import os.path as osp
from typing import Any, Dict, Optional

from mmengine.dist import get_rank
from mmengine.logging import print_log
from mmengine.runner import checkpoint as stock

from ..errors import PEFTError
from ..preflight import download
from ..safe_pickle import check_pickle

__all__ = ['guard_loading', 'latest_checkpoint']


def guard_loading() -> None:
    """Check whatever mmengine opens from now on in this process.

    For the tools. A library does not do that to the program that imports it.
    """
    register = stock.CheckpointLoader.register_scheme
    register('', load_from_local, force=True)
    register(('http://', 'https://'), load_from_http, force=True)


def load_from_local(filename: str, map_location: Any = None) -> Dict[str, Any]:
    """As mmengine's, after a look at what the file may run.

    Raises:
        PEFTError: If it may run anything.
    """
    if osp.exists(osp.expanduser(filename)):
        check_pickle(osp.expanduser(filename))
    return _without_code(stock.load_from_local(filename, map_location))


def load_from_http(filename: str,
                   map_location: Any = None,
                   **kwargs: Any) -> Dict[str, Any]:
    """As mmengine's, after a look at what was downloaded.

    Raises:
        PEFTError: If it may run anything.
    """
    if get_rank() == 0:  # the others wait until this one has opened it
        check_pickle(download('load_from', filename))
    return _without_code(
        stock.load_from_http(filename, map_location, **kwargs))


def _without_code(checkpoint: Any) -> Any:
    """Runner.resume() executes this text, to compare numbers of GPUs."""
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    if isinstance(meta, dict):
        meta.pop('config', None)
    return checkpoint


def latest_checkpoint(folder: str) -> Optional[str]:
    """The checkpoint that a run in a folder goes on from; None if it has to
    begin.

    ``last_checkpoint`` names it. A process may die while it writes that file,
    or the one it names, where mmpeft does not write it; then it is the newest
    one that is whole.
    """
    note = osp.join(folder, 'last_checkpoint')
    if not osp.isfile(note):
        return None
    with open(note) as file:
        named = file.read().strip()
    files = sorted(
        glob.glob(osp.join(glob.escape(folder), '*[0-9].pth')),
        key=osp.getmtime,
        reverse=True)
    # The best ones have no state of the optimizer.
    files = [f for f in files if not osp.basename(f).startswith('best_')]
    for path in [named] * bool(named) + files:
        try:
            check_pickle(path)
        except PEFTError as error:
            print_log(
                f'Not resumed from {path}: {error}',
                logger='current',
                level=logging.WARNING)
            continue
        return path
    return None
