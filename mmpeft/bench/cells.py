"""Which cells a plan has, and which of them can run now."""
from dataclasses import dataclass
from typing import Any, Dict, Iterable, List, Optional

from .climb import RULES
from .plan import Plan, Task, plain_name

__all__ = [
    'Cell', 'chosen', 'doomed', 'final_cells', 'next_cells', 'refused_cells'
]

Row = Dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run of ``tools/train.py``.

    Args:
        task (str): Name of the task.
        method (str): Name of the method in the plan.
        phase (str): 'tune' or 'final'.
        seed (int): Of weights, order of the samples and augmentation.
        lr (float, optional): Learning rate; None is the config's, or, of a
            final cell, not chosen yet.
        head_lr (float, optional): Of neck and head, where they have one.
    """

    task: str
    method: str
    phase: str
    seed: int
    lr: Optional[float] = None
    head_lr: Optional[float] = None

    @property
    def name(self) -> str:
        """Of the folder and in the table; a final cell has it before its
        rate is known."""
        method = plain_name(self.method)
        rates = ''
        if self.phase == 'tune':
            rates = ''.join(f'_{key}{rate:g}'
                            for key, rate in (('lr', self.lr), ('head',
                                                                self.head_lr))
                            if rate is not None)
        return f'{self.task}_{method}_{self.phase}{rates}_seed{self.seed}'


def _grid(task: Task, method: str, rows: Dict[str, Row]) -> List[Cell]:
    """The tuning cells of a method; empty, while the rate of the head is
    not known."""
    first = dict(
        task=task.name, method=method, phase='tune', seed=task.tune_seed)
    if not task.head_lrs:
        return [Cell(lr=lr, **first) for lr in task.lrs]
    if method == 'Frozen':
        # It has nothing for the other rate.
        return [
            Cell(lr=task.lrs[0], head_lr=lr, **first) for lr in task.head_lrs
        ]
    frozen = chosen(task, 'Frozen', rows)
    if frozen is None:
        return []
    return [Cell(lr=lr, head_lr=frozen.head_lr, **first) for lr in task.lrs]


def _walk(task: Task, method: str, rows: Dict[str, Row]):
    """Cells of the grid to run next; and all that were tried, best first,
    when the walk is over."""
    cells = _grid(task, method, rows)
    if len(cells) < 2:
        return [], cells
    ended = {
        i: rows[c.name]
        for i, c in enumerate(cells)
        if c.name in rows and rows[c.name]['status'] in ('done', 'failed')
    }
    if _refusal(ended.values()):
        return [], []
    scores = {
        i: row['metric'] if row['status'] == 'done' else None
        for i, row in ended.items()
    }
    missing, order = RULES[task.rule](len(cells), scores)
    return [cells[i] for i in missing], [cells[i] for i in order]


def _refusal(rows: Iterable[Row]) -> Optional[str]:
    """Why a run was refused: it would be with any other rate."""
    return next((r['reason'] for r in rows if r.get('exit_status') == 2), None)


def refused_cells(task: Task, method: str, rows: Dict[str, Row]):
    """The tuning cells that share the refusal of one of them, and its
    reason."""
    cells = _grid(task, method, rows)
    if len(cells) < 2:
        return [], None
    reason = _refusal(rows[c.name] for c in cells if c.name in rows)
    return (cells, reason) if reason else ([], None)


def chosen(task: Task, method: str, rows: Dict[str, Row]) -> Optional[Cell]:
    """The tuning cell with the rate for the final ones, when it is known."""
    missing, order = _walk(task, method, rows)
    return order[0] if order and not missing else None


def doomed(task: Task, method: str, rows: Dict[str, Row]) -> Optional[str]:
    """Why a method gets no final cells: none of its tuning cells ended
    well. None, if that is not so, or not so yet."""
    if not task.lrs:
        return None
    cells = _grid(task, method, rows)
    if not cells:
        reason = doomed(task, 'Frozen', rows) if method != 'Frozen' else None
        return reason and f'Frozen chose no rate for the head: {reason}'
    if len(cells) < 2:
        return None
    missing, order = _walk(task, method, rows)
    if missing or order:
        return None
    reasons = [
        rows[c.name]['reason'] for c in cells
        if c.name in rows and rows[c.name]['status'] == 'failed'
    ]
    return reasons[0] if reasons else None


def final_cells(task: Task, method: str, rows: Dict[str, Row]) -> List[Cell]:
    """One per seed; their rate is None until it is chosen."""
    best = chosen(task, method, rows) if task.lrs else None
    return [
        Cell(
            task=task.name,
            method=method,
            phase='final',
            seed=seed,
            lr=best.lr if best else None,
            head_lr=best.head_lr if best else None) for seed in task.seeds
    ]


def next_cells(plan: Plan, rows: Dict[str, Row]) -> List[Cell]:
    """What can run now: learning rates first, then seed by seed.

    Args:
        plan (Plan): The plan.
        rows (dict[str, dict]): Name of a cell -> its row; what is not
            'done' or 'failed' there is still to be run.
    """
    tune, final = [], []
    for task in plan.tasks.values():
        for method in task.methods:
            tune += _walk(task, method, rows)[0]
            if not task.lrs or chosen(task, method, rows):
                final += [(task.seeds.index(c.seed), c)
                          for c in final_cells(task, method, rows)]
    final.sort(key=lambda pair: pair[0])
    return [
        c for c in tune + [c for _, c in final]
        if rows.get(c.name, {}).get('status') not in ('done', 'failed')
    ]
