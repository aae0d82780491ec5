"""The page on stock configs, written from the results of sweeps."""
import json
from collections import Counter
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

from sweep_run import ALONE, CRASH, METHODS, REFUSED, STOCK_BROKEN, WORKS

from mmpeft.bench.markdown import table

__all__ = ['write_table']

VERDICTS = {
    WORKS:
    'forward and backward of the backbone, and exactly the declared '
    'parameters got gradients, none of them zero; the model was built around '
    'it',
    ALONE:
    'the same, but the model cannot be built on this stack',
    REFUSED:
    'an error that says why, and the way out',
    STOCK_BROKEN:
    'fails in the same way without mmpeft',
    CRASH:
    'a bug of mmpeft',
}
HEAD = """# Stock configs

Every config that the installed mmdet, mmseg and mmpretrain ship and whose
model holds a supported backbone, with `--method Mona` and `--method LoRA`.
`.dev_scripts/sweep.py` wrote this page; it loads each config as our tools do,
makes the backbone narrow (depth, windows, outputs, class token and drop-path
stay), and runs it in training mode. Masked pre-training gets a mask.

A cell holds for both stacks; where they differ it says so. A number in
brackets is a reason, at the end of the page.
"""


def write_table(results: Path, page: Path) -> None:
    """Write the page from the results of all stacks."""
    stacks = json.loads(results.read_text())
    for stack in stacks.values():
        stack['configs'] = {
            config: row
            for row in stack['rows']
            for config in row['configs']
        }
    reasons: Dict[str, int] = {}
    lines = [HEAD, *_summary(stacks)]
    for library in ('mmdet', 'mmseg', 'mmpretrain'):
        lines += ['', f'## {library}', '']
        rows = _rows(stacks, library, reasons)
        lines.append(table(['config', 'backbone', *METHODS], rows))
    lines += ['', *_no_family(stacks)]
    lines += ['', '## Reasons', '']
    texts = [[f'[{n}]', _plain(text)] for text, n in reasons.items()]
    lines.append(table(['', 'reason'], texts))
    page.write_text('\n'.join(lines) + '\n')


def _summary(stacks: Dict[str, Any]) -> Iterator[str]:
    for name, stack in stacks.items():
        versions = ', '.join(f'{k} {v.partition("+")[0]}'
                             for k, v in stack['versions'].items())
        yield f'- {name}: {versions}'
    yield ''
    rows = []
    for library in ('mmdet', 'mmseg', 'mmpretrain'):
        for method in METHODS:
            counts = {
                name:
                Counter(row[method].split(':')[0]
                        for config, row in stack['configs'].items()
                        if config.startswith(library + '::'))
                for name, stack in stacks.items()
            }
            rows.append([
                library, method, *(_both({
                    n: str(c[verdict])
                    for n, c in counts.items()
                }) for verdict in VERDICTS)
            ])
    yield table(['library', 'method', *VERDICTS], rows)
    yield ''
    for verdict, meaning in VERDICTS.items():
        yield f'- **{verdict}**: {meaning}.'


def _rows(stacks: Dict[str, Any], library: str,
          reasons: Dict[str, int]) -> List[List[str]]:
    """One row for each config of a library."""
    configs: Dict[str, Dict[str, dict]] = {}
    for name, stack in stacks.items():
        for config, row in stack['configs'].items():
            if config.startswith(library + '::'):
                configs.setdefault(config, {})[name] = row
    lines = []
    for config in sorted(configs):
        rows = configs[config]
        row = next(iter(rows.values()))
        backbone = row['type'].split('.')[-1]
        if row['at'] not in ('', 'model.backbone'):
            backbone += f' at `{row["at"]}`'
        cells = [
            _both({
                s: _outcome(rows[s][m], reasons) if s in rows else 'absent'
                for s in stacks
            }) for m in METHODS
        ]
        name = config.partition('::')[2][:-len('.py')]
        lines.append([f'`{name}`', backbone, *cells])
    return lines


def _outcome(text: str, reasons: Dict[str, int]) -> str:
    verdict, colon, reason = text.partition(': ')
    if not colon:
        return verdict
    number = reasons.setdefault(reason, len(reasons) + 1)
    return f'{verdict} [{number}]'


def _both(cells: Dict[str, str]) -> str:
    if len(set(cells.values())) == 1:
        return next(iter(cells.values()))
    return ', '.join(f'{cell} ({name})' for name, cell in cells.items())


def _no_family(stacks: Dict[str, Any]) -> Iterator[str]:
    yield '## Not supported'
    yield ''
    yield ('Configs whose backbone has attention over tokens in blocks of no '
           'family here. Convolutional backbones are not listed.')
    yield ''
    counts: Dict[Tuple[str, str], Dict[str, int]] = {}
    for name, stack in stacks.items():
        for key, configs in stack['unsupported'].items():
            library, backbone = key.split(': ')
            counts.setdefault((library, backbone), {})[name] = len(configs)
    rows = [[
        library, f'`{backbone}`',
        _both({s: str(found.get(s, 0))
               for s in stacks})
    ] for (library, backbone), found in sorted(counts.items())]
    yield table(['library of the config', 'backbone', 'configs'], rows)


def _plain(text: str) -> str:
    """Text of an error, harmless in Markdown."""
    return '`' + text.replace('`', "'") + '`'
