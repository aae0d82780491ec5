"""Plans: which bases, methods, seeds and learning rates are compared.

docs/en/bench.md explains the file.
"""
import difflib
import os
import os.path as osp
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from mmengine.config import Config

from ..errors import MissingFileError, PEFTError
from ..plan import parse_methods
from .climb import RULES
from .folders import kind_of

__all__ = ['Base', 'Plan', 'Task', 'load_plan', 'plain_name', 'presets']

PRESETS = Path(__file__).parent / 'presets'
BASELINES = ('Full', 'Frozen')
#: Where a plan finds what --data-root says.
DATA_ROOT = 'MMPEFT_DATA_ROOT'


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


#: What a task may say for itself, and the plan for all tasks.
_COMMON = ('methods', 'seeds', 'tuning', 'budget', 'checkpoint_interval',
           'costs')
_PLAN = ('name', 'title', 'tasks', 'bases', 'keep', *_COMMON)
_TASK = ('config', 'metric', 'metric_scale', 'options', 'tune', 'final',
         'holdout', 'env', 'at', 'folder', *_COMMON)
_COSTS = ('image_size', 'batch_size', 'repeats', 'backbone_only')
_TUNING = ('lrs', 'head_lrs', 'seed', 'rule', 'budget')


def presets() -> List[str]:
    """Names of the plans that mmpeft ships."""
    return sorted(p.stem for p in PRESETS.glob('[a-z]*.py'))


def load_plan(name: str,
              options: Optional[Dict[str, Any]] = None,
              data_root: Optional[str] = None) -> Plan:
    """Read a plan.

    Args:
        name (str): A file, or the name of a preset.
        options (dict, optional): Override keys of it, as ``--cfg-options``.
        data_root (str, optional): The plan reads it as
            ``'{{$MMPEFT_DATA_ROOT:default}}'``.

    Raises:
        PEFTError: If it says what nobody understands, or too little.
    """
    path = Path(name)
    if not path.is_file() and (PRESETS / f'{name}.py').is_file():
        path = PRESETS / f'{name}.py'
    if not path.is_file():
        raise PEFTError(f'There is no plan {name!r}; give a file, or one of '
                        f'{", ".join(presets())}.')
    if data_root is not None:
        # A folder's name may end in a slash or not.
        os.environ[DATA_ROOT] = osp.normpath(data_root)
    cfg = Config.fromfile(str(path), import_custom_modules=False)
    if options:
        cfg.merge_from_dict(options)
    said = cfg.to_dict()
    if 'tasks' not in said or not said['tasks']:
        raise PEFTError(f'{path}: a plan needs tasks=dict(name=dict('
                        'config=..., metric=...)).')
    # Variables of a plan in Python are its own business, if underlined.
    _known([k for k in said if not k.startswith('_')], _PLAN, str(path))
    common = {k: said[k] for k in _COMMON if k in said}
    keep = said.get('keep', 'delta')
    if keep not in ('delta', 'all', 'nothing'):
        raise PEFTError(f"{path}: keep={keep!r} is not 'delta', 'all' or "
                        "'nothing'.")
    return Plan(
        name=_simple(said.get('name', path.stem), 'plan'),
        tasks={
            task: _task(task, {
                **common,
                **values
            })
            for task, values in said['tasks'].items()
        },
        bases=tuple(Base(**base) for base in said.get('bases', ())),
        keep=keep,
        title=said.get('title', ''))


