"""What the rows of a benchmark say about each method on each task."""
from dataclasses import dataclass, field
from statistics import mean, median, stdev
from typing import (TYPE_CHECKING, Any, Dict, Iterable, List, Mapping,
                    Optional, Sequence, Tuple)

from ..counting import ppt_factor
from ..plan import parse_method_string
from ..registry import METHODS
from .bootstrap import mean_interval, place_intervals
from .ranks import places

if TYPE_CHECKING:
    from .plan import Plan, Task

__all__ = ['MethodSummary', 'TaskSummary', 'summarise']

Row = Mapping[str, Any]
# of what the method trains (or of all that trains), and of neck and head
Rates = Tuple[Optional[float], Optional[float]]
_WORDS = dict(bbox_mAP='box AP', segm_mAP='mask AP', top1='top-1 accuracy')
# Taken from each finished run, where it has them; the median over seeds.
COSTS = ('step_s', 'train_step_s', 'saved_bytes', 'peak_bytes', 'latency_s',
         'latency_merged_s', 'delta_bytes')


@dataclass
class MethodSummary:
    """A method on a task. What was not measured is None, never 0."""
    name: str
    kind: str  # class of the method, '' if there is no such class
    scores: Dict[int, float] = field(default_factory=dict)  # by seed
    missing: List[int] = field(default_factory=list)  # seeds
    rates: Optional[Rates] = None  # of the reported runs
    tried: Dict[Rates, float] = field(default_factory=dict)  # tuning
    backbone_trainable: Optional[float] = None
    head_trainable: Optional[float] = None
    model_total: Optional[float] = None
    ppt: Optional[float] = None
    ppt_with_head: Optional[float] = None
    costs: Dict[str, Optional[float]] = field(default_factory=dict)
    others: Dict[str, float] = field(default_factory=dict)  # of the evaluator
    place: Optional[int] = None
    place_range: Optional[tuple] = None
    ppt_place: Optional[int] = None
    ppt_with_head_place: Optional[int] = None

    @property
    def score(self) -> Optional[float]:
        """Mean over seeds."""
        return mean(self.scores.values()) if self.scores else None

    @property
    def spread(self) -> Optional[float]:
        """Sample standard deviation over seeds; None for fewer than two."""
        return stdev(self.scores.values()) if len(self.scores) > 1 else None

    @property
    def interval(self) -> Optional[Tuple[float, float]]:
        """Bootstrap interval of the mean."""
        return mean_interval(list(self.scores.values()))


@dataclass
class TaskSummary:
    """A task; ``methods`` from the best to the worst, unmeasured ones last."""
    name: str
    config: str
    metric: str
    methods: List[MethodSummary]
    failures: List[Row]
    asked: Optional['Task'] = None  # in the plan

    @property
    def words(self) -> str:
        """The metric as people call it."""
        name = self.metric.split('/')[-1]
        return _WORDS.get(name, name)

    @property
    def measured(self) -> List[MethodSummary]:
        """Methods with a reported run."""
        return [m for m in self.methods if m.scores]

    def find(self, kind: str) -> Optional[MethodSummary]:
        """The measured method of a class, by its own name if there are two."""
        found = [m for m in self.measured if m.kind == kind]
        found.sort(key=lambda m: m.name != kind)
        return found[0] if found else None


def kind_of(row: Row) -> str:
    """Class of the method of a row; '' for several methods or none known."""
    for text in (row.get('spec'), row.get('method')):
        try:
            parts = parse_method_string(text) if text else ()
        except ValueError:
            continue
        if len(parts) == 1 and parts[0].get('type') in METHODS.module_dict:
            return parts[0]['type']
    return ''


def _middle(values: Iterable[Optional[float]]) -> Optional[float]:
    known = [v for v in values if v is not None]
    return median(known) if known else None


def _mean(values: Iterable[Optional[float]]) -> Optional[float]:
    known = [v for v in values if v is not None]
    return mean(known) if known else None


