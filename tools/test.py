"""Test a checkpoint: the full one that training writes, or a merged one.

    python tools/test.py CONFIG work_dirs/RUN/epoch_12.pth

The arguments of the stock test.py of mmdet, mmseg and mmpretrain keep their
meaning; where these differ (--out), the library of the config decides.
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
    parser.add_argument('config', help='config file, or name of one')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--method', help='as in train.py')
    parser.add_argument('--at', help='as in train.py')
    parser.add_argument(
        '--base',
        help='file with the base of a delta, if it is not where the config '
        'says')
    parser.add_argument('--work-dir', help='where to save logs and metrics')
    parser.add_argument(
        '--out',
        help='mmdet: .pkl file for the predictions; mmseg: folder for them; '
        'mmpretrain: .pkl file for what --out-item says')
    parser.add_argument(
        '--out-item',
        choices=['metrics', 'pred'],
        help='what --out holds (mmpretrain)')
    parser.add_argument(
        '--show', action='store_true', help='show the predictions')
    parser.add_argument('--show-dir', help='folder for painted images')
    parser.add_argument('--wait-time', type=float, default=2)
    parser.add_argument(
        '--interval',
        type=int,
        default=1,
        help='paint every so many images (mmpretrain)')
    parser.add_argument(
        '--tta', action='store_true', help='test time augmentation')
    parser.add_argument(
        '--amp', action='store_true', help='mixed precision (mmpretrain)')
    parser.add_argument(
        '--cfg-options', nargs='+', metavar='KEY=VALUE', default=[])
    parser.add_argument(
        '--no-pin-memory', action='store_true', help='mmpretrain only')
    parser.add_argument(
        '--no-persistent-workers', action='store_true', help='mmpretrain only')
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    parser.add_argument('--debug', action='store_true')
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def main():
    args = parse_args()
    from mmpeft.engine.test import run_test
    run_test(args)


if __name__ == '__main__':
    run(main)
