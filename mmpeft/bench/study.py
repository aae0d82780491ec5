"""Runs the cells of a plan, some at a time, and keeps their table."""
import os
import os.path as osp
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Dict, Optional

from ..errors import PEFTError
from .cell_config import TaskConfigs, config_text
from .cell_run import CellRun, measured, tidy, utc
from .cells import Cell, next_cells
from .launch import Launcher
from .plan import Plan
from .rows import Rows
from .versions import versions

__all__ = ['Study']


class Study:
    """The cells of a plan and their rows.

    Args:
        plan (Plan): The plan.
        folder (str): Of its results.
        configs (dict[str, TaskConfigs]): By task.
        launcher (Launcher): How runs are started.
        retry_failed (bool): Whether failed cells are run again.
        tell (Callable): Gets a cell and its row when it has ended.
    """

    def __init__(
        self,
        plan: Plan,
        folder: str,
        configs: Dict[str, TaskConfigs],
        launcher: Launcher,
        retry_failed: bool = False,
        tell: Callable[[Cell, Dict[str, Any]],
                       None] = lambda *_: None) -> None:
        self.plan = plan
        self.configs = configs
        self.launcher = launcher
        self.tell = tell
        self.running: Dict[str, CellRun] = {}
        # Also those that have no process yet.
        self._active: set = set()
        self._changed = threading.Condition()
        self._stopped = False
        self._deadline: Optional[float] = None
        self.table = Rows(plan, folder, configs, retry_failed)

    @property
    def rows(self) -> Dict[str, Dict[str, Any]]:
        """Name of a cell -> its row."""
        return self.table.rows

    def _take(self) -> Optional[Cell]:
        """Waits for a cell that can run; None when there will be none."""
        with self._changed:
            while True:
                late = self._deadline and time.monotonic() > self._deadline
                if self._stopped or late:
                    return None
                cell = next(
                    (c for c in next_cells(self.plan, self.rows)
                     if self.rows.get(c.name, {}).get('status') != 'running'
                     and c.name not in self.running), None)
                if cell is not None:
                    self.table.put(
                        self.table.make(cell, status='running', started=utc()))
                    self._active.add(cell.name)
                    return cell
                if not self._active:
                    return None
                self._changed.wait()

    def _work(self, slot: int) -> None:
        """Runs cells one after the other."""
        while (cell := self._take()) is not None:
            row = None
            try:
                row = self._run(cell, slot)
            finally:
                with self._changed:
                    self.running.pop(cell.name, None)
                    self._active.discard(cell.name)
                    # Stopped: the next call goes on.
                    self.table.put(
                        row or self.table.make(cell, status='waiting'))
                    self._changed.notify_all()
            if row is not None:
                if row['status'] == 'done':
                    tidy(
                        self.table.cell_folder(cell), cell.phase,
                        self.plan.keep)
                self.tell(cell, row)

    def _run(self, cell: Cell, slot: int) -> Optional[Dict[str, Any]]:
        task = self.plan.tasks[cell.task]
        configs = self.configs[cell.task]
        arguments = ['--method', task.methods[cell.method]]
        if task.at:
            arguments += ['--at', task.at]
        digest = configs.digest(cell)
        if cell.name in self.table.forgotten:
            # Not from the state in which it failed.
            digest_file = osp.join(self.table.cell_folder(cell), 'digest')
            if osp.exists(digest_file):
                os.remove(digest_file)
            self.table.forgotten.discard(cell.name)
        cfg = configs.of(cell)
        run = CellRun(
            self.table.cell_folder(cell),
            config_text(cfg), digest, arguments, self.launcher,
            self.launcher.devices(slot), cfg['train_cfg'].get('max_epochs'))
        self.running[cell.name] = run
        if self._stopped:
            return None
        started = utc()
        result = run.run()
        if result is None:
            return None
        values = dict(
            digest=digest,
            started=started,
            ended=utc(),
            exit_status=result['exit_status'],
            versions=versions())
        try:
            if 'reason' in result:
                raise PEFTError(result['reason'])
            values.update(measured(task, result['record']), status='done')
            values['delta_bytes'] = tidy(run.folder, cell.phase, 'all')
        except PEFTError as error:
            values.update(status='failed', reason=str(error))
        return self.table.make(cell, **values)

    def stop(self) -> None:
        """End what runs and start nothing more."""
        self._stopped = True
        for run in list(self.running.values()):
            run.stop()

    def run(self,
            jobs: int,
            budget: Optional[float] = None,
            watch: Callable[[], None] = lambda: None) -> None:
        """Run what is missing.

        Args:
            jobs (int): Cells at a time.
            budget (float, optional): Minutes after which none is started.
            watch (Callable): Called a few times a second.
        """
        if budget is not None:
            self._deadline = time.monotonic() + 60 * budget
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(self._work, i) for i in range(jobs)]
            try:
                while not all(f.done() for f in futures):
                    watch()
                    if any(f.done() and f.exception() for f in futures):
                        break
                    time.sleep(.25)
            finally:
                # Also of an error in one of them, and of an interrupt.
                if not all(f.done() for f in futures):
                    self.stop()
                with self._changed:
                    self._changed.notify_all()
            for future in futures:
                future.result()
