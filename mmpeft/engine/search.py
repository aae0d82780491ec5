"""Search the best subnet of a NOAH supernet, for tools/search_noah.py."""
import logging
import math
import os.path as osp
import time
from argparse import Namespace
from datetime import timedelta
from typing import Any, Callable, Dict, Optional

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.logging import print_log
from mmengine.runner import Runner

from ..config import find_peft_backbones, load_config
from ..delta_parts import unwrap
from ..errors import PEFTError
from ..methods.noah import NOAH
from ..plan import parse_methods
from ..preflight import check_files
from .checkpoint import check_out, match_checkpoint
from .evolution import Evolution, evolve
from .hooks import SubnetHook
from .run import (add_hooks, build_runner, read_config, set_default_collate,
                  set_work_dir)
from .search_files import Record, is_hook, write_config
from .subnets import Subnet, SubnetSpace

__all__ = ['prepare', 'run_search']

#: Hooks that act on what a validation found.
ACTING = ('CheckpointHook', 'EarlyStoppingHook', 'SubnetHook')


def run_search(args: Namespace) -> Dict[str, Any]:
    """Search, and write the config of the best subnet.

    Returns:
        dict: ``config`` (the file), ``params``, ``metric``, ``value``,
        ``subnet`` (widths by block), ``evaluated`` (number of subnets).

    Raises:
        PEFTError: If the config or the checkpoint is not that of a supernet,
            or no subnet is within the limits.
    """
    names = Evolution.__dataclass_fields__
    how = Evolution(**{name: getattr(args, name) for name in names})
    cfg, hook = prepare(args)
    stem = osp.splitext(osp.basename(args.config))[0]
    out = args.out or osp.join(cfg.work_dir, f'{stem}_subnet.py')
    if args.out:
        check_out(out, args.force, args.checkpoint, args.config)
    runner = build_runner(cfg)
    space = hook.space(unwrap(runner.model))
    record = Record(
        osp.join(cfg.work_dir, 'search.json'), cfg, args.checkpoint, space)
    judge = Judge(runner, space, record, args.metric, args.lower_is_better,
                  how.population * how.generations)
    try:
        ranking = evolve(space, judge, how, args.budget, args.min_params)
    except KeyboardInterrupt:
        print_log(
            f'{len(record.metrics)} subnets are in {record.path}; the same '
            'command goes on from there.',
            logger='current')
        raise
    first = ranking[0]
    found = dict(
        config=out,
        params=space.count(first),
        metric=judge.metric,
        value=record.metrics[first][judge.metric],
        subnet=space.by_block(first),
        evaluated=len(ranking))
    if is_main_process():
        write_config(args, how, found)
    print_log(
        _table(ranking[:10], space, record, judge.metric) +
        f'\nThe first is in {out}; train it with tools/train.py.',
        logger='current')
    return found


def prepare(args: Namespace) -> tuple:
    """The config of a search, complete and checked, and the hook that says
    what there is to search."""
    args.method = args.at = None
    cfg = read_config(args)
    hook = _check_supernet(cfg, args)
    cfg.launcher = args.launcher
    if args.work_dir is None:
        stem = osp.splitext(osp.basename(args.config))[0]
        args.work_dir = osp.join('work_dirs', f'{stem}_search')
    set_work_dir(cfg, args, '')
    if match_checkpoint(cfg, args.checkpoint) is not cfg:
        raise PEFTError(f'{args.checkpoint} has no NOAH in it; give the '
                        'checkpoint of the supernet.')
    cfg.load_from, cfg.resume = args.checkpoint, False
    add_hooks(cfg, args.base)
    for key in ('train', 'test'):
        for part in ('cfg', 'dataloader', 'evaluator'):
            cfg[f'{key}_{part}'] = None
    cfg.optim_wrapper = cfg.param_scheduler = None
    cfg.custom_hooks = [
        h for h in cfg.custom_hooks
        if not any(is_hook(h, name) for name in ACTING)
    ]
    saving = cfg.default_hooks.get('checkpoint') or {}
    best = saving.get('save_best')
    if args.metric is None and isinstance(best, str) and best != 'auto':
        args.metric = best
        args.lower_is_better |= saving.get('rule') == 'less'
    cfg.default_hooks = {**cfg.default_hooks, 'checkpoint': None}
    set_default_collate(cfg, args)
    check_files(cfg)
    return cfg, hook


