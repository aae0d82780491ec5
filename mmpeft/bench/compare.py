"""Our order of methods beside the printed ones."""
from dataclasses import dataclass
from typing import Dict, List, Optional, Tuple

from .published import read_published, read_sources
from .ranks import Agreement, agreement
from .summary import MethodSummary, TaskSummary

__all__ = ['Column', 'columns', 'Comparison', 'compare', 'reference']

# What a metric is compared with in the figures: the printed column of the same
# kind of task, by a part of the metric's name.
_REFERENCES = (('segm', 'coco', 'mask AP'), ('bbox', 'coco', 'box AP'),
               ('voc', 'voc', 'box AP'), ('miou', 'ade20k', 'mIoU'),
               ('accuracy', 'vtab-1k', 'mean top-1'), ('top1', 'vtab-1k',
                                                       'mean top-1'))
# Nothing here is trained on video.
_VIDEO = ('ssv2', 'hmdb51')


@dataclass(frozen=True)
class Column:
    """A printed column; by class of the method.

    ``ppt`` lacks what has none printed (full fine-tuning, everywhere).
    """
    task: str
    model: str
    metric: str
    url: str
    scores: Dict[str, float]
    ppt: Dict[str, float]

    @property
    def title(self) -> str:
        """E.g. ``coco, box AP, Swin-B``."""
        return f'{self.task}, {self.metric}, {self.model}'


def columns() -> List[Column]:
    """Printed columns of the survey's benchmark, without single data sets.

    Left out are a suite's data sets (its mean is there), video, and what
    Mona's repository prints, which is too little for an order.
    """
    sources = read_sources()
    found: Dict[Tuple[str, str, str], Column] = {}
    for row in read_published():
        single = '/' in row['task'] or row['task'] in _VIDEO
        if (single or not row['method']
                or not row['source'].startswith('v-petl')):
            continue
        key = (row['task'], row['model'], row['metric'])
        column = found.setdefault(
            key, Column(*key, sources[row['source']]['url'], {}, {}))
        column.scores[row['method']] = float(row['value'])
        if row['ppt']:
            column.ppt[row['method']] = float(row['ppt'])
    return list(found.values())


def reference(task: TaskSummary) -> Optional[Column]:
    """The printed column that the figures of a task show, by its metric."""
    for part, name, metric in _REFERENCES:
        if part in task.metric.lower():
            return next(c for c in columns()
                        if (c.task, c.metric) == (name, metric))
    return None


@dataclass(frozen=True)
class Comparison:
    """A task and a column; ``methods`` are those that both have."""
    column: Column
    methods: List[MethodSummary]
    by_score: Optional[Agreement]
    by_ppt: Optional[Agreement]


def common(task: TaskSummary, printed: Dict[str, float],
           value: str) -> Tuple[List[MethodSummary], List[float]]:
    """Methods that both have, and what is printed for them."""
    both = [(task.find(kind), number) for kind, number in printed.items()]
    both = [(m, number) for m, number in both
            if m is not None and getattr(m, value) is not None]
    return [m for m, _ in both], [number for _, number in both]


def compare(task: TaskSummary) -> List[Comparison]:
    """A task with every printed column that shares a method with it."""
    found = []
    for column in columns():
        methods, printed = common(task, column.scores, 'score')
        weighted, printed_ppt = common(task, column.ppt, 'ppt')
        if methods:
            found.append(
                Comparison(column, methods,
                           agreement(printed, [m.score for m in methods]),
                           agreement(printed_ppt, [m.ppt for m in weighted])))
    return found