def _task(name: str, said: Dict[str, Any]) -> Task:
    where = f'task {name!r}'
    if said.get('folder'):
        said = _of_folder(said, where)
    _known(said, _TASK, where)
    for key in ('config', 'metric'):
        if not said.get(key):
            raise PEFTError(f'{where} needs {key}=.')
    values = {k: said[k] for k in _TASK if k in said and k not in _COMMON}
    tuning = dict(said.get('tuning') or {})
    _known(tuning, _TUNING, f'tuning of {where}')
    rule = tuning.get('rule', 'climb')
    if rule not in RULES:
        raise PEFTError(f'{where}: rule={rule!r} is none of '
                        f'{", ".join(RULES)}.')
    lrs, head_lrs = (
        tuple(sorted(map(float, tuning.get(key, ()))))
        for key in ('lrs', 'head_lrs'))
    if head_lrs and not lrs:
        raise PEFTError(f'{where}: head_lrs needs lrs for the backbone.')
    chooses = len(lrs) > 1 or len(head_lrs) > 1
    if chooses and not (values.get('tune') or values.get('holdout')):
        raise PEFTError(
            f'{where} chooses from {len(lrs)} learning rates, but says not '
            'on which images: give tune=dict(...) with the split, or '
            'holdout=10 for every tenth training image.')
    seeds = tuple(map(int, said.get('seeds', (0, ))))
    if not seeds or len(set(seeds)) != len(seeds):
        raise PEFTError(f'{where}: seeds={seeds} are none, or twice the same.')
    values.update(
        name=_simple(name, 'task'),
        methods=_methods(said.get('methods') or {}, where),
        seeds=seeds,
        lrs=lrs,
        head_lrs=head_lrs,
        tune_seed=int(tuning.get('seed', 100)),
        rule=rule,
        budget=_budget(said.get('budget'), where),
        tune_budget=_budget(tuning.get('budget') or said.get('budget'), where),
        checkpoint_interval=said.get('checkpoint_interval'),
        costs=dict(said.get('costs') or {}))
    _known(values['costs'], _COSTS, f'costs of {where}')
    if values['costs'] and 'image_size' not in values['costs']:
        raise PEFTError(f'{where}: costs need image_size=(height, width).')
    return Task(**values)


def _of_folder(said: Dict[str, Any], where: str) -> Dict[str, Any]:
    """A task with what it says about folders of this kind."""
    folder = dict(said['folder'])
    if not folder.get('root'):
        raise MissingFileError(f'{where}: give a folder with --data-root.')
    kinds = folder.pop('kinds', {})
    kind = kind_of(folder['root'])
    if kinds and kind not in kinds:
        raise PEFTError(f'{where} takes folders in the layout of '
                        f'{", ".join(kinds)}, but {folder["root"]} is one of '
                        f'{kind}.')
    return {**said, **kinds.get(kind, {}), 'folder': folder}


def _methods(said: Any, where: str) -> Dict[str, str]:
    """Name -> text for ``--method``, with both baselines."""
    if not isinstance(said, dict):
        said = {text: text for text in said}
    methods = {b: b for b in BASELINES if b not in said}
    methods.update(said)
    folders = [plain_name(name) for name in methods]
    for name, spec in methods.items():
        if folders.count(plain_name(name)) > 1:
            raise PEFTError(f'{where}: two methods share the folder name '
                            f'{plain_name(name)!r}; name one of them '
                            'otherwise.')
        if not isinstance(spec, str):
            raise PEFTError(f'{where}: method {name!r} is what --method '
                            f"takes, such as 'Mona:dim=32', not {spec!r}.")
        # Typos are found now, and not when it is their turn.
        parse_methods(spec)
    return methods


def plain_name(method: str) -> str:
    """A method's name as part of a folder's."""
    return re.sub(r'[^A-Za-z0-9.-]+', '-', method)


def _budget(said: Optional[dict], where: str) -> Optional[Budget]:
    if not said:
        return None
    if len(said) != 1 or not set(said) <= {'iters', 'epochs'}:
        raise PEFTError(f'{where}: a budget is dict(iters=N) or '
                        f'dict(epochs=N), not {said!r}.')
    (unit, count), = said.items()
    if not isinstance(count, int) or count < 1:
        raise PEFTError(f'{where}: a budget of {count!r} {unit}.')
    return Budget(unit, count)


def _simple(name: str, what: str) -> str:
    if not re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9_.-]*', name):
        raise PEFTError(f'The {what} {name!r} is also the name of a folder: '
                        'use letters, digits, "_", "-" and ".".')
    return name


def _known(said: Any, known: Tuple[str, ...], where: str) -> None:
    for key in said:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f' (did you mean {near[0]!r}?)' if near else ''
            raise PEFTError(f'{where} does not take {key!r}{hint}. It takes '
                            f'{", ".join(known)}.')
