"""Take what was trained out of a full checkpoint.

    python tools/extract_peft.py CONFIG CHECKPOINT OUT_delta.safetensors
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
    parser.add_argument('config', help='config file, or name of one')
    parser.add_argument('checkpoint', help='checkpoint with methods attached')
    parser.add_argument('out', help='file to write, *_delta.safetensors')
    parser.add_argument('--method', help='as in train.py')
    parser.add_argument('--at', help='as in train.py')
    parser.add_argument(
        '--force', action='store_true', help='replace OUT if it exists')
    parser.add_argument(
        '--cfg-options', nargs='+', metavar='KEY=VALUE', default=[])
    parser.add_argument('--debug', action='store_true', help='show tracebacks')
    return parser.parse_args()


def main():
    args = parse_args()
    from mmpeft.engine.extract import extract_delta
    header = extract_delta(args)
    size, full = osp.getsize(args.out), osp.getsize(args.checkpoint)
    print(f'{args.out}: {len(header.tensors)} tensors, {size:,} bytes of '
          f'{full:,}')


if __name__ == '__main__':
    run(main)
