"""Give the weights of a Swin or ViT the names another library uses.

    python tools/convert_checkpoint.py IN OUT --to mmpretrain-vit
    python tools/convert_checkpoint.py IN OUT --from mona

The style of IN is read from its keys; --from mona reads a whole checkpoint of
the released Mona repository, with any of its methods, into one of the model
that our config of that method builds. What became of every key is printed.
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
    parser.add_argument('checkpoint', metavar='IN', help='file to read')
    parser.add_argument('out', metavar='OUT', help='file to write')
    parser.add_argument(
        '--from',
        dest='source',
        choices=['mona'],
        help='released checkpoints of a paper, whole model')
    parser.add_argument(
        '--to',
        help='style of the names to write: timm-vit, mmseg-vit, '
        'mmpretrain-vit, official-swin, timm-swin or mm-swin (mmdet, mmseg '
        'and mmpretrain)')
    parser.add_argument(
        '--quiet', action='store_true', help='do not list every key')
    parser.add_argument(
        '--force', action='store_true', help='replace OUT if it exists')
    parser.add_argument('--debug', action='store_true', help='show tracebacks')
    return parser.parse_args()


def main():
    args = parse_args()
    from mmpeft.engine.convert import convert_checkpoint
    report = convert_checkpoint(args)
    if not args.quiet:
        for old, new in report.renamed.items():
            print(f'renamed {old} -> {new}')
        for what in ('kept', 'dropped'):
            for key in getattr(report, what):
                print(f'{what} {key}')
    print(f'{report}; wrote {args.out}')


if __name__ == '__main__':
    run(main)
