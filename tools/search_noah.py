"""Search the best subnet of a NOAH supernet within a number of parameters.

    python tools/search_noah.py configs/noah/X_supernet.py CHECKPOINT \\
        --budget 640000

Subnets are compared by validating them with the weights of the supernet, as
the config says. The result is a config for tools/train.py, which trains the
subnet from the start. A search that was interrupted goes on where it was when
the same command is given again.
"""
import argparse
import contextlib
import json
import os
import os.path as osp
import sys

sys.path.insert(0, osp.join(osp.dirname(osp.abspath(__file__)), '..'))

from mmpeft.cli import run  # noqa: E402


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of the supernet')
    parser.add_argument('checkpoint', help='checkpoint or delta of it')
    parser.add_argument(
        '--budget',
        type=int,
        required=True,
        help='the most parameters that NOAH may have')
    parser.add_argument('--min-params', type=int, default=0, help='the fewest')
    parser.add_argument(
        '--metric',
        help='metric to compare by, such as coco/bbox_mAP; without it, that '
        'of save_best in the config, mIoU, or the first that validating gives')
    parser.add_argument(
        '--lower-is-better', action='store_true', help='of that metric')
    parser.add_argument(
        '--population',
        type=int,
        default=50,
        help='subnets of a generation (default: 50)')
    parser.add_argument('--generations', type=int, default=15)
    parser.add_argument(
        '--select',
        type=int,
        default=10,
        help='the best so far, which are parents (default: 10)')
    parser.add_argument('--mutations', type=int, default=25)
    parser.add_argument('--crossovers', type=int, default=25)
    parser.add_argument(
        '--width-prob',
        type=float,
        default=0.2,
        help='how likely a width is drawn anew in a mutation (default: 0.2)')
    parser.add_argument(
        '--depth-prob',
        type=float,
        default=0.4,
        help='the same of a number of blocks (default: 0.4)')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--out', help='config to write; without it, in the work directory')
    parser.add_argument(
        '--force', action='store_true', help='replace OUT if it exists')
    parser.add_argument(
        '--work-dir',
        help='where to keep the record of the search; without it, '
        'work_dirs/CONFIG_search')
    parser.add_argument(
        '--base',
        help='file with the base of a delta, if it is not where the config '
        'says')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        metavar='KEY=VALUE',
        default=[],
        help='settings to override in the config; the result does not have '
        'them')
    parser.add_argument(
        '--json', action='store_true', help='print what was found as JSON')
    parser.add_argument(
        '--no-pin-memory', action='store_true', help='mmpretrain only')
    parser.add_argument(
        '--no-persistent-workers', action='store_true', help='mmpretrain only')
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    parser.add_argument('--debug', action='store_true', help='show tracebacks')
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def main():
    args = parse_args()
    from mmengine.dist import is_main_process

    from mmpeft.engine.search import run_search

    # Of the standard output only the result, if it is to be read.
    logs = sys.stderr if args.json else sys.stdout
    with contextlib.redirect_stdout(logs):
        found = run_search(args)
    if args.json and is_main_process():
        print(json.dumps([found]))


if __name__ == '__main__':
    run(main)
