"""What the arguments of tools/test.py mean in each library."""
from argparse import Namespace
from copy import deepcopy

from mmengine.config import Config, ConfigDict
from mmengine.fileio import dump
from mmengine.runner import Runner

from ..config import method_title
from ..errors import PEFTError
from ..preflight import check_files
from .checkpoint import match_checkpoint
from .run import (add_hooks, build_runner, read_config, set_default_collate,
                  set_work_dir)

__all__ = ['prepare', 'run_test']


def run_test(args: Namespace) -> None:
    """Test, and write what ``--out`` asks for."""
    cfg = prepare(args)
    scope = cfg.get('default_scope')
    runner = build_runner(cfg)
    metrics_wanted = scope == 'mmpretrain' and args.out_item == 'metrics'
    if args.out and scope != 'mmseg' and not metrics_wanted:
        _dump_predictions(runner, args.out, scope)
    metrics = runner.test()
    if args.out and metrics_wanted:
        dump(metrics, args.out)


def prepare(args: Namespace) -> Config:
    """The config of a test run, complete and checked.

    Raises:
        PEFTError: If the checkpoint does not belong to the config.
    """
    cfg = read_config(args)
    cfg.launcher = args.launcher
    set_work_dir(cfg, args, method_title(cfg) if args.method else '')
    cfg = match_checkpoint(cfg, args.checkpoint)
    cfg.load_from = args.checkpoint
    cfg.resume = False
    add_hooks(cfg, args.base)
    # Testing needs no training set, and none of the weights training starts
    # from.
    for key in ('train', 'val'):
        for part in ('cfg', 'dataloader', 'evaluator'):
            cfg[f'{key}_{part}'] = None
    cfg.optim_wrapper = cfg.param_scheduler = None
    scope = cfg.get('default_scope')
    set_default_collate(cfg, args)
    check_files(cfg)
    if args.show or args.show_dir:
        _paint(cfg, args, scope)
    if args.amp:
        cfg.test_cfg.fp16 = True
    if args.tta:
        _augment(cfg, scope)
    if args.out and scope == 'mmseg':
        cfg.test_evaluator['output_dir'] = args.out
        cfg.test_evaluator['keep_results'] = True
    elif args.out and not args.out.endswith(('.pkl', '.pickle')) \
            and args.out_item != 'metrics':
        raise PEFTError(f'--out {args.out!r} must end in .pkl.')
    return cfg


def _paint(cfg: Config, args: Namespace, scope: str) -> None:
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise PEFTError('--show and --show-dir need default_hooks.'
                        'visualization in the config, as stock configs have.')
    hook.update(show=args.show, wait_time=args.wait_time)
    if scope == 'mmpretrain':
        hook.update(enable=True, out_dir=args.show_dir, interval=args.interval)
        return
    hook['draw'] = True
    if args.show_dir and scope == 'mmseg':
        cfg.visualizer['save_dir'] = args.show_dir
    elif args.show_dir:
        hook['test_out_dir'] = args.show_dir


# What the stock test.py falls back to where a config says nothing.
TTA_MODELS = dict(
    mmdet=dict(
        type='mmdet.DetTTAModel',
        tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5),
                     max_per_img=100)),
    mmpretrain=dict(type='mmpretrain.AverageClsScoreTTA'))
FLIP_META = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor',
             'flip', 'flip_direction')


def _augment(cfg: Config, scope: str) -> None:
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    model = cfg.get('tta_model') or TTA_MODELS.get(scope)
    pipeline = cfg.get('tta_pipeline')
    if pipeline is None and scope in TTA_MODELS:
        pipeline = deepcopy(dataset.pipeline)
        pack = dict(type='PackDetInputs', meta_keys=FLIP_META) \
            if scope == 'mmdet' else pipeline[-1]
        flips = [dict(type='RandomFlip', prob=p) for p in (1., 0.)]
        pipeline[-1] = dict(type='TestTimeAug', transforms=[flips, [pack]])
    if model is None or pipeline is None:
        raise PEFTError('--tta needs tta_model and tta_pipeline in the '
                        'config.')
    dataset.pipeline = pipeline
    cfg.model = ConfigDict({**model, 'module': cfg.model})


def _dump_predictions(runner: Runner, path: str, scope: str) -> None:
    if scope == 'mmdet':
        from mmdet.evaluation import DumpDetResults as Dump
    else:
        from mmengine.evaluator import DumpResults as Dump
    runner.test_evaluator.metrics.append(Dump(out_file_path=path))
