"""Compare methods by a plan: equal tuning, seeds, one table, a report.

    python tools/bench.py first-three
    python tools/bench.py my_plan.py run --jobs 4
    python tools/bench.py my_plan.py status

It may be killed at any time; the same command goes on. docs/en/bench.md
explains plans.
"""
import argparse
import os
import os.path as osp
import sys

sys.path.insert(0, osp.join(osp.dirname(osp.abspath(__file__)), '..'))

from mmpeft.cli import run  # noqa: E402


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'plan', help='file, or name of a preset (see docs/en/bench.md)')
    parser.add_argument(
        'action',
        nargs='?',
        choices=['run', 'report', 'status', 'all'],
        default='all',
        help='all (the default) runs and reports')
    parser.add_argument(
        '--work-dir', help='for results; default work_dirs/bench/PLAN')
    parser.add_argument(
        '--data-root', help='folder with the data, for plans that ask for it')
    parser.add_argument(
        '--jobs',
        type=int,
        help='cells at a time; default: two on a CPU, else one per GPU')
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm'],
        default='none',
        help='how a cell is started')
    parser.add_argument(
        '--ranks',
        type=int,
        default=1,
        help='processes (GPUs) per cell, with a launcher')
    parser.add_argument(
        '--srun-args', help="such as '-p gpu --gres=gpu:8', in quotes")
    parser.add_argument(
        '--amp', action='store_true', help='automatic mixed precision')
    parser.add_argument(
        '--cold',
        action='store_true',
        help='let each run import the libraries anew; on a CPU and without a '
        'launcher, they are forked from a process that has them')
    parser.add_argument(
        '--budget',
        type=float,
        metavar='MINUTES',
        help='start no cell after that')
    parser.add_argument(
        '--retry-failed',
        action='store_true',
        help='run failed cells again, from their start')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        metavar='KEY=VALUE',
        default=[],
        help='settings to override in the plan, such as seeds=[0]')
    parser.add_argument(
        '--json', action='store_true', help='status: the table as JSON')
    parser.add_argument('--debug', action='store_true', help='show tracebacks')
    args = parser.parse_args()
    if args.jobs is None:
        import torch
        gpus = torch.cuda.device_count() // max(args.ranks, 1)
        args.jobs = gpus or min(2, os.cpu_count() or 1)
    return args


def main():
    args = parse_args()
    from mmpeft.bench.main import main as bench
    bench(args)


if __name__ == '__main__':
    run(main)
