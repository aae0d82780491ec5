"""From command line arguments to a Runner, for the tools."""
import os
import os.path as osp
from argparse import Namespace
from typing import Any, Dict, List, Optional

import torch
from mmengine.config import Config
from mmengine.config import DictAction as _DictAction
from mmengine.dist import is_main_process
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from ..config import add_method, find_peft_backbones, load_config, method_title
from ..config_checks import check_config
from ..errors import PEFTError
from ..plan import parse_methods
from ..preflight import check_files
from ..safe_pickle import check_pickle
from .safe_loading import guard_loading, latest_checkpoint

__all__ = [
    'add_hooks', 'prepare', 'build_runner', 'read_config', 'parse_options',
    'set_work_dir', 'set_default_collate'
]


def read_config(args: Namespace) -> Config:
    """Load the config, attach ``--method``, apply ``--cfg-options``."""
    guard_loading()
    cfg = load_config(args.config)
    if args.method:
        cfg, at = add_method(cfg, args.method, args.at)
    elif args.at:
        raise PEFTError('--at says where --method goes; give both.')
    options = parse_options(args.cfg_options)
    if options:
        cfg.merge_from_dict(options)
    check_config(cfg)
    return cfg


def prepare(args: Namespace) -> Config:
    """The config of a training run, complete and checked."""
    cfg = read_config(args)
    cfg.launcher = args.launcher
    title = method_title(cfg) if args.method else ''
    set_work_dir(cfg, args, title)
    add_hooks(cfg, args.base)
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.amp:
        _enable_amp(cfg)
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise PEFTError('--auto-scale-lr needs auto_scale_lr=dict('
                            'base_batch_size=...) in the config.')
        cfg.auto_scale_lr.enable = True
    if args.resume is not None:
        _resume(cfg, args.resume)
    _scale_lr(cfg, args.lr_scale)
    set_default_collate(cfg, args)
    check_files(cfg)
    return cfg


def _resume(cfg: Config, path: str) -> None:
    if path == 'auto':
        path = latest_checkpoint(cfg.work_dir)
    cfg.resume = path is not None
    if cfg.resume:
        cfg.load_from = path
    else:
        print_log(
            f'There is no checkpoint in {cfg.work_dir}; training begins.',
            logger='current')


def build_runner(cfg: Config) -> Runner:
    """The stock Runner, or the one that the config asks for."""
    _distribute_on_cpu(cfg)
    try:
        os.makedirs(cfg.work_dir, exist_ok=True)
    except OSError as error:
        raise PEFTError(f'The folder {cfg.work_dir} cannot be made '
                        f'({error.strerror}); give another with '
                        '--work-dir.') from error
    runner = Runner.from_cfg(cfg) if 'runner_type' not in cfg \
        else RUNNERS.build(cfg)
    _log_rates(cfg)
    return runner


def _distribute_on_cpu(cfg: Config) -> None:
    """Let several ranks train without a GPU.

    mmengine's launcher asks for CUDA devices and its wrapper for
    ``device_ids``; a process group that exists already is used as it is.
    """
    if cfg.launcher != 'pytorch' or torch.cuda.is_available():
        return
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group('gloo')
    wrapper = dict(type='MMDistributedDataParallel')
    wrapper.update(cfg.get('model_wrapper_cfg') or {}, device_ids=None)
    cfg.model_wrapper_cfg = wrapper


def parse_options(options: List[str]) -> Dict[str, Any]:
    """``['a.b=1', 'c=[2,3]']`` -> ``{'a.b': 1, 'c': [2, 3]}``, as stock."""
    parsed = {}
    for option in options or []:
        key, equals, value = option.partition('=')
        if not equals:
            raise PEFTError(f'--cfg-options {option!r} is not KEY=VALUE.')
        parsed[key] = _DictAction._parse_iterable(value)
    return parsed


def set_work_dir(cfg: Config, args: Namespace, title: str) -> None:
    """``--work-dir``, the config's, or one named after config and method."""
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        stem = osp.splitext(osp.basename(args.config))[0]
        cfg.work_dir = osp.join('work_dirs',
                                f'{stem}_{title}' if title else stem)


def set_default_collate(cfg: Config, args: Namespace) -> None:
    """What mmpretrain's tools add to every dataloader; its data preprocessor
    expects collated batches."""
    if cfg.get('default_scope') != 'mmpretrain':
        return
    for key in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        loader = cfg.get(key)
        if loader is None:
            continue
        loader.setdefault('collate_fn', dict(type='default_collate'))
        loader.setdefault('pin_memory', not args.no_pin_memory)
        # Workers that do not exist cannot persist.
        loader.setdefault(
            'persistent_workers', not args.no_persistent_workers
            and loader.get('num_workers', 0) > 0)


def add_hooks(cfg: Config, base: Optional[str] = None) -> None:
    """What a config of ours has, for one that became ours by ``--method``.

    Args:
        cfg (Config): Changed in place.
        base (str, optional): File with the base of a delta.
    """
    if find_peft_backbones(cfg):
        ours = dict(
            peft_report=dict(type='mmpeft.PEFTReportHook'),
            peft_checkpoint=dict(type='mmpeft.PEFTCheckpointHook'))
        cfg.default_hooks = {**ours, **(cfg.get('default_hooks') or {})}
        if base is not None:
            if osp.isfile(base):
                check_pickle(base)
            cfg.default_hooks['peft_checkpoint']['base'] = base


def _enable_amp(cfg: Config) -> None:
    wrapper = cfg.optim_wrapper.get('type', 'OptimWrapper')
    if wrapper not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise PEFTError(f'--amp works with OptimWrapper, but the config uses '
                        f'{wrapper}.')
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


def _scale_lr(cfg: Config, factor: float) -> None:
    if factor != 1.:
        optimizer = cfg.optim_wrapper.get('optimizer') or {}
        if 'lr' not in optimizer:
            raise PEFTError('--lr-scale needs optim_wrapper.optimizer.lr in '
                            'the config.')
        optimizer.lr = optimizer.lr * factor


def _log_rates(cfg: Config) -> None:
    """The learning rate of each method's recipe, beside the config's."""
    optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer')
    if not optimizer or not is_main_process():
        return
    lr = optimizer.get('lr')
    scope = cfg.get('default_scope')
    for node in find_peft_backbones(cfg).values():
        for plan in parse_methods(node['method']):
            name, recipe = plan.cls.__name__, plan.cls.recipe_lr.get(scope)
            known = f'{name} has no published recipe for {scope}'
            if recipe:
                known = (f'the recipe of {name} uses {recipe:g} '
                         f'({plan.cls.recipe_source})')
            here = f'{lr:g} in this config; ' if lr else ''
            print_log(f'Learning rate: {here}{known}.', logger='current')
