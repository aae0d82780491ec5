"""What is run: methods, learning rates, seeds, and which cell comes when."""

import ast
import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Optional

CONFIGS = Path(__file__).parent / 'configs'

# One rule for every bottleneck: half the width of the first stage, as 64 is
# for the 128 channels of Swin-B in the papers. Here that is 16 of 32.
METHODS = {
    'Full': 'Full',
    'Frozen': 'Frozen',
    'BitFit': 'BitFit',
    'LoRA': 'LoRA:rank=16',
    'Adapter': 'Adapter:dim=16',
    'Mona': 'Mona:dim=16'
}


@dataclass(frozen=True)
class Task:
    """A dataset with its model.

    Args:
        name (str): As in the names of cells.
        config (str): File in ``configs``.
        metric (str): What learning rates are chosen by, in percent.
        grid (tuple): Learning rates, the same for every method.
        tune_seed (int): Seed of the runs that choose the learning rate.
        seeds (tuple): Seeds of the runs that are reported. Empty: the runs
            of the grid are reported, on images that chose nothing.
        head_mult (float, optional): The chosen rate is tried once more with
            the new layers (neck and head) at so many times the rate; the
            better of the two is kept.
    """

    name: str
    config: str
    metric: str
    grid: tuple
    tune_seed: int
    seeds: tuple = ()
    head_mult: Optional[float] = None

    @property
    def config_path(self) -> Path:
        return CONFIGS / self.config


TASKS = {
    'camvid':
    Task(
        name='camvid',
        config='upernet_swin-nano_camvid.py',
        metric='mIoU',
        grid=(5e-4, 1.5e-3, 4.5e-3, 1.35e-2),
        tune_seed=100,
        seeds=(0, 1, 2),
        head_mult=3.),
    'coco-mini':
    Task(
        name='coco-mini',
        config='mask-rcnn_swin-nano_coco-mini.py',
        metric='bbox_mAP',
        grid=(5e-4, 1.5e-3, 4.5e-3),
        tune_seed=0)
}


@dataclass(frozen=True)
class Cell:
    """One run of ``tools/train.py``.

    Args:
        task (str): Name of the task.
        method (str): Name of the method, a key of ``METHODS``.
        lr (float): Peak learning rate.
        seed (int): Seed of weights, order of the images and flips.
        phase (str): 'tune' (evaluated on the images that choose the learning
            rate) or 'final' (on those that are reported).
        iters (int, optional): Fewer iterations than the config says, to try
            the study out.
        head_mult (float): Factor on ``lr`` for neck and head.
    """

    task: str
    method: str
    lr: float
    seed: int
    phase: str
    iters: Optional[int] = None
    head_mult: float = 1.

    @property
    def name(self) -> str:
        short = f'_head{self.head_mult:g}' if self.head_mult != 1 else ''
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
            spec=METHODS[self.method],
            # The first statement is the docstring.
            config=[ast.dump(node) for node in tree.body[1:]])
        if self.head_mult == 1:
            # The field is younger than some results.
            del content['head_mult']
        blob = json.dumps(content, sort_keys=True).encode()
        return hashlib.sha256(blob).hexdigest()[:16]


def tuning_cells(task: Task, iters: Optional[int] = None) -> list[Cell]:
    """Every method at every learning rate of the grid, one seed."""
    return [
        Cell(task.name, method, lr, task.tune_seed, 'tune', iters)
        for lr in task.grid for method in METHODS
    ]


def walk_grid(task: Task,
              results: dict[str, dict],
              method: str,
              iters: Optional[int] = None) -> tuple[list[Cell], list[Cell]]:
    """The one rule for all methods: climb the grid from its middle.

    The middle of the grid is tried (one rate or two); while the best is the
    lowest or the highest that was tried, the next one beyond it is. Then, if
    the task has a ``head_mult``, the best once more with that.

    Returns:
        tuple: The cells to run next, none when the walk is over, and the
        finished ones, best first. A failed cell counts as tried, not as good;
        a tie goes to the smaller rate.
    """

    def ranked(tried):
        done = [c for c in tried if results[c.name]['status'] == 'done']
        return sorted(
            done,
            key=lambda c:
            (-results[c.name]['tune'][task.metric], c.lr, c.head_mult))

    cells = [c for c in tuning_cells(task, iters) if c.method == method]
    low, high = (len(cells) - 1) // 2, len(cells) // 2
    while True:
        tried = cells[low:high + 1]
        missing = [c for c in tried if c.name not in results]
        if missing:
            return missing, []
        done = ranked(tried)
        best = cells.index(done[0]) if done else low
        if best == low and low > 0:
            low -= 1
        elif best == high and high < len(cells) - 1:
            high += 1
        elif not done or task.head_mult is None:
            return [], done
        else:
            faster = replace(done[0], head_mult=task.head_mult)
            if faster.name not in results:
                return [faster], []
            return [], ranked([*tried, faster])


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
        c for method in METHODS
        for c in walk_grid(task, results, method, iters)[0]
    ]
    cells.sort(key=lambda c: (c.head_mult, c.lr))
    cells += final_cells(task, results, iters)
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
    rows = [reported_cells(task, results, m, iters) for m in METHODS]
    cells = [c for row in rows for c in row if c.phase == 'final']
    return sorted(cells, key=lambda c: task.seeds.index(c.seed))
