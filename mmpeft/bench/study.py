"""Runs the cells of a plan, some at a time, and keeps their table."""
import os
import os.path as osp
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Dict, List, Optional

from ..errors import PEFTError
from .cell_config import TaskConfigs, config_text
from .cell_run import CellRun, measured, tidy, utc
from .cells import Cell, doomed, final_cells, next_cells, refused_cells
from .launch import Launcher
from .plan import Plan
from .table import read_rows, remove_rows, write_rows
from .versions import versions

__all__ = ['Study', 'results_file']


def results_file(folder: str) -> str:
    """Where the table is."""
    return osp.join(folder, 'results.sqlite')


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
        self.folder = folder
        self.configs = configs
        self.launcher = launcher
        self.tell = tell
        self.file = results_file(folder)
        self.running: Dict[str, CellRun] = {}
        self.began: Dict[str, float] = {}
        self.rows: Dict[str, Dict[str, Any]] = {}
        self._changed = threading.Condition()
        self._stopped = False
        self._deadline: Optional[float] = None
        self._fresh: set = set()
        self._load(retry_failed)

    def _load(self, retry_failed: bool) -> None:
        """Take over what earlier calls left, as far as it still holds."""
        os.makedirs(self.folder, exist_ok=True)
        found = read_rows(self.file) if osp.isfile(self.file) else []
        known = {row['cell']: row for row in found}
        if retry_failed:
            self._fresh = {
                name
                for name, row in known.items() if row['status'] == 'failed'
            }
        # What comes next is known once what it depends on is taken over.
        seen: set = set()
        cells = next_cells(self.plan, self.rows)
        while cells:
            for cell in cells:
                seen.add(cell.name)
                row = known.get(cell.name)
                ended = row and row['status'] in ('done', 'failed') \
                    and cell.name not in self._fresh
                if ended and row['digest'] == self._digest(cell):
                    self.rows[cell.name] = row
                    if row['status'] == 'done':
                        # A killed call may not have come to it.
                        tidy(self._folder(cell), cell.phase, self.plan.keep)
            cells = [
                c for c in next_cells(self.plan, self.rows)
                if c.name not in seen
            ]
        self._fill()
        write_rows(self.file, self.rows.values())
        remove_rows(self.file, set(known) - set(self.rows))

    def _digest(self, cell: Cell) -> str:
        return self.configs[cell.task].digest(cell)

    def _folder(self, cell: Cell) -> str:
        return osp.join(self.folder, 'cells', cell.name)

    def _row(self, cell: Cell, **values) -> Dict[str, Any]:
        task = self.plan.tasks[cell.task]
        return dict(
            cell=cell.name,
            plan=self.plan.name,
            task=cell.task,
            config=task.config,
            method=cell.method,
            spec=task.methods[cell.method],
            seed=cell.seed,
            phase=cell.phase,
            lr=cell.lr,
            head_lr=cell.head_lr,
            metric_name=task.metric,
            work_dir=osp.join('cells', cell.name),
            **values)

    def _fill(self) -> List[Dict[str, Any]]:
        """Rows for all that is still to come; none is ever missing."""
        new: List[Dict[str, Any]] = []
        cells = next_cells(self.plan, self.rows)
        for task in self.plan.tasks.values():
            for method in task.methods:
                refused, reason = refused_cells(task, method, self.rows)
                new += self._failures(refused, reason, exit_status=2)
                finals = final_cells(task, method, self.rows)
                reason = doomed(task, method, self.rows)
                if reason is None:
                    cells += finals
                else:
                    new += self._failures(finals, reason)
        names = {row['cell'] for row in new}
        for cell in cells:
            row = self.rows.get(cell.name)
            if cell.name not in names and (row is None or
                                           (row['status'] == 'waiting'
                                            and row['lr'] != cell.lr)):
                names.add(cell.name)
                new.append(self._row(cell, status='waiting'))
        for row in new:
            self.rows[row['cell']] = row
        return new

    def _failures(self, cells: List[Cell], reason: str,
                  **values) -> List[Dict[str, Any]]:
        """Rows of cells that are not run, because of what others said."""
        return [
            self._row(
                cell,
                status='failed',
                reason=reason,
                digest=self._digest(cell),
                versions=versions(),
                ended=utc(),
                **values) for cell in cells
            if self.rows.get(cell.name, {}).get('status') not in ('failed',
                                                                  'running')
        ]

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
                    row = self._row(cell, status='running', started=utc())
                    self.rows[cell.name] = row
                    write_rows(self.file, [row])
                    self.began[cell.name] = time.monotonic()
                    return cell
                if not self.began:
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
                    self.began.pop(cell.name, None)
                    # Stopped: the next call goes on.
                    self.rows[cell.name] = row or self._row(
                        cell, status='waiting')
                    write_rows(self.file,
                               [self.rows[cell.name], *self._fill()])
                    self._changed.notify_all()
            if row is not None:
                if row['status'] == 'done':
                    tidy(self._folder(cell), cell.phase, self.plan.keep)
                self.tell(cell, row)

    def _run(self, cell: Cell, slot: int) -> Optional[Dict[str, Any]]:
        task = self.plan.tasks[cell.task]
        configs = self.configs[cell.task]
        arguments = ['--method', task.methods[cell.method]]
        if task.at:
            arguments += ['--at', task.at]
        digest = configs.digest(cell)
        if cell.name in self._fresh:
            # Not from the state in which it failed.
            digest_file = osp.join(self._folder(cell), 'digest')
            if osp.exists(digest_file):
                os.remove(digest_file)
            self._fresh.discard(cell.name)
        cfg = configs.of(cell)
        run = CellRun(
            self._folder(cell),
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
        return self._row(cell, **values)

    def add_costs(self, task: str, costs: Dict[str, Dict[str, Any]]) -> None:
        """Fill the columns of what :mod:`costs` measured.

        Args:
            task (str): Name of the task.
            costs (dict[str, dict]): Name of a method -> its columns.
        """
        changed = []
        for row in self.rows.values():
            if (row['task'], row['phase'], row['status']) == (task, 'final',
                                                              'done'):
                row.update(costs.get(row['method'], {}))
                changed.append(row)
        write_rows(self.file, changed)

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
