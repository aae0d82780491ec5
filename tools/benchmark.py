"""Measure what methods cost in memory and time, side by side in one process.

    python tools/benchmark.py CONFIG --method Mona --method LoRA:rank=8
    python tools/benchmark.py CONFIG --method Mona --backbone-only \\
        --memory both --batch-size 2 --image-size 512 512 --plot cost.png

CONFIG is a file or a stock name (mmdet::..., mmseg::..., mmpretrain::...).
Weights, images and labels are random. A step is forward, loss, backward and
AdamW; the models take turns, so that a busy machine slows all alike. Ratios
are to full fine-tuning (training) and to the stock model (latency). The whole
model is measured, with its own loss, or the backbone alone; its loss is then
the sum of the mean squares of its outputs. docs/en/cost.md says what each
column counts.
"""
import argparse
import contextlib
import json
import os.path as osp
import sys

sys.path.insert(0, osp.join(osp.dirname(osp.abspath(__file__)), '..'))

from mmpeft.cli import run  # noqa: E402

MEMORY = ('stock', 'fast', 'lean')


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='+', help='config files or names')
    parser.add_argument(
        '--method',
        action='append',
        default=[],
        help='methods to attach; may be repeated. Without it, those of the '
        'config; Full and Frozen always come first')
    parser.add_argument('--at', help='path of the backbone in the config')
    parser.add_argument('--batch-size', type=int, default=2, metavar='N')
    parser.add_argument(
        '--image-size',
        type=int,
        nargs=2,
        default=[512, 512],
        metavar=('H', 'W'))
    parser.add_argument(
        '--repeats',
        type=int,
        default=5,
        metavar='N',
        help='rounds that count, after one that does not; 0 times nothing')
    parser.add_argument('--device', default='cpu', help='such as cuda:0')
    parser.add_argument(
        '--memory',
        choices=[*MEMORY, 'both'],
        help="PEFTBackbone's argument of that name; both: fast and lean. "
        'Without it, its default')
    parser.add_argument(
        '--backbone-only',
        action='store_true',
        help='without neck and head; runs for every supported backbone')
    parser.add_argument(
        '--dtype',
        choices=['fp16', 'bf16', 'fp32', 'fp64'],
        default='fp32',
        help='of weights and images')
    parser.add_argument(
        '--amp', choices=['fp16', 'bf16'], help='precision of autocast')
    parser.add_argument(
        '--with-cp',
        action='store_true',
        help='rows with activation checkpointing; the Full row that all are '
        'compared with stays without')
    parser.add_argument(
        '--clock',
        choices=['wall', 'cpu'],
        default='wall',
        help='cpu: time of this process on one thread, which hides others')
    parser.add_argument(
        '--threads', type=int, metavar='N', help='threads of torch')
    parser.add_argument(
        '--no-latency',
        action='store_true',
        help='without inference, which takes about as long as the steps')
    parser.add_argument(
        '--operations',
        action='store_true',
        help='also one step of each row, operation by operation: seconds '
        'of products, norms, copies and others')
    parser.add_argument(
        '--module-against-released',
        action='store_true',
        help="instead: each size of Mona's module of a backbone against the "
        'formula of the released code, in cost, outputs and gradients')
    parser.add_argument(
        '--cfg-options', nargs='+', metavar='KEY=VALUE', default=[])
    parser.add_argument(
        '--json', action='store_true', help='print one JSON list')
    parser.add_argument('--plot', metavar='FILE', help='write a chart')
    parser.add_argument('--debug', action='store_true')
    return parser.parse_args()


def main():
    args = parse_args()
    # Standard output carries the result and nothing else: libraries print.
    with contextlib.redirect_stdout(sys.stderr):
        from mmpeft.engine.cost_report import check_plot, show_progress
        check_plot(args.plot)
        settings = read_settings(args)
        memories = ['fast', 'lean'] if args.memory == 'both' else [args.memory]
        rows = []
        with show_progress() as progress:
            for config in args.configs:
                rows += measure(config, args, settings, memories, progress)
    if args.json:
        print(json.dumps(rows, indent=2))
    elif args.module_against_released:
        from mmpeft.engine.cost_report import print_modules
        print_modules(rows)
    else:
        from mmpeft.engine.cost_report import print_table
        print_table(rows)
    if args.plot:
        from mmpeft.engine.cost_report import plot
        plot(rows, args.plot)


def measure(config, args, settings, memories, progress):
    """Rows of one config."""
    if args.module_against_released:
        from mmpeft.engine.module_cost import compare
        return compare(config, args.method, settings, memories, args.at,
                       args.cfg_options, progress)
    from mmpeft.engine.benchmark import benchmark
    return benchmark(config, args.method, settings, memories, args.at,
                     args.cfg_options, progress)


def read_settings(args):
    """How to measure, checked; sets the threads."""
    from mmpeft.engine.settings import Settings, keep_freed_memory
    settings = Settings(
        batch_size=args.batch_size,
        image_size=tuple(args.image_size),
        repeats=args.repeats,
        device=args.device,
        backbone_only=args.backbone_only,
        dtype=args.dtype,
        amp=args.amp,
        with_cp=args.with_cp,
        clock=args.clock,
        threads=args.threads,
        latency=not args.no_latency,
        operations=args.operations,
        keeps_memory=keep_freed_memory())
    return settings.checked()


if __name__ == '__main__':
    run(main)
