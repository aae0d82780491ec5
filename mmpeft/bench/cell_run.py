"""One cell, from its config to its row."""
import datetime
import glob
import json
import math
import os
import os.path as osp
import shutil
import threading
from typing import Any, Dict, List, Optional

from ..counting import ppt_factor
from ..errors import PEFTError
from .launch import Launcher, locked
from .plan import Task

__all__ = ['CellRun', 'measured', 'tidy', 'utc']

#: How often a run that somebody killed is started, in one call.
STARTS = 3


def utc() -> str:
    """Now."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return now.isoformat(timespec='seconds')


class CellRun:
    """The run of a cell in its folder.

    Args:
        folder (str): Its own; what is there of the same digest goes on.
        text (str): The config.
        digest (str): Of all that the result depends on.
        arguments (list[str]): For ``tools/train.py``.
        launcher (Launcher): How it is started.
        env (dict): Added to the environment.
        epochs (int, optional): Of the run, if it counts them.
    """

    def __init__(self,
                 folder: str,
                 text: str,
                 digest: str,
                 arguments: List[str],
                 launcher: Launcher,
                 env: Dict[str, str],
                 epochs: Optional[int] = None) -> None:
        self.folder = osp.abspath(folder)
        self.text = text
        self.digest = digest
        self.arguments = arguments
        self.launcher = launcher
        self.env = env
        self.epochs = epochs
        self.process = None
        self._stopped = threading.Event()

    @property
    def log(self) -> str:
        return osp.join(self.folder, 'train.log')

    @property
    def work_dir(self) -> str:
        # Not the folder itself: mmengine writes a config of the same name.
        return osp.join(self.folder, 'run')

    def stop(self) -> None:
        """End it; what it has saved is where the next call goes on."""
        self._stopped.set()
        if self.process is not None:
            self.process.terminate()

    def run(self) -> Optional[Dict[str, Any]]:
        """Train.

        Returns:
            dict: ``exit_status``, and ``record`` or ``reason``. None, if it
            was stopped.
        """
        os.makedirs(self.folder, exist_ok=True)
        # A run of a killed benchmark may need a moment to follow it.
        with locked(self.folder + '.lock', wait=True) as lock:
            self._prepare()
            status = 0
            for _ in range(STARTS):
                record = self._record()
                if record is not None:
                    return dict(exit_status=0, record=record)
                if self._stopped.is_set():
                    return None
                self.process = self.launcher.start(
                    osp.join(self.folder, 'cell.py'), self.work_dir,
                    self.arguments, self.log, self.env, lock)
                if self._stopped.is_set():
                    self.process.terminate()
                status = self.process.wait()
                if self._stopped.is_set():
                    return None
                if status >= 0:
                    break
            record = self._record()
            if status == 0 and record is not None:
                return dict(exit_status=0, record=record)
            return dict(exit_status=status, reason=self._why(status))

    def _prepare(self) -> None:
        """A folder with this config, and nothing of another."""
        mark = osp.join(self.folder, 'digest')
        try:
            with open(mark) as file:
                same = file.read() == self.digest
        except OSError:
            same = False
        if not same:
            shutil.rmtree(self.folder)
            os.makedirs(self.folder)
            with open(osp.join(self.folder, 'cell.py'), 'w') as file:
                file.write(self.text)
            # Last: without it, the folder starts again.
            with open(mark, 'w') as file:
                file.write(self.digest)

    def _record(self) -> Optional[Dict[str, Any]]:
        try:
            with open(osp.join(self.work_dir, 'record.json')) as file:
                return json.load(file)
        except OSError:
            return None

    def _why(self, status: int) -> str:
        """The last thing that it said, which is one sentence of ours or the
        end of a traceback."""
        if status < 0:
            return (f'killed by signal {-status}, {STARTS} times (9 may mean '
                    'that memory ran out)')
        with open(self.log, errors='replace') as file:
            lines = [line.strip() for line in file if line.strip()]
        errors = [s for s in lines if s.startswith('Error: ')]
        if errors:
            return errors[-1][len('Error: '):]
        # torchrun says more after it.
        raised = [
            s.split(']:', 1)[-1] for s in lines
            if ('Error: ' in s or 'Exception: ' in s) and 'elastic' not in s
        ]
        said = (raised or lines or ['nothing'])[-1]
        return f'tools/train.py ended with status {status}: {said[:500]}'


def measured(task: Task, record: Dict[str, Any]) -> Dict[str, Any]:
    """Columns of a finished run.

    Raises:
        PEFTError: If there is no number to report.
    """
    if not record['finite']:
        raise PEFTError('a trained weight is not finite: training diverged')
    metrics = record['metrics']
    if task.metric not in metrics:
        raise PEFTError(f'there is no metric {task.metric!r}; the evaluation '
                        f'gave {", ".join(metrics) or "nothing"}')
    metric = metrics[task.metric] * task.metric_scale
    if not math.isfinite(metric) or not 0 <= metric <= 100:
        raise PEFTError(f'{task.metric} is {metric:g}, no percentage')
    backbone = record['backbone_trainable']
    return dict(
        metric=metric,
        # JSON has no word for them.
        metrics={
            k: v if math.isfinite(v) else None
            for k, v in metrics.items()
        },
        backbone_trainable=backbone,
        head_trainable=record['model_trainable'] - backbone,
        model_total=record['model_total'],
        ppt=metric * ppt_factor(backbone),
        ppt_with_head=metric * ppt_factor(record['model_trainable']),
        train_step_s=record['wall_s_per_step']
        if record['device'] != 'cpu' else record['cpu_s_per_step'],
        peak_bytes=record['peak_bytes'])


def tidy(folder: str, phase: str, keep: str) -> Optional[int]:
    """Remove what a finished cell need not keep.

    Returns:
        int: Bytes of the delta, None if there is none: of Full, it would be
        the model.
    """
    work_dir = glob.escape(osp.join(folder, 'run'))
    deltas = glob.glob(osp.join(work_dir, '*_delta.safetensors'))
    newest = max(deltas, key=osp.getmtime, default=None)
    size = osp.getsize(newest) if newest else None
    if keep == 'all':
        return size
    gone = glob.glob(osp.join(work_dir, '*.pth'))
    # The logger has written the same.
    gone += glob.glob(osp.join(glob.escape(folder), 'train.log'))
    gone += [
        d for d in deltas
        if keep == 'nothing' or phase == 'tune' or d != newest
    ]
    for path in gone:
        os.remove(path)
    return size