def _check_supernet(cfg: Config, args: Namespace) -> SubnetHook:
    """Refuse a config that there is nothing to search in."""
    plans = [
        plan for method in _methods(cfg).values()
        for plan in parse_methods(method) if plan.cls is NOAH
    ]
    hooks = [
        h for h in cfg.get('custom_hooks') or () if is_hook(h, 'SubnetHook')
    ]
    if len(plans) != 1 or len(hooks) != 1:
        raise PEFTError(
            f'{args.config} is not the config of a supernet: it has '
            f'{len(plans)} NOAH and {len(hooks)} SubnetHook, and needs one '
            'of each, as configs/noah/*_supernet.py do.')
    if _methods(load_config(args.config)) != _methods(cfg):
        raise PEFTError('--cfg-options changes the method, but what is found '
                        f'inherits {args.config}; change it there.')
    missing = [
        k for k in ('val_dataloader', 'val_cfg', 'val_evaluator')
        if cfg.get(k) is None
    ]
    if missing:
        raise PEFTError(f'{args.config} has no {", ".join(missing)}; subnets '
                        'are compared by validating them.')
    known = {
        k: v
        for k, v in hooks[0].items() if k not in ('type', 'priority')
    }
    return SubnetHook(**known)


def _methods(cfg: Config) -> dict:
    """The methods of a config, by the path of the backbone."""
    return {p: n['method'] for p, n in find_peft_backbones(cfg).items()}


class Judge:
    """The score of a subnet: what the record has, else a validation.

    Args:
        runner (Runner): With the supernet, not loaded yet.
        space (SubnetSpace): Its subnets.
        record (Record): What is known.
        metric (str, optional): None takes the mIoU, or else the first that
            validating gives.
        lower_is_better (bool): Whether it is an error.
        total (int): Subnets there will be, at most.
    """

    def __init__(self, runner: Runner, space: SubnetSpace, record: Record,
                 metric: Optional[str], lower_is_better: bool,
                 total: int) -> None:
        self.runner = runner
        self.space = space
        self.record = record
        self.metric = metric
        self.sign = -1 if lower_is_better else 1
        self.total = total
        self.done = 0
        self.seconds: list = []
        self._validate: Optional[Callable[[], dict]] = None

    def __call__(self, subnet: Subnet) -> float:
        self.done += 1
        if subnet not in self.record.metrics:
            self.record.add(subnet, self.space.count(subnet),
                            self._measure(subnet))
            self._report(subnet)
        value = self._value(subnet)
        return -math.inf if value is None else self.sign * value

    def _measure(self, subnet: Subnet) -> Dict[str, Any]:
        if self._validate is None:
            # Once, what Runner.val() does each time.
            self._validate = self.runner.val_loop.run
            self.runner.call_hook('before_run')
            self.runner.load_or_resume()
        self.space.activate(subnet)
        start = time.monotonic()
        metrics = self._validate()
        self.seconds.append(time.monotonic() - start)
        return metrics

    def _value(self, subnet: Subnet) -> Optional[float]:
        metrics = self.record.metrics[subnet]
        if self.metric is None and metrics:
            # The first of mmseg is the accuracy over all pixels.
            self.metric = 'mIoU' if 'mIoU' in metrics else next(iter(metrics))
        if self.metric not in metrics:
            raise PEFTError(f'Validating gives no number {self.metric!r}; it '
                            f'gives {", ".join(metrics) or "none"}.')
        return metrics[self.metric]

    def _report(self, subnet: Subnet) -> None:
        mean = sum(self.seconds) / len(self.seconds)
        left = timedelta(seconds=round(mean * (self.total - self.done)))
        print_log(
            f'Subnet {self.done} of at most {self.total}: '
            f'{self.space.count(subnet):,} parameters, '
            f'{_number(self._value(subnet))} {self.metric}; '
            f'{mean:.1f} s each, {left} left.',
            logger='current',
            level=logging.INFO)


def _table(ranking: list, space: SubnetSpace, record: Record,
           metric: str) -> str:
    lines = [
        f'The best subnets: {metric}, parameters, '
        f'{", ".join(space.kinds)} by block'
    ]
    for subnet in ranking:
        widths = ' | '.join(' '.join(map(str, part)) for part in subnet)
        lines.append(f'{_number(record.metrics[subnet][metric])}  '
                     f'{space.count(subnet):,}  {widths}')
    return '\n'.join(lines)


def _number(value: Optional[float]) -> str:
    return 'not a number' if value is None else f'{value:.4g}'
