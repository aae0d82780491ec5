"""Count what trains in the model of a config; needs no weights, no data.

    python tools/count_params.py configs/mona/mask-rcnn_swin-b_coco.py
    python tools/count_params.py CONFIG --method Mona --method LoRA:rank=8
"""
import argparse
import contextlib
import json
import os.path as osp
import sys

sys.path.insert(0, osp.join(osp.dirname(osp.abspath(__file__)), '..'))

from mmpeft.cli import run  # noqa: E402


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='+', help='config files or names')
    parser.add_argument(
        '--method',
        action='append',
        help='methods to attach; may be repeated for several rows')
    parser.add_argument('--at', help='path of the backbone in the config')
    parser.add_argument(
        '--metric', type=float, help='a score, weighted into PPT')
    parser.add_argument(
        '--cfg-options', nargs='+', metavar='KEY=VALUE', default=[])
    parser.add_argument(
        '--json', action='store_true', help='print one JSON list')
    parser.add_argument('--debug', action='store_true')
    return parser.parse_args()


def main():
    args = parse_args()
    # Standard output carries the result and nothing else: libraries print.
    with contextlib.redirect_stdout(sys.stderr):
        from mmpeft.engine.count import count_config
        rows = [
            count_config(config, method, args.at, args.metric,
                         args.cfg_options) for config in args.configs
            for method in args.method or [None]
        ]
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        print_table(rows)


def print_table(rows):
    columns = [('config', lambda r: r['config']),
               ('method', lambda r: r['method']),
               ('backbone', lambda r: f'{r["backbone_total"]:,}'),
               ('trainable', lambda r: f'{r["backbone_trainable"]:,}'),
               ('added', lambda r: f'{r["backbone_added"]:,}'),
               ('model trainable', lambda r: f'{r["model_trainable"]:,}'),
               ('PPT factor', lambda r: f'{r["ppt_factor"]:.4f}')]
    if any(r['ppt'] is not None for r in rows):
        columns.append(('PPT', lambda r: f'{r["ppt"]:.4f}'))
    table = [[title for title, _ in columns]]
    table += [[cell(row) for _, cell in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    for cells in table:
        print('  '.join(
            c.ljust(w) if i < 2 else c.rjust(w)
            for i, (c, w) in enumerate(zip(cells, widths))).rstrip())


if __name__ == '__main__':
    run(main)
