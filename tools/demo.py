"""The main job of this project on data that it generates itself.

    python tools/demo.py

Draws two domains of shapes, trains a small stock Mask R-CNN on the first,
adapts it to the second with several methods through tools/train.py, merges
LoRA into the stock model, and writes a table and a picture to
work_dirs/demo. What is finished is kept and not run again.
"""
import argparse
import hashlib
import json
import os
import pickle
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import demo_steps  # noqa: E402
import torch  # noqa: E402
from mmengine.config import Config  # noqa: E402
from rich.console import Console  # noqa: E402

import mmpeft  # noqa: E402
from mmpeft import methods  # noqa: E402
from mmpeft.backbones.swin import SwinSites  # noqa: E402
from mmpeft.cli import run  # noqa: E402
from mmpeft.datasets import ensure_shapes  # noqa: E402
from mmpeft.engine.listing import refusal  # noqa: E402
from mmpeft.errors import PEFTError  # noqa: E402
from mmpeft.plan import MethodPlan  # noqa: E402
from mmpeft.registry import METHODS  # noqa: E402

DATA = 'data/shapes_v1'
SOURCE = 'configs/_base_/mask-rcnn_swin-nano_shapes-source.py'
TARGET = 'configs/{}/mask-rcnn_swin-nano_shapes.py'
# Folders of configs and what their methods are called, in the order in which
# mmpeft lists them.
NAMES = {
    MethodPlan(dict(type=name)).name: name
    for name in methods.__all__
    if name in METHODS and not refusal(METHODS.get(name), SwinSites)
}
# --fast: a smoke test of all steps, its numbers mean nothing.
FAST = [f'train_cfg.{key}=1' for key in ('max_epochs', 'val_interval')] + [
    'default_hooks.checkpoint.interval=1', 'default_hooks.logger.interval=1',
    'train_dataloader.dataset.indices=16', 'val_dataloader.dataset.indices=8'
]


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--work-dir', default='work_dirs/demo', type=Path)
    parser.add_argument(
        '--methods',
        nargs='+',
        choices=['all', *NAMES],
        default=['full', 'frozen', 'mona', 'lora'],
        metavar='METHOD',
        help=f'all, or any of {", ".join(NAMES)}')
    parser.add_argument('--seed', type=int, default=0, help='the first seed')
    parser.add_argument('--seeds', type=int, default=1, help='runs per method')
    parser.add_argument(
        '--jobs',
        type=int,
        default=2 if (os.cpu_count() or 1) > 1 else 1,
        help='runs at the same time, one core each')
    parser.add_argument(
        '--fresh', action='store_true', help='keep nothing of earlier runs')
    parser.add_argument(
        '--fast', action='store_true', help='a smoke test of two iterations')
    return parser.parse_args()


def key_of(*parts) -> str:
    """Identifies a result by all that it depends on."""
    parts = [mmpeft.__version__, torch.__version__, *map(str, parts)]
    return hashlib.sha256('\n'.join(parts).encode()).hexdigest()[:16]


def config_text(config: str) -> str:
    """A config with all that it inherits."""
    return Config.fromfile(config).pretty_text


def pretrain(args, options, console) -> tuple:
    """Trains the source detector once; returns its file, key and scores."""
    digests = Path(DATA, 'digests.json').read_text()
    key = key_of(config_text(SOURCE), digests, options)
    cache = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser()
    cached = cache / 'mmpeft' / 'demo' / key
    if args.fresh:
        shutil.rmtree(cached, ignore_errors=True)
    if not (cached / 'scores.json').is_file():
        options = ['randomness.seed=0', *options]
        folder = args.work_dir / 'source'
        epochs = 1 if args.fast else Config.fromfile(SOURCE).max_epochs
        step = demo_steps.train_step('source', SOURCE, folder, key, options,
                                     epochs)
        scores = demo_steps.run_steps([step], 1, console)[0]
        checkpoint = torch.load(
            scores['checkpoint'], map_location='cpu', weights_only=False)
        cached.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=cached.parent))
        torch.save(
            dict(state_dict=checkpoint['state_dict']),
            work / 'swin-nano_source.pth')
        (work / 'scores.json').write_text(json.dumps(scores))
        shutil.rmtree(cached, ignore_errors=True)
        os.replace(work, cached)
    else:
        console.print(f'  kept from an earlier run: {cached}')
    scores = json.loads((cached / 'scores.json').read_text())
    return cached / 'swin-nano_source.pth', key, scores


