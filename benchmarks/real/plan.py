"""What is run: methods, learning rates, seeds, and which cell comes when."""

import ast
import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Optional

from benchmarks.real.tasks import TASKS, Task
from mmpeft.bench.climb import climb

# How much longer the long runs of the examination are.
STRETCH = 3


@dataclass(frozen=True)
class Cell:
    """One run of ``tools/train.py``.

    Args:
        task (str): Name of the task.
        method (str): Name of the method, a key of the task's ``methods``.
        lr (float): Peak learning rate; of the backbone, if the head has its
            own.
        seed (int): Seed of weights, order of the images and flips.
        phase (str): 'tune' (evaluated on the images that choose the learning
            rate), 'final' (on those that are reported) or 'why' (on those
            too, to find out why the final runs are as they are).
        iters (int, optional): Fewer iterations than the config says, to try
            the study out.
        head_mult (float): Factor on ``lr`` for neck and head.
        stretch (int): Factor on the number of iterations, the schedule along.
    """

    task: str
    method: str
    lr: float
    seed: int
    phase: str
    iters: Optional[int] = None
    head_mult: float = 1.
    stretch: int = 1

    @property
    def name(self) -> str:
        short = f'_head{self.head_mult:.3g}' if self.head_mult != 1 else ''
        short += f'_x{self.stretch}' if self.stretch != 1 else ''
        short += f'_iters{self.iters}' if self.iters else ''
        return (f'{self.task}_{self.phase}_{self.method.lower()}_'
                f'lr{self.lr:g}_seed{self.seed}{short}')

    def digest(self) -> str:
        """Changes when the config or a setting of the cell does.

        Comments and layout of the config do not count.
        """
        tree = ast.parse(TASKS[self.task].config_path.read_text())
        content = dict(
            asdict(self),
            spec=TASKS[self.task].methods[self.method],
            # The first statement is the docstring.
            config=[ast.dump(node) for node in tree.body[1:]])
        # Only where they matter: a result outlives a new field.
        for key in ('head_mult', 'stretch'):
            if content[key] == 1:
                del content[key]
        blob = json.dumps(content, sort_keys=True).encode()
        return hashlib.sha256(blob).hexdigest()[:16]


def tuning_cells(task: Task,
                 method: str,
                 results: dict[str, dict],
                 iters: Optional[int] = None) -> list[Cell]:
    """A method at every learning rate of its grid, one seed.

    Empty, while the rate of the head is not known.
    """
    first = Cell(task.name, method, task.grid[0], task.tune_seed, 'tune',
                 iters)
    if not task.head_grid:
        return [replace(first, lr=lr) for lr in task.grid]
    if method == 'Frozen':
        # It has nothing for the other rate.
        return [
            replace(first, head_mult=head / first.lr)
            for head in task.head_grid
        ]
    frozen = choose(task, results, 'Frozen', iters)
    if frozen is None:
        return []
    head = frozen.lr * frozen.head_mult
    return [replace(first, lr=lr, head_mult=head / lr) for lr in task.grid]


def walk_grid(task: Task,
              results: dict[str, dict],
              method: str,
              iters: Optional[int] = None) -> tuple[list[Cell], list[Cell]]:
    """The one rule for all methods: climb the grid from its middle.

    The middle of the grid is tried (one rate or two); while the best is the
    lowest or the highest that was tried, the next one beyond it is.

    Returns:
        tuple: The cells to run next, none when the walk is over, and the
        finished ones, best first. A failed cell counts as tried, not as good;
        a tie goes to the smaller rate.
    """
    cells = tuning_cells(task, method, results, iters)
    if not cells:
        return [], []
    scores = {
        i:
        results[c.name]['tune'][task.metric]
        if results[c.name]['status'] == 'done' else None
        for i, c in enumerate(cells) if c.name in results
    }
    missing, order = climb(len(cells), scores)
    return [cells[i] for i in missing], [cells[i] for i in order]


def choose(task: Task,
           results: dict[str, dict],
           method: str,
           iters: Optional[int] = None) -> Optional[Cell]:
    """The best tuning cell, None until the walk over the grid has ended."""
    done = walk_grid(task, results, method, iters)[1]
    return done[0] if done else None


def next_cells(task: Task,
               results: dict[str, dict],
               iters: Optional[int] = None) -> list[Cell]:
    """What can be run now, in this order: learning rates first."""
    cells = [
        c for method in task.methods
        for c in walk_grid(task, results, method, iters)[0]
    ]
    cells.sort(key=lambda c: (c.lr, c.head_mult))
    cells += final_cells(task, results, iters)
    cells += why_cells(task, results, iters)
    return [c for c in cells if c.name not in results]


def reported_cells(task: Task,
                   results: dict[str, dict],
                   method: str,
                   iters: Optional[int] = None) -> list[Cell]:
    """The cells behind one row of the table, whether run or not."""
    best = choose(task, results, method, iters)
    if best is None:
        return []
    if not task.seeds:
        return [best]
    return [replace(best, phase='final', seed=seed) for seed in task.seeds]


def final_cells(task: Task,
                results: dict[str, dict],
                iters: Optional[int] = None) -> list[Cell]:
    """The reported runs whose learning rate is known, all methods by seed."""
    rows = [reported_cells(task, results, m, iters) for m in task.methods]
    cells = [c for row in rows for c in row if c.phase == 'final']
    return sorted(cells, key=lambda c: task.seeds.index(c.seed))


def why_cells(task: Task,
              results: dict[str, dict],
              iters: Optional[int] = None) -> list[Cell]:
    """Runs beside the study, of its first seed, on the reported images.

    (a) One rate for all makes the head choose it, which starts from nothing.
    So: the head at the rate that Frozen chose, the backbone at a fraction.
    (b) Longer training at the chosen rates.
    """
    best = {m: choose(task, results, m, iters) for m in task.methods}

    def split_rates(factors, stretch):
        if best['Frozen'] is None:
            return []
        rate = best['Frozen'].lr
        return [
            replace(
                best['Frozen'],
                method=method,
                lr=rate * factor,
                head_mult=1 / factor,
                stretch=stretch) for method in factors
            for factor in factors[method]
        ]

    cells = split_rates(task.why_mults, 1)
    cells += [
        replace(best[method], stretch=STRETCH) for method in task.why_long
        if best[method]
    ]
    cells += split_rates(task.why_long_mults, STRETCH)
    return [replace(c, phase='why', seed=task.seeds[0]) for c in cells]
