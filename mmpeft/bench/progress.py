"""What a running plan shows, and what its table says so far."""
import re
from statistics import mean
from typing import Any, Dict, List, Optional, Tuple

from rich.console import Console
from rich.progress import (BarColumn, Progress, TextColumn, TimeElapsedColumn,
                           TimeRemainingColumn)
from rich.table import Table

from .plan import Plan
from .study import Study

__all__ = ['Watch', 'log_progress', 'remaining', 'status_table']

# As mmengine's LoggerHook writes them.
_EPOCHS = re.compile(r'Epoch\(train\)\s+\[(\d+)\]\[\s*(\d+)/(\d+)\]')
_ITERS = re.compile(r'Iter\(train\)\s+\[\s*(\d+)/(\d+)\]')
_LAST = re.compile(r'Iter\(val\)|Epoch\(val\)')


def log_progress(text: str, epochs: Optional[int]) -> Tuple[float, str]:
    """The done share of a run, and what it does, by the end of its log."""
    iters, passes = _ITERS.findall(text), _EPOCHS.findall(text)
    if iters:
        done, total = map(int, iters[-1])
    elif passes:
        epoch, step, length = map(int, passes[-1])
        done = (epoch - 1) * length + step
        total = (epochs or epoch) * length
    else:
        return 0., 'starting'
    words = 'validating' if _LAST.search(text) else f'{done}/{total}'
    return done / max(total, 1), words


def remaining(plan: Plan, rows: Dict[str, Dict[str, Any]]) -> int:
    """Cells still to come: those that are known, and the tuning ones that
    a method without any will at least have."""
    waiting = sum(r['status'] in ('waiting', 'running') for r in rows.values())
    for task in plan.tasks.values():
        if not task.head_lrs:
            continue
        for method in task.methods:
            tuned = any(r['task'] == task.name and r['method'] == method
                        and r['phase'] == 'tune' for r in rows.values())
            # They wait for Frozen's choice.
            waiting += 0 if tuned or len(task.lrs) < 2 else 2
    return waiting


class Watch:
    """Bars for the whole plan and each running cell.

    Args:
        study (Study): What runs.
        console (Console): Where.
    """

    def __init__(self, study: Study, console: Console) -> None:
        self.study = study
        self.progress = Progress(
            TextColumn('{task.description}'),
            BarColumn(bar_width=24),
            TextColumn('{task.fields[note]:>14}'),
            TimeElapsedColumn(),
            TextColumn('left'),
            TimeRemainingColumn(),
            console=console)
        self.all = self.progress.add_task(study.plan.name, note='')
        self.bars: Dict[str, int] = {}

    def __enter__(self) -> 'Watch':
        self.progress.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.progress.__exit__(*error)

    def __call__(self) -> None:
        """Look at the logs and draw."""
        shares = 0.
        running = dict(self.study.running)
        for name, run in running.items():
            if name not in self.bars:
                self.bars[name] = self.progress.add_task(
                    name, total=1., note='starting')
            share, note = log_progress(_end_of(run.log), run.epochs)
            shares += share
            self.progress.update(self.bars[name], completed=share, note=note)
        for name in set(self.bars) - set(running):
            self.progress.remove_task(self.bars.pop(name))
        rows = dict(self.study.rows)
        ended = sum(r['status'] in ('done', 'failed') for r in rows.values())
        total = ended + remaining(self.study.plan, rows)
        self.progress.update(
            self.all,
            completed=ended + shares,
            total=max(total, 1),
            note=f'{ended}/{total} cells')


def _end_of(path: str) -> str:
    try:
        with open(path, 'rb') as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 8192))
            return file.read().decode(errors='replace')
    except OSError:
        return ''


def status_table(plan: Plan, rows: List[Dict[str, Any]]) -> Table:
    """Of every method on every task: cells, metric so far, failures."""
    table = Table(title=plan.title or plan.name)
    for column in ('task', 'method', 'tuning', 'final', 'rate', 'metric',
                   'trainable', 'PPT', 'failed because'):
        table.add_column(
            column,
            overflow='fold',
            justify='left' if column in ('task', 'method',
                                         'failed because') else 'right')
    for task in plan.tasks.values():
        for method in task.methods:
            mine = [
                r for r in rows
                if r['task'] == task.name and r['method'] == method
            ]
            final = [r for r in mine if r['phase'] == 'final']
            done = [r for r in final if r['status'] == 'done']
            reasons = {r['reason'] for r in mine if r['status'] == 'failed'}
            table.add_row(
                task.name, method,
                _count([r for r in mine if r['phase'] == 'tune'
                        ]), _count(final), f'{done[0]["lr"]:g}'
                if done and done[0]['lr'] is not None else '',
                f'{mean(r["metric"] for r in done):.2f}' if done else '',
                f'{done[0]["backbone_trainable"]:,}' if done else '',
                f'{mean(r["ppt"] for r in done):.2f}' if done else '',
                '\n'.join(sorted(map(str, reasons))))
    return table


def _count(rows: List[Dict[str, Any]]) -> str:
    done = sum(r['status'] == 'done' for r in rows)
    failed = sum(r['status'] == 'failed' for r in rows)
    return f'{done}/{len(rows)}' + (f', {failed} failed' if failed else '')
