"""Load every stock config with a method, and write down what happens.

Every config that mmdet, mmseg and mmpretrain ship and whose model holds a
supported backbone gets ``--method Mona`` and ``--method LoRA``. The backbone
is built at a small width and runs forward and backward::

    .venv/bin/python .dev_scripts/sweep.py
    .venv-classic/bin/python .dev_scripts/sweep.py
    .venv/bin/python .dev_scripts/sweep.py --only mmseg::beit

Each run replaces the results of its stack in docs/en/stock_configs.json, from
which docs/en/stock_configs.md is written; with ``--only`` it prints the
results instead. The status is 1 if something crashed.
"""
import argparse
import contextlib
import functools
import importlib.metadata
import json
import sys
import time
import warnings
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from mmengine.config import utils  # noqa: E402
from sweep_find import candidates, transformers  # noqa: E402
from sweep_run import METHODS, Sweep  # noqa: E402
from sweep_table import write_table  # noqa: E402

JSON = ROOT / 'docs/en/stock_configs.json'
TABLE = JSON.with_suffix('.md')
LIBRARIES = ('mmdet', 'mmseg', 'mmpretrain')


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--only',
        metavar='PART',
        help='only configs with this in their name; nothing is written')
    parser.add_argument(
        '--table', action='store_true', help='only write the table again')
    return parser.parse_args()


def stack():
    """The two stacks, told apart by the packages of the maintained one."""
    names = {d.metadata['Name'] for d in importlib.metadata.distributions()}
    return 'maintained' if 'onedl-mmengine' in names else 'classic'


def versions():
    names = ('torch', 'mmengine', 'mmcv', *LIBRARIES)
    modules = {n: sys.modules.get(n) or __import__(n) for n in names}
    return {n: m.__version__ for n, m in modules.items()}


def no_network(*args, **kwargs):
    raise OSError('a sweep downloads nothing')


def sweep(part=''):
    """Results by config, and the backbones of no family by library."""
    # mmengine reads all metafiles of a library for every inherited config.
    utils.load = functools.lru_cache(maxsize=None)(utils.load)
    types = transformers()
    run = Sweep(types)
    names = {name.split('.')[1] for name in types}
    rows, others = {}, {}
    for library in LIBRARIES:
        print(library, file=sys.stderr)
        for config in candidates(library, names):
            if part and part not in config:
                continue
            # Stock models print while they are built.
            with contextlib.redirect_stdout(sys.stderr):
                row = run(config)
            if row and 'at' in row:
                rows[config] = row
            elif row:
                others.setdefault(f'{library}: {row["type"]}',
                                  []).append(config)
    return rows, others


def main():
    args = parse_args()
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    if args.table:
        return write_table(JSON, TABLE)
    start = time.time()
    with mock.patch('socket.create_connection', no_network):
        rows, others = sweep(args.only or '')
    if args.only:
        for config, row in rows.items():
            print(config, json.dumps(row))
        for name, configs in others.items():
            print(name, 'no family', len(configs))
    else:
        known = json.loads(JSON.read_text()) if JSON.is_file() else {}
        known[stack()] = dict(
            versions=versions(), rows=grouped(rows), unsupported=others)
        JSON.write_text(dump(known))
        write_table(JSON, TABLE)
    crashed = [
        c for c, row in rows.items()
        if any(row[m].startswith('crash') for m in METHODS)
    ]
    print(
        f'{len(rows)} configs, {time.time() - start:.0f} s, '
        f'{len(crashed)} crashed',
        *crashed,
        sep='\n',
        file=sys.stderr)
    return bool(crashed)


def dump(results):
    """JSON with one line for all configs that came out the same."""
    text = []
    for name in sorted(results):
        part = results[name]
        rows = [f'   {json.dumps(row)}' for row in part['rows']]
        others = [
            f'   {json.dumps(key)}: {json.dumps(configs)}'
            for key, configs in part['unsupported'].items()
        ]
        text.append(f' {json.dumps(name)}: {{\n'
                    f'  "versions": {json.dumps(part["versions"])},\n'
                    '  "rows": [\n' + ',\n'.join(rows) + '\n  ],\n'
                    '  "unsupported": {\n' + ',\n'.join(others) + '\n  }\n }')
    return '{\n' + ',\n'.join(text) + '\n}\n'


def grouped(rows):
    """The rows of all configs, each with the configs that have it."""
    groups = {}
    for config, row in rows.items():
        groups.setdefault(json.dumps(row), []).append(config)
    return [
        dict(json.loads(row), configs=configs)
        for row, configs in groups.items()
    ]


if __name__ == '__main__':
    sys.exit(main())
