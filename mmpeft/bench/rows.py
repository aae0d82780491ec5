"""The rows of a plan: what earlier calls left, and what is to come."""
import os
import os.path as osp
from typing import Any, Dict, List

from .cell_config import TaskConfigs
from .cell_run import tidy, utc
from .cells import Cell, doomed, final_cells, next_cells, refused_cells
from .plan import Plan
from .table import read_rows, remove_rows, write_rows
from .versions import versions

__all__ = ['Rows', 'results_file']


def results_file(folder: str) -> str:
    """Where the table is."""
    return osp.join(folder, 'results.sqlite')


class Rows:
    """Name of a cell -> its row, in memory and in the file.

    Args:
        plan (Plan): The plan.
        folder (str): Of its results.
        configs (dict[str, TaskConfigs]): By task.
        retry_failed (bool): Whether failed cells are forgotten.
    """

    def __init__(self, plan: Plan, folder: str,
                 configs: Dict[str, TaskConfigs], retry_failed: bool) -> None:
        self.plan = plan
        self.folder = folder
        self.configs = configs
        self.file = results_file(folder)
        self.rows: Dict[str, Dict[str, Any]] = {}
        #: Names of failed cells that are to start anew.
        self.forgotten: set = set()
        self._load(retry_failed)

    def _load(self, retry_failed: bool) -> None:
        """Take over what earlier calls left, as far as it still holds."""
        os.makedirs(self.folder, exist_ok=True)
        found = read_rows(self.file) if osp.isfile(self.file) else []
        known = {row['cell']: row for row in found}
        if retry_failed:
            self.forgotten = {
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
                    and cell.name not in self.forgotten
                if ended and row['digest'] == self.digest(cell):
                    self.rows[cell.name] = row
                    if row['status'] == 'done':
                        # A killed call may not have come to it.
                        tidy(
                            self.cell_folder(cell), cell.phase, self.plan.keep)
            cells = [
                c for c in next_cells(self.plan, self.rows)
                if c.name not in seen
            ]
        self.fill()
        write_rows(self.file, self.rows.values())
        remove_rows(self.file, set(known) - set(self.rows))

    def digest(self, cell: Cell) -> str:
        """Of all that its result depends on."""
        return self.configs[cell.task].digest(cell)

    def cell_folder(self, cell: Cell) -> str:
        """Of a cell alone."""
        return osp.join(self.folder, 'cells', cell.name)

    def make(self, cell: Cell, **values) -> Dict[str, Any]:
        """A row with what is known of a cell before it runs, and more."""
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

    def fill(self) -> List[Dict[str, Any]]:
        """Make rows for all that is still to come; none is ever missing.

        Returns:
            list[dict]: Those that are new.
        """
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
                new.append(self.make(cell, status='waiting'))
        for row in new:
            self.rows[row['cell']] = row
        return new

    def _failures(self, cells: List[Cell], reason: str,
                  **values) -> List[Dict[str, Any]]:
        """Rows of cells that are not run, because of what others said."""
        return [
            self.make(
                cell,
                status='failed',
                reason=reason,
                digest=self.digest(cell),
                versions=versions(),
                ended=utc(),
                **values) for cell in cells
            if self.rows.get(cell.name, {}).get('status') not in ('failed',
                                                                  'running')
        ]

    def put(self, row: Dict[str, Any]) -> None:
        """Take a row, and what follows from it, into memory and file."""
        self.rows[row['cell']] = row
        write_rows(self.file, [row, *self.fill()])

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
