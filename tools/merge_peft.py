"""Merge a trained checkpoint into one of the stock model, exactly.

    python tools/merge_peft.py CONFIG work_dirs/RUN/epoch_12.pth merged.pth

The result has the keys of the stock model and loads without mmpeft. Methods
that cannot be merged exactly are refused, with the reason.

    python tools/merge_peft.py CONFIG merged.pth epoch_12.pth --unmerge DELTA

writes the full checkpoint again, from the delta and its base, where merging
these gives that file.
"""
import argparse
import os.path as osp
import sys

sys.path.insert(0, osp.join(osp.dirname(osp.abspath(__file__)), '..'))

from mmpeft.cli import run  # noqa: E402


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config the checkpoint is from')
    parser.add_argument(
        'checkpoint',
        help='full checkpoint, or delta; with --unmerge the merged file')
    parser.add_argument('out', help='file to write')
    parser.add_argument('--method', help='as given to train.py')
    parser.add_argument('--at', help='as given to train.py')
    parser.add_argument(
        '--base',
        help='file with the base of a delta, if it is not where the config '
        'says')
    parser.add_argument(
        '--unmerge', metavar='DELTA', help='the delta that was merged')
    parser.add_argument(
        '--cfg-options', nargs='+', metavar='KEY=VALUE', default=[])
    parser.add_argument(
        '--force', action='store_true', help='overwrite an existing OUT')
    parser.add_argument('--debug', action='store_true')
    return parser.parse_args()


def main():
    args = parse_args()
    from mmpeft.engine.merge import merge_checkpoint, unmerge_checkpoint
    if args.unmerge:
        count = unmerge_checkpoint(args)
        print(f'{args.out}: {count} tensors with the methods of the config')
        return
    count = merge_checkpoint(args)
    print(f'{args.out}: {count} tensors with the keys of the stock model')


if __name__ == '__main__':
    run(main)
