"""Tables of the metric: results, differences, tuning, and what is missing."""
from typing import Callable, Dict, List, Optional, Sequence, Tuple

from .bootstrap import mean_interval
from .cells_text import NOTHING, millions, percent, place, score_text, signed
from .document import Table
from .summary import MethodSummary, TaskSummary

__all__ = [
    'results_table', 'others_table', 'differences_table', 'tuning_tables',
    'gaps'
]


def _span(ends: Optional[Sequence], text: Callable[..., str]) -> str:
    if ends is None:
        return '–'
    low, high = map(text, ends)
    return low if low == high else f'{low} to {high}'


def results_table(task: TaskSummary) -> Table:
    """The metric, its spread, what trains and PPT."""
    repeated = any(m.interval for m in task.methods)
    places = [m.place for m in task.methods]
    ppt_places = [m.ppt_place for m in task.methods]
    rows = []
    for m in task.methods:
        row = [m.name, place(m.place, places), score_text(m)]
        if repeated:
            row += [_span(m.interval, percent), _span(m.place_range, str)]
        seeds = str(len(m.scores))
        if m.missing:
            seeds += f' of {len(m.scores) + len(m.missing)}'
        rows.append([
            *row,
            millions(m.backbone_trainable),
            percent(m.ppt),
            place(m.ppt_place, ppt_places), seeds
        ])
    intervals = ['Interval', 'Interval of rank'] if repeated else []
    return Table(
        f'{task.name}-results',
        f'{task.words} in %: mean ± sample standard deviation over seeds' +
        ', bootstrap intervals of the mean and of its rank (95 %)' * repeated +
        '; trainable parameters of the backbone in millions; PPT in %.', [
            'Method', 'Rank', f'{task.words}, %', *intervals, 'Trainable, M',
            'PPT, %', 'PPT rank', 'Seeds'
        ], rows)


def others_table(task: TaskSummary) -> Optional[Table]:
    """What else the evaluator gave."""
    names = list(dict.fromkeys(n for m in task.measured for n in m.others))
    if not names:
        return None
    digits = {
        # percent, or parts of one
        n: 2 if any(m.others.get(n, 0) > 1 for m in task.measured) else 4
        for n in names
    }
    rows = []
    for m in task.measured:
        # COCO says -1 where there is no object of a size.
        known = [m.others.get(n, -1) >= 0 for n in names]
        rows.append([m.name] + [
            f'{m.others[n]:.{digits[n]}f}' if ok else '–'
            for n, ok in zip(names, known)
        ])
    return Table(
        f'{task.name}-others',
        'Other metrics, means over seeds, in the unit of the evaluator.',
        ['Method', *(n.split('/')[-1] for n in names)], rows)


def differences_table(task: TaskSummary) -> Optional[Table]:
    """Against the baselines, seed by seed."""
    bases = [b for b in map(task.find, ('Frozen', 'Full')) if b]
    if not bases:
        return None
    rows = []
    for m in task.measured:
        row = [m.name]
        for base in bases:
            seeds = [s for s in m.scores if s in base.scores]
            gains = [m.scores[s] - base.scores[s] for s in seeds]
            if m is base or not gains:
                row += ['–', '–', '–']
                continue
            won = sum(gain > 0 for gain in gains)
            row += [
                signed(sum(gains) / len(gains)),
                _span(mean_interval(gains), signed), f'{won} of {len(gains)}'
            ]
        rows.append(row)
    head = ['Method']
    for base in bases:
        head += [f'To {base.name}', 'Interval', 'Seeds above']
    return Table(
        f'{task.name}-differences',
        f'Difference of {task.words} to the baselines, in points, seed by '
        'seed: mean, bootstrap interval of the mean (95 %), seeds above.',
        head, rows)


def _rate_text(method: MethodSummary, axis: int, rate: float) -> str:
    """The score of a rate; bold where the reported runs have it."""
    scores = [v for rates, v in method.tried.items() if rates[axis] == rate]
    if not scores:
        return '–'
    chosen = method.rates is not None and method.rates[axis] == rate
    return f'**{max(scores):.2f}**' if chosen else percent(max(scores))


def _tuning(task: TaskSummary, methods: Sequence[MethodSummary], axis: int,
            label: str, words: str) -> Optional[Table]:
    rates = sorted({
        rate[axis]
        for m in methods
        for rate in m.tried if rate[axis] is not None
    })
    if not rates:
        return None
    rows = []
    for m in methods:
        chosen = m.rates[axis] if m.rates else None
        edge = len(rates) > 2 and chosen in (rates[0], rates[-1])
        rows.append([
            m.name, *(_rate_text(m, axis, rate) for rate in rates),
            '–' if chosen is None else f'{chosen:g}' + ' (edge)' * edge
        ])
    return Table(
        f'{task.name}-{label}',
        f'{task.words} in % on the images that choose, by {words}; bold: the '
        'rate of the reported runs; edge: at an end of the grid, so a better '
        'one may lie outside.',
        ['Method', *(f'{rate:g}' for rate in rates), 'Chosen'], rows)


def tuning_tables(task: TaskSummary) -> List[Table]:
    """What each learning rate gave where the rate is chosen."""
    heads = [m for m in task.methods if len({h for _, h in m.tried}) > 1]
    others = [m for m in task.methods if m.tried and m not in heads]
    tables = [
        _tuning(task, heads, 1, 'tuning-head',
                'learning rate of neck and head'),
        _tuning(task, others, 0, 'tuning', 'learning rate')
    ]
    return [table for table in tables if table is not None]


def gaps(task: TaskSummary) -> List[str]:
    """Cells that failed, by their reasons, and cells without a result."""
    reasons: Dict[Tuple[str, str], List[str]] = {}
    for row in task.failures:
        cell = row['phase']
        if row.get('lr') is not None and cell == 'tune':
            cell += f' at {row["lr"]:g}'
        if row.get('seed') is not None:
            cell += f' with seed {row["seed"]}'
        reason = ' '.join((row.get('reason') or 'no reason recorded').split())
        reasons.setdefault((row['method'], reason), []).append(cell)
    lines = [
        f'**{method}** failed ({", ".join(cells)}): {reason}'
        for (method, reason), cells in reasons.items()
    ]
    failed = {(r['method'], r.get('seed'))
              for r in task.failures if r['phase'] == 'final'}
    for m in task.methods:
        seeds = [s for s in m.missing if (m.name, s) not in failed]
        if seeds:
            lines.append(f'**{m.name}**: {NOTHING} with seed '
                         f'{", ".join(map(str, seeds))}')
    return lines
