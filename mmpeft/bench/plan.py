"""Plans: which bases, methods, seeds and learning rates are compared.

docs/en/bench.md explains the file.
"""
import re
from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Tuple

__all__ = ['Base', 'Budget', 'Plan', 'Task', 'plain_name']


@dataclass(frozen=True)
class Budget:
    """Length of a run.

    Args:
        unit (str): 'iters' or 'epochs', as the config counts.
        count (int): How many.
    """

    unit: str
    count: int


@dataclass(frozen=True)
class Task:
    """A base config and what is compared on it.

    Args:
        name (str): As in the table.
        config (str): A file, or a shipped config by name.
        metric (str): Name of the metric, as the evaluator logs it.
        metric_scale (float): Factor that makes it percent.
        methods (dict): Name -> what ``--method`` gets.
        seeds (tuple): Of the final runs.
        lrs (tuple): The grid, the same for every method; empty: the config's.
        head_lrs (tuple): If given, the grid for neck and head, from which
            Frozen chooses for all; ``lrs`` is for the backbone then.
        tune_seed (int): Seed of the runs that choose the rate.
        rule (str): How the grid is searched, a key of ``climb.RULES``.
        budget (Budget, optional): Length of the runs; None: the config's.
        tune_budget (Budget, optional): Length of those that choose the rate.
        checkpoint_interval (int, optional): In the config's unit. Defaults
            to a tenth of the run.
        options (dict): Merged into the config.
        tune (dict): Merged, too, where the rate is chosen: the tuning split.
        final (dict): Merged, too, where it is reported.
        holdout (int, optional): Instead of ``tune``: every so many-th
            training sample is held out, and chooses the rate.
        env (dict): Environment variables that the config reads.
        method_options (dict): Name of a method -> merged into the config of
            its cells, such as the head of a method with outputs of its own.
        at (str, optional): Path of the backbone, where there are several.
        folder (dict): ``root`` of a folder that ``folders.py`` describes.
            In a plan also ``kinds``: what the task is for each kind.
        costs (dict): ``image_size``, ``batch_size`` and ``repeats`` of
            tools/benchmark.py; empty: costs are not measured.
    """

    name: str
    config: str
    metric: str
    methods: Dict[str, str]
    metric_scale: float = 1.
    seeds: Tuple[int, ...] = (0, )
    lrs: Tuple[float, ...] = ()
    head_lrs: Tuple[float, ...] = ()
    tune_seed: int = 100
    rule: str = 'climb'
    budget: Optional[Budget] = None
    tune_budget: Optional[Budget] = None
    checkpoint_interval: Optional[int] = None
    options: Dict[str, Any] = field(default_factory=dict)
    tune: Dict[str, Any] = field(default_factory=dict)
    final: Dict[str, Any] = field(default_factory=dict)
    holdout: Optional[int] = None
    env: Dict[str, str] = field(default_factory=dict)
    method_options: Dict[str, Dict[str, Any]] = field(default_factory=dict)
    at: Optional[str] = None
    folder: Dict[str, Any] = field(default_factory=dict)
    costs: Dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Base:
    """Weights that the plan trains itself, once, where they are not there.

    Args:
        config (str): Of the training.
        out (str): The file that the tasks read.
        options (dict): Merged into the config.
    """

    config: str
    out: str
    options: Dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What a plan file says.

    Args:
        name (str): Also of the folder with the results.
        tasks (dict[str, Task]): By name.
        bases (tuple[Base]): Weights to make before.
        keep (str): 'delta' (of final cells; the rest is removed), 'all' or
            'nothing'.
        title (str): One sentence for the report.
    """

    name: str
    tasks: Dict[str, Task]
    bases: Tuple[Base, ...] = ()
    keep: str = 'delta'
    title: str = ''


def plain_name(method: str) -> str:
    """A method's name as part of a folder's."""
    return re.sub(r'[^A-Za-z0-9.-]+', '-', method)