def _ppt(row: Row, name: str, heads: bool) -> Optional[float]:
    """As the row has it, or else by the formula."""
    if row.get(name) is not None:
        return row[name]
    parts = [row.get('backbone_trainable')]
    parts += [row.get('head_trainable')] if heads else []
    if row.get('metric') is None or None in parts:
        return None
    return row['metric'] * ppt_factor(sum(parts))


def _rates(row: Row) -> Rates:
    return row.get('lr'), row.get('head_lr')


def _other_metrics(final: Sequence[Row]) -> Dict[str, float]:
    """Means of what every run has besides the metric, as it was given."""
    given = [dict(r.get('metrics') or {}) for r in final]
    found = {}
    for key in given[0] if given else ():
        values = [metrics.get(key) for metrics in given]
        if key != final[0]['metric_name'] and all(
                isinstance(v, (int, float)) for v in values):
            found[key] = mean(values)
    return found


def _method(name: str, rows: Sequence[Row],
            asked: Optional['Task']) -> MethodSummary:
    done = [
        r for r in rows
        if r['status'] == 'done' and r.get('metric') is not None
    ]
    final = sorted((r for r in done if r['phase'] == 'final'),
                   key=lambda r: r['seed'])
    spec = asked.methods.get(name) if asked else None
    result = MethodSummary(
        name, kind_of(rows[0] if rows else dict(spec=spec, method=name)))
    result.scores = {r['seed']: r['metric'] for r in final}
    result.missing = [
        s for s in (asked.seeds if asked else ()) if s not in result.scores
    ]
    result.rates = _rates(final[0]) if final else None
    result.tried = {
        _rates(r): r['metric']
        for r in done if r['phase'] == 'tune'
    }
    for key in ('backbone_trainable', 'head_trainable', 'model_total'):
        setattr(result, key, _mean(r.get(key) for r in final))
    result.ppt = _mean(_ppt(r, 'ppt', False) for r in final)
    result.ppt_with_head = _mean(_ppt(r, 'ppt_with_head', True) for r in final)
    result.costs = {k: _middle(r.get(k) for r in final) for k in COSTS}
    result.others = _other_metrics(final)
    return result


def _set_places(methods: Sequence[MethodSummary], value: str,
                place: str) -> None:
    known = [m for m in methods if getattr(m, value) is not None]
    found = places([getattr(m, value) for m in known])
    for method, rank in zip(known, found):
        setattr(method, place, int(rank))


def _task(name: str, rows: Sequence[Row],
          asked: Optional['Task']) -> TaskSummary:
    wanted = asked.methods if asked else ()
    methods = [
        _method(m, [r for r in rows if r['method'] == m], asked)
        for m in dict.fromkeys([*wanted, *(r['method'] for r in rows)])
    ]
    _set_places(methods, 'score', 'place')
    _set_places(methods, 'ppt', 'ppt_place')
    _set_places(methods, 'ppt_with_head', 'ppt_with_head_place')
    ranges = place_intervals(
        {m.name: list(m.scores.values())
         for m in methods if m.scores})
    for method in methods:
        method.place_range = ranges.get(method.name)
    methods.sort(key=lambda m: (m.place is None, m.place))
    names = [r.get('metric_name') for r in rows] + [asked and asked.metric]
    configs = [r.get('config') for r in rows] + [asked and asked.config]
    return TaskSummary(name, next(filter(None, configs), ''),
                       next(filter(None, names), 'metric'), methods,
                       [r for r in rows if r['status'] == 'failed'], asked)


def summarise(rows: Sequence[Row],
              plan: Optional['Plan'] = None) -> List[TaskSummary]:
    """Rows of the table ``cells`` to one summary per task.

    Args:
        rows (Sequence[dict]): As ``read_rows`` gives them.
        plan (Plan, optional): Says what is missing.
    """
    wanted = plan.tasks if plan else {}
    return [
        _task(name, [r for r in rows if r['task'] == name], wanted.get(name))
        for name in dict.fromkeys([*wanted, *(r['task'] for r in rows)])
    ]
