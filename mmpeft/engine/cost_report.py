"""Show what was measured: progress, a table, a chart."""
import os.path as osp
import re
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

from rich.console import Console
from rich.progress import (BarColumn, MofNCompleteColumn, Progress, TextColumn,
                           TimeElapsedColumn)
from rich.table import Table

from ..errors import PEFTError

__all__ = [
    'check_plot', 'plot', 'print_modules', 'print_table', 'show_progress'
]

MIB = 2**20


@contextmanager
def show_progress() -> Iterator[Callable[..., None]]:
    """A bar on standard error.

    Yields:
        Callable: To be called with what is done next, and with how many
        calls there will be, ``more``, where that becomes known.
    """
    columns = (TextColumn('{task.description}'), BarColumn(),
               MofNCompleteColumn(), TimeElapsedColumn())
    # Drawing takes time, too.
    bar = Progress(
        *columns, console=Console(stderr=True), refresh_per_second=1)
    with bar:
        task = bar.add_task('', total=0)

        def progress(what: str = '', more: int = 0) -> None:
            total = bar.tasks[0].total + more
            # A call says what begins, so that what was begun has ended.
            bar.update(task, total=total, advance=0 if more else 1)
            if what:
                bar.update(task, description=what)

        yield progress
        bar.update(task, completed=bar.tasks[0].total, description='done')


def print_table(rows: Sequence[Dict[str, Any]]) -> None:
    """One table for each config, and why something was not measured."""
    console = _console()
    for config in dict.fromkeys(r['config'] for r in rows):
        own = [r for r in rows if r['config'] == config]
        _print_rows(console, config, own)
        if own[0]['operations']:
            console.print(_operations(own))
    for name, what in (('no_latency', 'No latency'),
                       ('not_merged', 'Not merged'), ('not_folded',
                                                      'Not folded')):
        reasons: Dict[str, List[str]] = {}
        for row in rows:
            if row[name]:
                # One sentence for all that have nothing to fold.
                reason = re.sub(', which has .*?;', ';', row[name])
                reasons.setdefault(reason, []).append(row['method'])
        for reason, methods in reasons.items():
            methods = list(dict.fromkeys(methods))
            console.print(
                f'{what}: {", ".join(methods)}. {reason}', highlight=False)


def _console() -> Console:
    console = Console()
    # A file has no width; a table that is cut is of no use.
    return console if console.is_terminal else Console(width=200)


def _print_rows(console: Console, config: str,
                rows: Sequence[Dict[str, Any]]) -> None:
    settings = rows[0]['settings']
    height, width = settings['image_size']
    what = 'backbone' if settings['backbone_only'] else 'whole model'
    precision = settings['dtype'] + (f', autocast {settings["amp"]}'
                                     if settings['amp'] else '')
    console.print(
        f'\n{config}: {what}, {settings["batch_size"]} x {height} x {width}, '
        f'{precision}, {settings["device"]}, {settings["threads"]} threads, '
        f'{settings["repeats"]} rounds, {settings["clock"]} clock',
        highlight=False,
        soft_wrap=True)
    table = Table()
    gpu = any(r['peak_bytes'] is not None for r in rows)
    columns: List[tuple] = [
        ('method', _title),
        ('trains', lambda r: f'{r["backbone_trainable"]:,}'),
        ('saved MiB', lambda r: f'{r["saved_bytes"] / MIB:.1f}'),
        ('/ Full', lambda r: _ratio(r['ratio_saved'], 3)),
    ]
    if gpu:
        columns += [('peak MiB', lambda r: f'{r["peak_bytes"] / MIB:.0f}'),
                    ('/ Full', lambda r: _ratio(r['ratio_peak'], 3))]
    columns += [('products / Full', lambda r: _ratio(r['ratio_flops']))]
    if settings['repeats']:
        columns += [
            ('step s', lambda r: f'{r["step_s"]:.4g}'),
            ('/ Full (from - to)', _step_ratio),
            ('forward s', lambda r: f'{r["forward_s"]:.4g}'),
        ]
    if settings['repeats'] and settings['latency']:
        columns += [
            ('latency s', lambda r: '-'
             if r['latency_s'] is None else f'{r["latency_s"]:.4g}'),
            ('/ stock', lambda r: _ratio(r['ratio_latency'])),
            ('merged', lambda r: _ratio(r['ratio_latency_merged'])),
            ('folded', lambda r: _ratio(r['ratio_latency_folded'])),
        ]
    for name, _ in columns:
        table.add_column(name, justify='left' if name == 'method' else 'right')
    for row in rows:
        table.add_row(*(cell(row) for _, cell in columns))
    console.print(table)


