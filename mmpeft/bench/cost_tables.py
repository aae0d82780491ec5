"""Tables of what methods cost, of PPT, and of the printed numbers."""
from typing import Optional

from .cells_text import MEBI, millions, percent, place, scaled
from .compare import compare, reference
from .document import Table
from .ranks import agreement, spearman
from .summary import TaskSummary

__all__ = ['costs_table', 'head_table', 'head_words', 'published_table']

# column, unit, digits, head
_COSTS = (
    ('step_s', 1e-3, 1, 'Step, ms'),
    ('train_step_s', 1e-3, 1, 'Step in the run, ms'),
    ('saved_bytes', MEBI, 1, 'Kept for backward, MiB'),
    ('peak_bytes', MEBI, 1, 'Peak memory, MiB'),
    ('latency_s', 1e-3, 1, 'Latency, ms'),
    ('latency_merged_s', 1e-3, 1, 'Latency merged, ms'),
    ('delta_bytes', 1e3, 1, 'Delta file, kB'),
)


def costs_table(task: TaskSummary) -> Optional[Table]:
    """Time and memory; a column that nothing has is left out."""
    shown = [
        c for c in _COSTS
        if any(m.costs[c[0]] is not None for m in task.measured)
    ]
    if not shown:
        return None
    rows = [[m.name] + [
        scaled(m.costs[key], unit, digits)
        if m.costs[key] is not None or key != 'latency_merged_s' else '–'
        for key, unit, digits, _ in shown
    ] for m in task.measured]
    return Table(
        f'{task.name}-costs',
        'Cost, median over seeds. Step: forward, backward and update, alone '
        'or in the run, beside other cells (on a CPU: its CPU time); latency: '
        'inference; merged: of those that merge.',
        ['Method', *(c[3] for c in shown)], rows)


def _moved(old: Optional[int], new: Optional[int]) -> str:
    if old is None or new is None:
        return '–'
    return 'same' if old == new else f'{old - new:+d}'


def head_table(task: TaskSummary) -> Optional[Table]:
    """What changes if the head is counted."""
    methods = [m for m in task.measured if m.ppt_with_head is not None]
    if not methods:
        return None
    methods = sorted(methods, key=lambda m: m.ppt_with_head_place)
    rows = [[
        m.name,
        millions(m.backbone_trainable),
        millions(m.head_trainable),
        percent(m.ppt),
        percent(m.ppt_with_head),
        place(m.ppt_place, [n.ppt_place for n in methods]),
        place(m.ppt_with_head_place, [n.ppt_with_head_place for n in methods]),
        _moved(m.ppt_place, m.ppt_with_head_place)
    ] for m in methods]
    return Table(
        f'{task.name}-head',
        'PPT if the trainable parameters of neck and head are counted, too '
        '(millions of parameters; PPT in %; moved up: +).', [
            'Method', 'Backbone, M', 'Neck and head, M', 'PPT, %',
            'PPT with head, %', 'Rank', 'Rank with head', 'Moved'
        ], rows)


def head_words(task: TaskSummary) -> str:
    """The table on the head, in a sentence."""
    methods = [m for m in task.measured if m.ppt_with_head is not None]
    moved = [m for m in methods if m.ppt_place != m.ppt_with_head_place]
    both = agreement([m.ppt for m in methods],
                     [m.ppt_with_head for m in methods])
    if both is None:
        return ''
    to_metric = spearman([m.ppt for m in methods], [m.score for m in methods])
    return (f'If neck and head are counted, {len(moved)} of {len(methods)} '
            'methods change their rank by PPT; the two orders agree with '
            f'Spearman ρ = {both.spearman:.2f}. The order by PPT and that by '
            f'{task.words} agree with ρ = {to_metric:.2f}.')


def published_table(task: TaskSummary) -> Optional[Table]:
    """Rank correlations with the printed columns."""
    rows, shown = [], reference(task)
    for c in compare(task):
        name = f'[{c.column.title}]({c.column.url})'
        if shown is not None and c.column.title == shown.title:
            name = f'**{name}**'
        row = [name, str(len(c.methods))]
        for a in (c.by_score, c.by_ppt):
            row += ['–'] * 4 if a is None else [
                f'{a.spearman:.2f}', f'{a.spearman_p:.3f}', f'{a.kendall:.2f}',
                f'{a.kendall_p:.3f}'
            ]
        rows.append(row)
    if not rows:
        return None
    return Table(
        f'{task.name}-published',
        "Rank correlation of our order with the survey's printed ones "
        '(Spearman ρ, Kendall τ-b), by metric and by PPT, over the methods '
        'that both have; p: share of random orders that agree or disagree at '
        'least as much. PPT lacks full fine-tuning, which has none in print.' +
        ' Bold: the task most like ours, in the figure.' * bool(shown), [
            'Printed column', 'Methods', 'ρ', 'p', 'τ', 'p', 'ρ of PPT', 'p',
            'τ of PPT', 'p'
        ], rows)
