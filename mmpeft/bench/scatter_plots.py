"""The metric against what a method costs."""
from typing import List, Optional, Sequence

from ..methods import Selector, SideNetwork
from ..registry import METHODS
from .cells_text import MEBI
from .document import Figure
from .drawing import png, sheet
from .labels import add_labels
from .summary import MethodSummary, TaskSummary

__all__ = ['against_parameters', 'against_memory']

BASELINES = ('Frozen', 'Full')
# marker, words of the legend; in the order of the legend
_MARKERS = dict(
    baseline=('D', 'baseline'),
    stock=('s', 'trains stock parameters'),
    module=('o', 'adds modules'),
    side=('^', 'network beside the backbone'))


def _sort(method: MethodSummary) -> str:
    if method.kind in BASELINES:
        return 'baseline'
    kind = METHODS.get(method.kind) if method.kind else None
    if kind is not None and issubclass(kind, Selector):
        return 'stock'
    if kind is not None and issubclass(kind, SideNetwork):
        return 'side'
    return 'module'


def _axes(figure, task: TaskSummary):
    figure.get_layout_engine().set(rect=(0, 0, 1, .94))  # for the legend
    axes = figure.add_subplot()
    axes.set_ylabel(f'{task.words}, %')
    axes.grid(True, which='major', color='.9', lw=.7)
    return axes


def _draw(axes, task: TaskSummary, methods: Sequence[MethodSummary],
          xs: Sequence[float]) -> None:
    """Points, their spread, lines at the baselines, and names."""
    for sort, (marker, words) in _MARKERS.items():
        shown = [(m, x) for m, x in zip(methods, xs) if _sort(m) == sort]
        if shown:
            axes.errorbar([x for _, x in shown], [m.score for m, _ in shown],
                          yerr=[m.spread or 0. for m, _ in shown],
                          fmt=marker,
                          ms=6.5,
                          color='.15',
                          mfc='white' if sort == 'baseline' else '.15',
                          mew=1.3,
                          ecolor='.6',
                          elinewidth=1,
                          capsize=2.5,
                          label=words)
    lines = [b.score for b in map(task.find, BASELINES) if b is not None]
    for height in lines:
        axes.axhline(height, color='.55', lw=.9, ls=(0, (5, 4)), zorder=1)
    handles, words = axes.get_legend_handles_labels()
    axes.figure.legend([handle[0] for handle in handles],
                       words,
                       loc='upper center',
                       ncol=len(words),
                       frameon=False,
                       fontsize=9,
                       handletextpad=.3)
    add_labels(axes, [(x, m.score) for m, x in zip(methods, xs)],
               [m.name for m in methods], [m.spread or 0. for m in methods],
               lines)


def _log_axis(axes, values: Sequence[float]) -> List[float]:
    """A logarithmic x axis; zero has a place of its own, left of a line."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_xscale('log')
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f'{x:g}'))
    positive = [v for v in values if v > 0]
    low, high = min(positive), max(positive)
    if len(positive) == len(values):
        axes.set_xlim(low / 2, high * 2)
        return list(values)
    zero = low / 5

    class RightOfBreak(LogLocator):
        """No ticks where the axis is not logarithmic."""

        def __call__(self):
            """Positions of the ticks."""
            return [t for t in super().__call__() if t > zero * 2]

    axes.xaxis.set_major_locator(RightOfBreak())
    axes.xaxis.set_minor_locator(RightOfBreak(subs=range(2, 10)))
    axes.axvline(zero * 2, color='.6', lw=.8, ls=':')
    axes.set_xlim(zero / 2, high * 2)
    axes.annotate(
        '0 (none)', (zero, 0), (0, -5.5),
        xycoords=axes.get_xaxis_transform(),
        textcoords='offset points',
        ha='center',
        va='top')
    return [v if v > 0 else zero for v in values]


def against_parameters(task: TaskSummary) -> Optional[Figure]:
    """The metric against the trainable parameters of the backbone."""
    methods = [m for m in task.measured if m.backbone_trainable is not None]
    if len(methods) < 2 or not any(m.backbone_trainable for m in methods):
        return None
    with sheet(7.6, 4.9) as figure:
        axes = _axes(figure, task)
        axes.margins(y=.1)
        xs = _log_axis(axes, [m.backbone_trainable / 1e6 for m in methods])
        axes.set_xlabel('trainable parameters of the backbone, millions '
                        '(logarithmic)')
        _draw(axes, task, methods, xs)
        data = png(figure)
    return Figure(
        f'{task.name}_parameters.png',
        f'{task.name}: {task.words} (mean over seeds; bars: sample standard '
        'deviation) against the trainable parameters of the backbone. Dashed: '
        'the baselines.', data)


def against_memory(task: TaskSummary) -> Optional[Figure]:
    """The metric against memory: the peak, or what backward needs."""
    count, key = max((sum(m.costs[key] is not None
                          for m in task.measured), key)
                     for key in ('peak_bytes', 'saved_bytes'))
    if count < 2:
        return None
    methods = [m for m in task.measured if m.costs[key] is not None]
    words = dict(
        peak_bytes='peak memory of a training step, MiB',
        saved_bytes='kept by the forward for the backward, MiB')[key]
    xs = [m.costs[key] / MEBI for m in methods]
    with sheet(7.6, 4.9) as figure:
        axes = _axes(figure, task)
        axes.margins(y=.1)
        axes.set_xlim(0, 1.12 * max(xs))
        axes.set_xlabel(words)
        _draw(axes, task, methods, xs)
        data = png(figure)
    return Figure(f'{task.name}_memory.png',
                  f'{task.name}: {task.words} against {words}.', data)