def adapt(args, options, source, source_key, console) -> dict:
    """Trains every method with every seed; returns runs by method."""
    if args.fast:
        options = [*options, f'model.backbone.init_cfg.checkpoint={source}']
    else:
        # Where the configs look, for a run by hand as well.
        shutil.copy(source, f'{DATA}/.source.pth')
        os.replace(f'{DATA}/.source.pth', f'{DATA}/{source.name}')
    steps = []
    for seed in range(args.seed, args.seed + args.seeds):
        for method in args.methods:
            config = TARGET.format(method)
            mine = [f'randomness.seed={seed}', *options]
            folder = args.work_dir / f'{method}_seed{seed}'
            epochs = 1 if args.fast else Config.fromfile(config).max_epochs
            key = key_of(config_text(config), source_key, mine)
            steps.append(
                demo_steps.train_step(f'{NAMES[method]}, seed {seed}', config,
                                      folder, key, mine, epochs))
    if args.fresh:
        for step in steps:
            shutil.rmtree(step.folder, ignore_errors=True)
    results = demo_steps.run_steps(steps, args.jobs, console)
    return {
        method: results[i::len(args.methods)]
        for i, method in enumerate(args.methods)
    }


def merge(args, checkpoint, console) -> dict:
    """Merges LoRA and runs the result where mmpeft is not imported."""
    config = TARGET.format('lora')
    merged = args.work_dir / 'lora_merged.pth'
    model = Config.fromfile(config).model
    backbone = model.backbone
    backbone.type = backbone.pop('stock')
    for name in ('method', 'init_cfg'):
        backbone.pop(name)
    stock = args.work_dir / 'stock.py'
    Config(dict(model=model)).dump(str(stock))
    out = args.work_dir / 'merged_predictions.pkl'
    key = key_of(checkpoint, Path(checkpoint).stat().st_mtime_ns)
    commands = dict(
        merge=['tools/merge_peft.py', config, checkpoint, merged, '--force'],
        check=[
            'tools/demo_predict.py', stock, merged, f'{DATA}/target_val.json',
            f'{DATA}/images/target_val', out
        ])
    for name, command in commands.items():
        step = demo_steps.Step(f'LoRA: {name}',
                               [sys.executable, *map(str, command)],
                               args.work_dir / name, key, lambda folder: {})
        demo_steps.run_steps([step], 1, console)
    with out.open('rb') as file:
        return pickle.load(file)


def main():
    args = parse_args()
    if 'all' in args.methods:
        args.methods = list(NAMES)
    # Libraries warn of optional packages that nothing here needs.
    warnings.simplefilter('ignore')
    console = Console()
    began = time.time()
    args.work_dir = args.work_dir.resolve()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)  # the data of the configs lies below the checkout
    options = FAST if args.fast else []
    try:
        console.rule('1/5 Data: shapes in two domains')
        ensure_shapes(DATA)
        console.print(f'  {DATA}')
        console.rule('2/5 Source: a stock detector, trained once')
        source, key, scores = pretrain(args, options, console)
        console.print(f'  source mAP: box {100 * scores["bbox"]:.1f}, '
                      f'mask {100 * scores["segm"]:.1f}')
        console.rule(f'3/5 Target: {len(args.methods)} methods')
        runs = adapt(args, options, source, key, console)
        merged = None
        if 'lora' in args.methods:
            console.rule('4/5 Merge LoRA, load it strictly without mmpeft')
            merged = merge(args, runs['lora'][0]['checkpoint'], console)
        console.rule('5/5 Results')
        from demo_report import report
        configs = {method: TARGET.format(method) for method in runs}
        report(args, runs, NAMES, configs, DATA, scores, merged, began,
               console)
    except demo_steps.StepError as error:
        console.print(str(error), style='red', markup=False, highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        console.print('Interrupted; start again to go on from here.')
        sys.exit(130)
    except OSError as error:  # such as a full disk
        raise PEFTError(f'{error}. What is finished is kept: start again '
                        'when this is cured.') from error


if __name__ == '__main__':
    run(main)
