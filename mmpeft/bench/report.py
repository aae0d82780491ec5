"""The report of a benchmark, from its rows and nothing else."""
import csv
import io
import json
from pathlib import Path
from statistics import mean
from typing import (TYPE_CHECKING, Any, Dict, List, Mapping, Optional,
                    Sequence, Union)

from .cells_text import NOTHING, place, score_text
from .document import Figure, Heading, Part, Table, Text, render_markdown
from .html_page import render_html
from .latex import render_latex
from .sections import task_parts
from .summary import TaskSummary, summarise

if TYPE_CHECKING:
    from .plan import Plan

__all__ = ['write_report', 'report_parts']

Row = Mapping[str, Any]

_READING = [
    'Results are means over seeds, each with the sample standard deviation. '
    'Ranks follow the mean; `=` marks a shared one.',
    'PPT is `metric * exp(-log10(P / 1e7 + 1))`, with P the trainable '
    'parameters of the backbone, as in the survey '
    '([2402.02242](https://arxiv.org/abs/2402.02242)); all methods train neck '
    'and head, too, which it does not count.',
    'Intervals are percentile bootstraps over seeds (10000 draws, seeded). '
    'They are too narrow for few seeds: of normal values, one that says 95 % '
    'holds the true mean in 50, 75, 84 and 89 % of cases with 2, 3, 5 and 10 '
    'seeds.', f'"{NOTHING}" and "–" are what they say; nothing is filled in.'
]


def _versions(rows: Sequence[Row]) -> str:
    """Every version that a run had, by package."""
    found: Dict[str, Dict[str, None]] = {}
    for row in rows:
        versions = row.get('versions') or {}
        if isinstance(versions, str):
            versions = json.loads(versions)
        for name, version in versions.items():
            found.setdefault(name, {})[str(version)] = None
    return ', '.join(f'{name} {" and ".join(versions)}'
                     for name, versions in found.items())


def _overview(rows: Sequence[Row]) -> List[str]:
    states = {
        state: sum(row['status'] == state for row in rows)
        for state in ('done', 'failed', 'running', 'waiting')
    }
    counts = ', '.join(f'{n} {state}' for state, n in states.items() if n)
    items = [f'Cells: {counts or "none"}.']
    times = sorted(r['ended'] for r in rows if r.get('ended'))
    if times:
        first, last = (t[:16].replace('T', ' ') for t in (times[0], times[-1]))
        items.append(f'Finished between {first} and {last} UTC.')
    versions = _versions(rows)
    if versions:
        items.append(f'Versions: {versions}.')
    return items


def _across(tasks: Sequence[TaskSummary]) -> Table:
    """Every method on every task, with its mean rank."""
    by_name = {t.name: {m.name: m for m in t.methods} for t in tasks}
    names = dict.fromkeys(m.name for t in tasks for m in t.methods)
    rows = []
    for name in names:
        found = [by_name[t.name].get(name) for t in tasks]
        ranked = [m for m in found if m is not None and m.place]
        row = [name]
        for task, m in zip(tasks, found):
            places = [n.place for n in task.methods]
            if m is None and task.asked is not None:
                row += ['–', '–']  # the plan leaves it out
                continue
            row += [NOTHING, '–'] if m is None or not m.scores else [
                score_text(m), place(m.place, places)
            ]
        complete = len(ranked) == len(tasks)
        row += [
            f'{mean(m.place for m in ranked):.1f}' if complete else '–',
            f'{mean(m.ppt_place for m in ranked):.1f}'
            if complete and all(m.ppt_place for m in ranked) else '–'
        ]
        rows.append((mean(m.place for m in ranked) if complete else 1e9, row))
    head = ['Method']
    for task in tasks:
        head += [f'{task.name}, {task.words}, %', 'Rank']
    return Table(
        'across', 'All tasks: mean ± sample standard deviation over seeds, '
        'rank, and the mean of the ranks by metric and by PPT, where a method '
        'has all tasks.', [*head, 'Mean rank', 'Mean PPT rank'],
        [row for _, row in sorted(rows, key=lambda item: item[0])])


def report_parts(rows: Sequence[Row],
                 plan: Optional['Plan'] = None,
                 figures: bool = True) -> List[Part]:
    """The report as parts; see :func:`write_report`."""
    tasks = summarise(rows, plan)
    parts: List[Part] = [Heading(1, _title(plan))]
    if plan and plan.title:
        parts.append(Text(plan.title))
    parts += [
        Text(items=_overview(rows)),
        Heading(2, 'How to read it'),
        Text(items=_READING)
    ]
    if len(tasks) > 1:
        parts += [Heading(2, 'All tasks'), _across(tasks)]
    for task in tasks:
        parts += task_parts(task, figures)
    return parts


def _title(plan: Optional['Plan']) -> str:
    return f'Benchmark {plan.name}' if plan else 'Benchmark'


def _csv(tasks: Sequence[TaskSummary]) -> str:
    """One line per task and method, in full digits and base units."""
    lines = []
    for task in tasks:
        for m in task.methods:
            values = list(m.scores.values())
            lines.append(
                dict(
                    task=task.name,
                    method=m.name,
                    metric=task.metric,
                    seeds=len(values),
                    mean=m.score,
                    stdev=m.spread,
                    low=m.interval[0] if m.interval else None,
                    high=m.interval[1] if m.interval else None,
                    rank=m.place,
                    backbone_trainable=m.backbone_trainable,
                    head_trainable=m.head_trainable,
                    model_total=m.model_total,
                    ppt=m.ppt,
                    ppt_rank=m.ppt_place,
                    ppt_with_head=m.ppt_with_head,
                    ppt_with_head_rank=m.ppt_with_head_place,
                    lr=m.rates[0] if m.rates else None,
                    head_lr=m.rates[1] if m.rates else None,
                    failed=sum(f['method'] == m.name for f in task.failures),
                    missing=len(m.missing),
                    **m.costs))
    buffer = io.StringIO()
    if lines:
        writer = csv.DictWriter(buffer, lines[0], lineterminator='\n')
        writer.writeheader()
        writer.writerows(lines)
    return buffer.getvalue()


def write_report(rows: Sequence[Row],
                 out_dir: Union[str, Path],
                 plan: Optional['Plan'] = None,
                 figures: bool = True) -> List[Path]:
    """Writes ``report.md``, ``.html``, ``.tex``, ``.csv`` and the figures.

    The HTML page needs no other file. The others are for a repository, a
    paper and a program; the Markdown shows the figures beside it.

    Args:
        rows (Sequence[dict]): As ``read_rows`` gives them.
        out_dir (str | Path): Made where it is not there.
        plan (Plan, optional): What was asked for, so that what is missing is
            shown. Defaults to what there are rows of.
        figures (bool): Draw them, which needs matplotlib. Defaults to True.

    Returns:
        list[Path]: The files.

    Raises:
        PEFTError: If figures are wanted without matplotlib.
    """
    parts = report_parts(rows, plan, figures)
    files = {
        'report.md': render_markdown(parts).encode(),
        'report.html': render_html(parts, _title(plan)).encode(),
        'report.tex': render_latex(parts).encode(),
        'report.csv': _csv(summarise(rows, plan)).encode(),
        **{
            p.file: p.png
            for p in parts if isinstance(p, Figure)
        }
    }
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in files]
