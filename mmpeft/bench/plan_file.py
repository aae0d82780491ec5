"""Read a plan, and refuse what nobody could run."""
import difflib
import os
import os.path as osp
import re
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from mmengine.config import Config

from ..errors import MissingFileError, PEFTError
from ..plan import parse_methods
from .climb import RULES
from .folders import kind_of
from .plan import Base, Budget, Plan, Task, plain_name

__all__ = ['load_plan', 'presets']

PRESETS = Path(__file__).parent / 'presets'
BASELINES = ('Full', 'Frozen')
#: Where a plan finds what --data-root says.
DATA_ROOT = 'MMPEFT_DATA_ROOT'
#: What a task may say for itself, and the plan for all tasks.
_COMMON = ('methods', 'seeds', 'tuning', 'budget', 'checkpoint_interval',
           'costs')
_PLAN = ('name', 'title', 'tasks', 'bases', 'keep', *_COMMON)
_TASK = ('config', 'metric', 'metric_scale', 'options', 'tune', 'final',
         'holdout', 'env', 'at', 'folder', 'method_options', *_COMMON)
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
    _known(
        values.get('method_options', ()), tuple(values['methods']),
        f'method_options of {where}')
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