def _operations(rows: Sequence[Dict[str, Any]]) -> Table:
    """Seconds by kind of operation."""
    table = Table(title='What a step does, s')
    kinds = list(rows[0]['operations'])
    table.add_column('method')
    for kind in kinds:
        table.add_column(kind, justify='right')
    for row in rows:
        table.add_row(
            _title(row), *(f'{row["operations"][k]:.3g}' for k in kinds))
    return table


def _title(row: Dict[str, Any]) -> str:
    notes = [row['memory'], 'with_cp' if row['with_cp'] else None]
    return ', '.join([row['method'], *filter(None, notes)])


def _ratio(value: Optional[float], digits: int = 2) -> str:
    return '-' if value is None else f'{value:.{digits}f}'


def _step_ratio(row: Dict[str, Any]) -> str:
    low, high = row['ratio_step_spread']
    return f'{row["ratio_step"]:.2f} ({low:.2f} - {high:.2f})'


def print_modules(rows: Sequence[Dict[str, Any]]) -> None:
    """The table of ``--module-against-released``."""
    table = Table(title='Mona: our module / the released formula')
    for name in ('config', 'memory', 'width', 'map', 'modules', 'saved MiB',
                 'ratio', 'step s', 'ratio', 'outputs differ',
                 'gradients differ'):
        table.add_column(
            name, justify='left' if name in ('config', 'memory') else 'right')
    for row in rows:
        shape = row['hw_shape']
        table.add_row(row['config'], row['memory'] or 'default',
                      str(row['width'] or 'all'),
                      f'{shape[0]} x {shape[1]}' if shape else '',
                      str(row['modules']), f'{row["saved_bytes"] / MIB:.2f}',
                      _ratio(row['ratio_saved'], 3),
                      '-' if row['step_s'] is None else f'{row["step_s"]:.4g}',
                      _ratio(row['ratio_step'],
                             3), f'{row["output_difference"]:.1e}',
                      f'{row["gradient_difference"]:.1e}')
    _console().print(table)


def check_plot(path: Optional[str]) -> None:
    """Know before hours of measuring that the chart can be written.

    Raises:
        PEFTError: If matplotlib is missing, has no such format, or the folder
            is not there.
    """
    if path is None:
        return
    folder = osp.dirname(osp.abspath(path))
    if not osp.isdir(folder):
        raise PEFTError(f'--plot {path}: there is no folder {folder}.')
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise PEFTError('--plot needs matplotlib; install it, or use '
                        '--json.') from None
    kinds = FigureCanvasAgg.get_supported_filetypes()
    if osp.splitext(path)[1].lstrip('.').lower() not in kinds:
        raise PEFTError(f'--plot {path}: charts are written as one of '
                        f'{", ".join(sorted(kinds))}.')


def plot(rows: Sequence[Dict[str, Any]], path: str) -> None:
    """Bars: memory and time of training, and latency, as ratios.

    Args:
        rows (Sequence[dict]): Of ``tools/benchmark.py``.
        path (str): File; its end says what kind.
    """
    from matplotlib.figure import Figure
    panels = [('bytes kept for backward / Full', [('ratio_saved', 'C0', '')]),
              ('training step / Full', [('ratio_step', 'C1', '')]),
              ('latency / stock', [('ratio_latency', 'C2', 'as trained'),
                                   ('ratio_latency_merged', 'C3', 'merged'),
                                   ('ratio_latency_folded', 'C4', 'folded')])]
    several = len({r['config'] for r in rows}) > 1
    names = [
        f'{osp.basename(r["config"])}\n{_title(r)}' if several else _title(r)
        for r in rows
    ]
    figure = Figure(figsize=(14, 1.2 + .4 * len(rows)), layout='constrained')
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (label, bars) in zip(axes, panels):
        height = .8 / len(bars)
        for i, (key, colour, name) in enumerate(bars):
            known = [(n, r[key]) for n, r in enumerate(rows)
                     if r[key] is not None]
            places = [n + (i - (len(bars) - 1) / 2) * height for n, _ in known]
            values = [v for _, v in known]
            drawn = axis.barh(
                places, values, height=height, color=colour, label=name)
            if len(bars) == 1:
                axis.bar_label(drawn, fmt='%.2f', padding=2)
        axis.axvline(1, color='grey', linewidth=.8)
        axis.set_xlabel(label)
        axis.margins(x=.12)
        if len(bars) > 1:
            axis.legend()
    axes[0].set_yticks(range(len(rows)), names)
    axes[0].invert_yaxis()
    if not several:
        figure.suptitle(rows[0]['config'])
    figure.savefig(path, dpi=120)
