"""PPT of the methods, and their ranks beside the printed ones."""
import math
from typing import List, Optional, Sequence, Tuple

from .cells_text import place
from .compare import Column, common
from .document import Figure
from .drawing import png, sheet
from .ranks import places
from .summary import TaskSummary

__all__ = ['ppt_bars', 'rank_flow']


def ppt_bars(task: TaskSummary) -> Optional[Figure]:
    """PPT, what the parameters cost of the metric, and PPT with the head."""
    methods = [m for m in task.measured if m.ppt is not None]
    if not methods:
        return None
    methods.sort(key=lambda m: m.ppt)
    rows = range(len(methods))
    longest = max(m.score for m in methods)
    with sheet(7.6, 1.3 + .25 * len(methods)) as figure:
        axes = figure.add_subplot()
        thick = dict(height=.66, lw=.8)
        ppt = axes.barh(rows, [m.ppt for m in methods], color='.4', **thick)
        rest = axes.barh(
            rows, [m.score - m.ppt for m in methods],
            left=[m.ppt for m in methods],
            color='white',
            edgecolor='.4',
            hatch='/////',
            **thick)
        legend = [(ppt, 'PPT'), (rest, f'rest of {task.words}')]
        headed = [(m.ppt_with_head, i) for i, m in enumerate(methods)
                  if m.ppt_with_head is not None]
        if headed:
            mark, = axes.plot(
                *zip(*headed), 'D', ms=5.5, mfc='white', mec='black', ls='')
            legend.append((mark, 'PPT if neck and head are counted'))
        for row, m in zip(rows, methods):
            end = max(m.score, m.ppt) + .012 * longest
            axes.text(end, row, f'{m.ppt:.2f}', va='center', fontsize=8.5)
        axes.set_yticks(rows, [m.name for m in methods])
        axes.tick_params(axis='y', length=0)
        axes.set_xlim(0, 1.1 * longest)
        axes.set_ylim(-.6, len(methods) - .4)
        axes.set_xlabel(f'{task.words} and PPT, % (the numbers are PPT)')
        figure.legend(
            *zip(*legend),
            loc='outside upper center',
            ncol=3,
            frameon=False,
            fontsize=9)
        data = png(figure)
    return Figure(
        f'{task.name}_ppt.png',
        f'{task.name}: PPT, and what the trainable parameters took of '
        f'{task.words} (hatched).', data)


def _seats(ranks: Sequence[int], others: Sequence[int]) -> List[int]:
    """Distinct heights; equal ranks sit in the order of the other side."""
    order = sorted(range(len(ranks)), key=lambda i: (ranks[i], others[i]))
    seats = [0] * len(ranks)
    for seat, index in enumerate(order, 1):
        seats[index] = seat
    return seats


def _flow(axes, left: Sequence[float], right: Sequence[float],
          names: Sequence[str], title: str, ends: Tuple[str, str],
          height: int) -> None:
    """Two ranked columns, joined; far movers are black."""
    before, after = places(left), places(right)
    seats = _seats(before, after), _seats(after, before)
    marks = [[place(r, side) for r in side]
             for side in (before.tolist(), after.tolist())]
    far = _far(len(names))
    for i, (name, y0, y1) in enumerate(zip(names, *seats)):
        moved = abs(before[i] - after[i]) >= far
        axes.plot((0, 1), (y0, y1),
                  marker='o',
                  ms=4,
                  color='black' if moved else '.55',
                  lw=1.8 if moved else 1.,
                  ls='-' if moved else (0, (6, 2)))
        style = dict(
            va='center',
            fontsize=8.5,
            fontweight='bold' if moved else 'normal')
        axes.text(-.06, y0, f'{name}  {marks[0][i]}', ha='right', **style)
        axes.text(1.06, y1, f'{marks[1][i]}  {name}', **style)
    axes.set_xlim(-1.05, 2.05)
    axes.set_ylim(height + .5, .5)
    for x, text, side in ((0, ends[0], 'right'), (1, ends[1], 'left')):
        axes.annotate(
            text, (x, 1), (6 if side == 'right' else -6, 6),
            xycoords=axes.get_xaxis_transform(),
            textcoords='offset points',
            ha=side,
            fontsize=8.5,
            linespacing=1.3)
    axes.set_title(title, fontsize=10, fontweight='bold', pad=46)
    axes.axis('off')


def _far(count: int) -> int:
    return max(2, math.ceil(count / 4))


def rank_flow(task: TaskSummary, column: Optional[Column]) -> Optional[Figure]:
    """From the printed ranks to ours, by metric and by PPT."""
    if column is None:
        return None
    panels = []
    for value, printed, words in (('score', column.scores, 'by metric'),
                                  ('ppt', column.ppt, 'by PPT')):
        methods, numbers = common(task, printed, value)
        if len(methods) > 2:
            panels.append((numbers, [getattr(m, value) for m in methods],
                           [m.name for m in methods], words))
    if not panels:
        return None
    most = max(len(panel[0]) for panel in panels)
    # Narrow: two panels stand side by side.
    ends = (f'printed\n{column.task}, {column.model}\n{column.metric}',
            f'ours\n{task.name}\n{task.words}')
    with sheet(3.9 * len(panels), 1.4 + .24 * most) as figure:
        for i, panel in enumerate(panels, 1):
            _flow(figure.add_subplot(1, len(panels), i), *panel, ends, most)
        data = png(figure)
    far = ', '.join(
        dict.fromkeys(str(_far(len(panel[0]))) for panel in panels))
    return Figure(
        f'{task.name}_ranks.png',
        f'{task.name}: ranks among the methods that both have, from the '
        f'printed {column.title} to ours. Black: moved by {far} places or '
        'more.', data)
