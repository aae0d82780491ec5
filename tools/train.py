"""Train a detector, segmentor or classifier, parameter-efficiently.

    python tools/train.py configs/mona/mask-rcnn_swin-b_coco.py
    python tools/train.py mmdet::swin/... --method Mona:dim=32

The arguments of the stock train.py of mmdet, mmseg and mmpretrain keep their
meaning.
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
        'config',
        help='config file, or the name of a shipped one, such as '
        'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py')
    parser.add_argument(
        '--method',
        help='methods to attach to the supported backbone of the config, such '
        'as Mona, Mona:dim=32 or LoRA:rank=8,targets=[q,v]+LNTune; replaces '
        'those of a PEFT config')
    parser.add_argument(
        '--at',
        help='path of the backbone in the config, where there are several')
    parser.add_argument(
        '--lr-scale',
        type=float,
        default=1.,
        help='factor on the learning rate of the config')
    parser.add_argument(
        '--base',
        help='file with the base of a delta, if it is not where the config '
        'says')
    parser.add_argument('--work-dir', help='where to save logs and models')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='resume from the given checkpoint, or from the latest one in '
        'the work directory')
    parser.add_argument(
        '--amp', action='store_true', help='automatic mixed precision')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the batch size')
    parser.add_argument(
        '--no-validate', action='store_true', help='do not validate')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        metavar='KEY=VALUE',
        default=[],
        help='settings to override in the config')
    parser.add_argument(
        '--no-pin-memory', action='store_true', help='mmpretrain only')
    parser.add_argument(
        '--no-persistent-workers', action='store_true', help='mmpretrain only')
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='job launcher')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    parser.add_argument('--debug', action='store_true', help='show tracebacks')
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def main():
    args = parse_args()
    from mmpeft.engine.run import build_runner, prepare
    cfg = prepare(args)
    build_runner(cfg).train()


if __name__ == '__main__':
    run(main)
