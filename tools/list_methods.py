"""List the methods, where they sit, and on which backbones they work.

    python tools/list_methods.py             # table, then what is refused
    python tools/list_methods.py --json
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
    parser.add_argument(
        '--json', action='store_true', help='print one JSON list')
    parser.add_argument('--debug', action='store_true')
    return parser.parse_args()


def main():
    args = parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        from mmpeft.engine.listing import list_methods
        rows = list_methods()
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    families = list(rows[0]['families'])
    table = [['method', 'merges', *families, 'sites']]
    for row in rows:
        marks = ['no' if row['families'][f] else 'yes' for f in families]
        merges = 'yes' if row['merges'] is True else 'no'
        sites = ', '.join(row['sites']) or 'stock parameters'
        table.append([row['method'], merges, *marks, sites])
    widths = [max(map(len, column)) for column in zip(*table)]
    for cells in table:
        print('  '.join(c.ljust(w) for c, w in zip(cells, widths)).rstrip())
    refused = [(row['method'], family, reason) for row in rows
               for family, reason in row['families'].items() if reason]
    print(f'\n{len(refused)} of {len(rows) * len(families)} pairs are '
          f'refused{":" if refused else "."}')
    for method, family, reason in refused:
        print(f'  {method} on {family}: {reason}')
    print('\nNot merged into a stock checkpoint:')
    for row in rows:
        if row['merges'] is not True:
            print(f'  {row["method"]}: {row["merges"]}')


if __name__ == '__main__':
    run(main)
