#!/usr/bin/env python3
"""Fills the tables of docs/en/cost.md from results of tools/benchmark.py.

    .venv/bin/python tools/benchmark.py CONFIG ... --json > docs/en/cost/X.json
    .venv/bin/python .dev_scripts/cost_table.py           # writes the page
    .venv/bin/python .dev_scripts/cost_table.py --check   # only says whether

A table stands between the lines ``<!-- cost: X.json -->`` and
``<!-- end of X.json -->`` of the page, with the file in the folder ``cost``
beside it. Where the file is missing, the page says that nothing was measured.
"""
import argparse
import json
import os.path as osp
import re
import sys

ROOT = osp.dirname(osp.dirname(osp.abspath(__file__)))
sys.path.insert(0, ROOT)

from mmpeft.bench.markdown import table  # noqa: E402
from mmpeft.methods.side import SideNetwork  # noqa: E402
from mmpeft.plan import parse_methods  # noqa: E402

PAGE = osp.join(ROOT, 'docs', 'en', 'cost.md')
MIB = 2**20
MARKS = re.compile(
    r'(<!-- cost: (?P<name>[\w.-]+) -->\n)(?P<old>.*?)'
    r'(\n<!-- end of (?P=name) -->)', re.DOTALL)
# Shares of a step of full fine-tuning, and of the bytes it keeps, as argued
# in the section on floors of the page.
STEP = dict(all=1., through=2 / 3, beside=1 / 3, none=1 / 3)
SAVED = dict(stock=10.5 / 17.5, fast=9 / 17.5, lean=5 / 17.5)
# What this project wants to stay below: bytes and steps as shares of full
# fine-tuning with Swin-B, 2 x 512 x 512. tests/test_cost_targets.py reads the
# bytes.
with open(
        osp.join(ROOT, 'docs/en/cost/targets.json'), encoding='utf-8') as file:
    TARGETS = json.load(file)


def target(row, what):
    """Of its ``bytes`` or its ``step``; None where there is none."""
    if 'swin-b' not in row['config']:
        return None
    setting = 'with_cp' if row['with_cp'] else row['memory']
    return TARGETS.get(row['method'], {}).get(setting, {}).get(what)


def path_of(method):
    """How far gradients go back: ``all`` of training everything, ``through``
    the frozen blocks, ``beside`` them, ``none``, or through a ``part``."""
    plans = parse_methods(method)
    names = {plan.cls.__name__ for plan in plans}
    if names == {'Full'}:
        return 'all'
    if names == {'Frozen'}:
        return 'none'
    networks = [p for p in plans if issubclass(p.cls, SideNetwork)]
    # Those that act on the blocks have gradients pass through some.
    inside = any(p.cls.writes or p.cls.enters or p.cls.attached
                 for p in networks)
    if 'Partial' in names or inside or any(p.layers is not None
                                           for p in plans):
        return 'part'
    return 'beside' if len(networks) == len(plans) else 'through'


def floor_of_bytes(row):
    """What is left of Full's bytes in the arithmetic of a block; None where
    it says nothing."""
    path = path_of(row['method'])
    if row['with_cp']:
        return None
    if path == 'through':
        return SAVED.get(row['memory'])
    return dict(all=1., none=0.).get(path)


def floor_of_step(row):
    """Passes of a step, of the three of Full; checkpointing has one more."""
    path = path_of(row['method'])
    again = row['with_cp'] and path in ('all', 'through')
    return STEP[path] + again / 3 if path in STEP else None


def number(value, digits=2):
    return '' if value is None else f'{value:.{digits}f}'


def from_to(row):
    """A ratio of steps, with the smallest and the largest round."""
    if row['ratio_step'] is None:
        return ''
    low, high = row['ratio_step_spread']
    return f'{row["ratio_step"]:.2f} ({low:.2f}-{high:.2f})'


def rendered(rows):
    """The table of one file, under a line that says how it was measured."""
    columns = {
        'method': lambda r: r['method'],
        'memory': lambda r: r['memory'] + ', with_cp' * r['with_cp'],
        'trains': lambda r: f'{r["backbone_trainable"] / 1e6:.3f} M',
        'kept, MiB': lambda r: f'{r["saved_bytes"] / MIB:.0f}',
        '/ Full': lambda r: number(r['ratio_saved'], 3),
        'target': lambda r: number(target(r, 'bytes')),
        'floor': lambda r: number(floor_of_bytes(r)),
        'step, s': lambda r: number(r['step_s'], 3),
        'step / Full': from_to,
        'target of it': lambda r: number(target(r, 'step')),
        'floor of it': lambda r: number(floor_of_step(r)),
        'products / Full': lambda r: number(r.get('ratio_flops')),
        'latency / stock': lambda r: number(r['ratio_latency']),
        'merged': lambda r: number(r['ratio_latency_merged']),
        'folded': lambda r: number(r['ratio_latency_folded'])
    }
    if any(r['peak_bytes'] is not None for r in rows):
        columns['peak, MiB'] = lambda r: f'{r["peak_bytes"] / MIB:.0f}'
        columns['peak / Full'] = lambda r: number(r['ratio_peak'], 3)
    # What was not measured has no column.
    columns = {
        name: cell
        for name, cell in columns.items() if any(map(cell, rows))
    }
    if 'step, s' not in columns:
        columns.pop('floor of it', None)
        columns.pop('target of it', None)
    cells = [[cell(row) for cell in columns.values()] for row in rows]
    how = rows[0]['settings']
    height, width = how['image_size']
    parts = [
        'backbone' if how['backbone_only'] else 'whole model',
        f'batch of {how["batch_size"]} x {height} x {width}',
        how['dtype'] + (f' with {how["amp"]} autocast' if how['amp'] else ''),
        how['device'], f'{how["threads"]} threads', f'torch {how["torch"]}',
        f'{how["repeats"]} rounds', f'{how["clock"]} clock',
        *(['freed memory used again'] if how.get('keeps_memory') else [])
    ]
    configs = ', '.join(dict.fromkeys(f'`{r["config"]}`' for r in rows))
    text = f'{configs}: {", ".join(parts)}.\n\n' + table(list(columns), cells)
    if rows[0].get('operations'):
        text += ('\n\nWhat a step of each does, in seconds:\n\n' +
                 operations(rows))
    return text


def operations(rows):
    """The table of seconds by kind of operation."""
    kinds = list(rows[0]['operations'])
    return table(['method', 'memory', *kinds, 'all'], [[
        row['method'], row['memory'], *(number(row['operations'][k])
                                        for k in kinds),
        number(sum(row['operations'].values()))
    ] for row in rows])


def filled(page, folder):
    """The page with its tables."""

    def fill(match):
        path = osp.join(folder, match['name'])
        text = 'Not measured yet.'
        if osp.isfile(path):
            with open(path, encoding='utf-8') as file:
                text = rendered(json.load(file))
        return f'{match[1]}\n{text}\n{match[4]}'

    return MARKS.sub(fill, page)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('page', nargs='?', default=PAGE)
    parser.add_argument('--check', action='store_true')
    args = parser.parse_args()
    with open(args.page, encoding='utf-8') as file:
        old = file.read()
    new = filled(old, osp.join(osp.dirname(args.page), 'cost'))
    if args.check:
        if new != old:
            sys.exit(f'{args.page} is not what its results give; run '
                     '.dev_scripts/cost_table.py')
        return
    with open(args.page, 'w', encoding='utf-8') as file:
        file.write(new)


if __name__ == '__main__':
    main()
