"""The config of a cell: all of it, as plain Python."""
import copy
import hashlib
import json
import os
import os.path as osp
import pprint
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional

from mmengine.config import Config

from ..config import load_config
from ..errors import PEFTError
from ..preflight import check_files, weights_in
from .cells import Cell
from .folders import describe
from .holdout import hold_out
from .plan import Budget, Task

__all__ = ['TaskConfigs', 'add_hooks', 'config_text', 'fit_budget']

# Places of param_scheduler that count iterations or epochs.
_TIMES = ('begin', 'end', 'T_max', 'step_size', 'milestones', 'total_steps',
          'total_iters', 'periods', 'restart_periods')
RECORD = 'mmpeft.bench.record_hook'


class TaskConfigs:
    """The configs of a task's cells.

    Args:
        task (Task): From the plan.
        folder (str): For files that a held-out split needs.
    """

    def __init__(self, task: Task, folder: str) -> None:
        self.task = task
        self.folder = folder
        with _environment(task.env):
            cfg = load_config(task.config)
        for options in (describe(task, cfg), task.options):
            cfg.merge_from_dict(options)
        self.phases = dict(final=cfg)
        if len(task.lrs) > 1 or len(task.head_lrs) > 1:
            self.phases['tune'] = copy.deepcopy(cfg)
            if task.holdout:
                hold_out(self.phases['tune'], task.holdout, folder)
        for phase, cfg in self.phases.items():
            cfg.merge_from_dict(getattr(task, phase))
            # The runs validate on what their phase is about; nothing tests.
            for part in ('dataloader', 'evaluator', 'cfg'):
                cfg[f'test_{part}'] = None
            cfg.pop('work_dir', None)
        self._weights = _weights_digest(self.phases['final'])

    @property
    def library(self) -> str:
        """The stock library of the task."""
        return self.phases['final'].get('default_scope', 'mmengine')

    def check(self) -> None:
        """Raise if data or weights are missing, naming the task."""
        for phase, cfg in self.phases.items():
            try:
                check_files(cfg, 'train')
            except PEFTError as error:
                raise type(error)(
                    f'task {self.task.name!r} ({phase}): {error}') from error

    def of(self, cell: Cell) -> Dict[str, Any]:
        """The config of a cell as a plain dict, without its work_dir."""
        cfg = copy.deepcopy(self.phases[cell.phase])
        cfg.merge_from_dict(self.task.method_options.get(cell.method, {}))
        cfg = cfg.to_dict()
        budget = self.task.budget
        if cell.phase == 'tune':
            budget = self.task.tune_budget
        length = fit_budget(cfg, budget, self.task.name)
        _set_rates(cfg, cell)
        cfg['randomness'] = dict(cfg.get('randomness') or {}, seed=cell.seed)
        add_hooks(cfg, self.task.checkpoint_interval or -(-length // 10))
        return cfg

    def digest(self, cell: Cell) -> str:
        """Of all that the result depends on, but the code."""
        content = [
            self.of(cell), self.task.methods[cell.method], self.task.at,
            self.task.metric, self.task.metric_scale, self._weights
        ]
        blob = json.dumps(content, sort_keys=True, default=repr)
        # Results may be moved.
        blob = blob.replace(osp.abspath(self.folder), '')
        return hashlib.sha256(blob.encode()).hexdigest()[:16]


def add_hooks(cfg: Dict[str, Any], interval: int) -> None:
    """Checkpoints to resume from, and a record at the end.

    Args:
        cfg (dict): Changed in place.
        interval (int): Of the checkpoints.
    """
    hooks = cfg['default_hooks'] = dict(cfg.get('default_hooks') or {})
    hooks['checkpoint'] = dict(
        type='mmengine.CheckpointHook',
        by_epoch='max_epochs' in cfg['train_cfg'],
        interval=interval,
        max_keep_ckpts=1)
    hooks['peft_report'] = dict(type='mmpeft.PEFTReportHook')
    hooks['peft_checkpoint'] = dict(
        type='mmpeft.PEFTCheckpointHook', keep='delta')
    imports = (cfg.get('custom_imports') or {}).get('imports', ())
    names = [*imports, 'mmpeft', RECORD]
    cfg['custom_imports'] = dict(
        imports=sorted(set(names), key=names.index),
        allow_failed_imports=False)
    cfg['custom_hooks'] = [
        *(cfg.get('custom_hooks') or ()),
        dict(type='mmpeft.CellRecordHook')
    ]


def config_text(cfg: Dict[str, Any]) -> str:
    """A config file, without the minute that mmengine's formatter takes for
    fifty of them.

    Raises:
        PEFTError: If it holds what has no name in such a file.
    """
    text = ''.join(f'{key} = {pprint.pformat(value, sort_dicts=False)}\n'
                   for key, value in cfg.items())
    try:
        compile(text, 'cell.py', 'exec')
    except SyntaxError as error:
        raise PEFTError('The config of this task cannot be written as plain '
                        f'values (line {error.lineno}: {error.text!r}); give '
                        'it types by name.') from None
    return text


def fit_budget(cfg: Dict[str, Any], budget: Optional[Budget],
               name: str) -> int:
    """Set the length of a run, schedules and all; returns it.

    Validation comes at the end.

    Raises:
        PEFTError: If the config counts otherwise than the budget.
    """
    train = cfg['train_cfg'] = dict(cfg['train_cfg'])
    unit = 'epochs' if train.get('max_epochs') else 'iters'
    own = train[f'max_{unit}']
    if budget is not None and budget.unit != unit:
        raise PEFTError(f'task {name!r}: the budget counts {budget.unit}, '
                        f'but the config trains for {own} {unit}; give '
                        f'budget=dict({unit}=N).')
    length = budget.count if budget else own
    train.update({f'max_{unit}': length, 'val_interval': length})
    train.pop('dynamic_intervals', None)
    schedules = cfg.get('param_scheduler')
    if schedules and length != own:
        many = isinstance(schedules, (list, tuple))
        fitted = [
            _scaled(s, length / own)
            for s in (schedules if many else [schedules])
        ]
        cfg['param_scheduler'] = fitted if many else fitted[0]
    return length


def _scaled(schedule: Dict[str, Any], factor: float) -> Dict[str, Any]:

    def scale(value):
        if isinstance(value, (list, tuple)):
            return [scale(v) for v in value]
        if not isinstance(value, (int, float)) or value in (0, float('inf')):
            return value
        return max(1, round(value * factor))

    return {k: scale(v) if k in _TIMES else v for k, v in schedule.items()}


def _set_rates(cfg: Dict[str, Any], cell: Cell) -> None:
    wrapper = cfg['optim_wrapper']
    if cell.lr is not None:
        if 'lr' not in (wrapper.get('optimizer') or {}):
            raise PEFTError(f'task {cell.task!r}: its config has no '
                            'optim_wrapper.optimizer.lr to set.')
        wrapper['optimizer']['lr'] = cell.lr
    if cell.head_lr is not None:
        paramwise = wrapper.setdefault('paramwise_cfg', {})
        keys = paramwise.setdefault('custom_keys', {})
        # Substrings of the names of all that is not the backbone.
        for part in ('neck', 'head'):
            keys[part] = dict(lr_mult=cell.head_lr / cell.lr)


def _weights_digest(cfg: Config) -> List[str]:
    """What the pre-trained weights are: their bytes, or their address."""
    files = [path for _, path in weights_in(cfg.get('model'), 'model')]
    files += [cfg.load_from] if cfg.get('load_from') else []
    return [_file_digest(path) if osp.isfile(path) else path for path in files]


def _file_digest(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        for block in iter(lambda: file.read(1 << 20), b''):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _environment(values: Dict[str, str]) -> Iterator[None]:
    saved = dict(os.environ)
    os.environ.update({k: str(v) for k, v in values.items()})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)
