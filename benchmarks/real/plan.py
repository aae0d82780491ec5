"""What is run: methods, learning rates, seeds, and which cell comes when."""

import ast
import hashlib
import json
from dataclasses import asdict, dataclass
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
    """

    name: str
    config: str
    metric: str
    grid: tuple
    tune_seed: int
    seeds: tuple = ()

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
        seeds=(0, 1, 2)),
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
    """

    task: str
    method: str
    lr: float
    seed: int
    phase: str
    iters: Optional[int] = None

    @property
    def name(self) -> str:
        short = f'_iters{self.iters}' if self.iters else ''
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
    lowest or the highest that was tried, the next one beyond it is.

    Returns:
        tuple: The cells to run next, none when the walk is over, and the
        finished ones, best first. A failed cell counts as tried, not as good;
        a tie goes to the smaller rate.
    """
    cells = [c for c in tuning_cells(task, iters) if c.method == method]
    low, high = (len(cells) - 1) // 2, len(cells) // 2
    while True:
        tried = cells[low:high + 1]
        missing = [c for c in tried if c.name not in results]
        if missing:
            return missing, []
        done = [c for c in tried if results[c.name]['status'] == 'done']
        done.sort(key=lambda c: (-results[c.name]['tune'][task.metric], c.lr))
        best = cells.index(done[0]) if done else low
        if best == low and low > 0:
            low -= 1
        elif best == high and high < len(cells) - 1:
            high += 1
        else:
            return [], done


def choose_lr(task: Task,
              results: dict[str, dict],
              method: str,
              iters: Optional[int] = None) -> Optional[float]:
    """The best learning rate, None until the walk over the grid has ended."""
    done = walk_grid(task, results, method, iters)[1]
    return done[0].lr if done else None


def next_cells(task: Task,
               results: dict[str, dict],
               iters: Optional[int] = None) -> list[Cell]:
    """What can be run now, in this order: learning rates first."""
    cells = [
        c for method in METHODS
        for c in walk_grid(task, results, method, iters)[0]
    ]
    order = {c.name: i for i, c in enumerate(tuning_cells(task, iters))}
    cells.sort(key=lambda c: order[c.name])
    cells += final_cells(task, results, iters)
    return [c for c in cells if c.name not in results]


def final_cells(task: Task,
                results: dict[str, dict],
                iters: Optional[int] = None) -> list[Cell]:
    """The reported runs whose learning rate is known, all methods by seed."""
    chosen = {m: choose_lr(task, results, m, iters) for m in METHODS}
    return [
        Cell(task.name, method, chosen[method], seed, 'final', iters)
        for seed in task.seeds for method in METHODS
        if chosen[method] is not None
    ]


def reported_cells(task: Task,
                   results: dict[str, dict],
                   method: str,
                   iters: Optional[int] = None) -> list[Cell]:
    """The cells behind one row of the table, whether run or not."""
    lr = choose_lr(task, results, method, iters)
    if lr is None:
        return []
    if not task.seeds:
        return [Cell(task.name, method, lr, task.tune_seed, 'tune', iters)]
    return [
        Cell(task.name, method, lr, seed, 'final', iters)
        for seed in task.seeds
    ]
