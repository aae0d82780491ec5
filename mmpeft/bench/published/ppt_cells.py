"""Which printed PPT cells the formula gives, and what is known of the rest."""
import math
from decimal import ROUND_HALF_UP, Decimal
from typing import Dict, List, NamedTuple, Tuple

from ...counting import ppt_factor
from ..markdown import table
from .load import read_published

__all__ = ['PPTCell', 'ppt_cells', 'render_cells']

# Trainable parameters of the backbone by our count, in millions, of methods
# whose cells are different (the formulas are in tests/test_counts_vit.py,
# test_counts_windows.py and, for GPS and DTL, in their papers).
COUNTED = dict(BitFit=.103, RepAdapter=.240, DTL=.037, GPS=.167, Partial=28.34)
# Parameters of a linear head on the 768 channels of ViT-B/16, in millions:
# the mean over the data sets of the suite, by their numbers of classes.
_CLASSES = {
    'fgvc': (200, 555, 102, 120, 196),
    'vtab-1k':
    (100, 102, 47, 102, 37, 10, 397, 2, 10, 45, 5, 8, 6, 6, 4, 16, 16, 18, 9),
}
HEADS = {
    suite: sum(classes) * 769 / len(classes) / 1e6
    for suite, classes in _CLASSES.items()
}
Range = Tuple[float, float]


class PPTCell(NamedTuple):
    """A printed PPT beside the formula.

    ``verdict`` is 'equal' (the printed numbers give it), 'rounding' (numbers
    that are printed so give it) or 'different'. ``needed`` are the
    parameters, in millions, with which the printed metric gives it.
    """
    row: Dict[str, str]
    computed: float
    verdict: str
    needed: Range
    reason: str


def _printed_range(text: str) -> Range:
    """What rounds to ``text``."""
    printed = Decimal(text)
    half = Decimal((0, (5, ), printed.as_tuple().exponent - 1))
    return float(printed - half), float(printed + half)


def _ppt(value: float, params_m: float) -> float:
    return value / 100 * ppt_factor(params_m * 1e6)


def _inverse(value: float, ppt: float) -> float:
    """Millions of parameters at which ``value`` has this PPT."""
    return 10 * (10**-math.log(ppt / (value / 100)) - 1)


def _cell(row: Dict[str, str]) -> PPTCell:
    value, params = float(row['value']), float(row['params_m'])
    exact = Decimal(row['value']) / 100 * Decimal(ppt_factor(params * 1e6))
    printed = Decimal(row['ppt'])
    low, high = _printed_range(row['ppt'])
    needed = (max(_inverse(value, high), 0.), max(_inverse(value, low), 0.))
    if exact.quantize(printed, ROUND_HALF_UP) == printed:
        return PPTCell(row, float(exact), 'equal', needed, '')
    values = _printed_range(row['value'])
    millions = _printed_range(row['params_m'])
    least = _ppt(values[0], millions[1])
    most = _ppt(values[1], max(millions[0], 0.))
    if most >= low and least < high:
        return PPTCell(row, float(exact), 'rounding', needed,
                       'the metric or the parameters were rounded for print')
    return PPTCell(row, float(exact), 'different', needed,
                   _reason(row, needed))


def _reason(row: Dict[str, str], needed: Range) -> str:
    counted, head = COUNTED.get(row['method']), HEADS.get(row['task'], 0.)
    if counted is None:
        return 'not found'
    if needed[0] <= counted <= needed[1]:
        return f'fits {counted:.3f} M, our count'
    if head and needed[0] <= counted + head <= needed[1]:
        return (f'fits {counted + head:.3f} M: our count of {counted:.3f} M '
                f'and a mean head of {head:.3f} M')
    others = f' or {counted + head:.3f} M with a head' if head else ''
    return f'not found; our count, {counted:.3f} M{others}, does not fit'


def ppt_cells() -> List[PPTCell]:
    """Every printed PPT cell, in the order of the tables."""
    return [_cell(row) for row in read_published() if row['ppt']]


def _span(needed: Range) -> str:
    if needed[0] == 0:
        return f'at most {needed[1]:.3f}'
    return f'{needed[0]:.3f} to {needed[1]:.3f}'


def render_cells() -> str:
    """The counts and the cells that are not equal, as Markdown."""
    cells = ppt_cells()
    count = {
        verdict: sum(c.verdict == verdict for c in cells)
        for verdict in ('equal', 'rounding', 'different')
    }
    rows = [[
        c.row['task'], c.row['name'], c.row['metric'], c.row['value'],
        c.row['params_m'], c.row['ppt'], f'{c.computed:.4f}',
        f'{float(c.row["ppt"]) - c.computed:+.4f}',
        _span(c.needed), c.reason
    ] for c in cells if c.verdict != 'equal']
    head = [
        'Task', 'Method', 'Metric', 'Printed, %', 'Printed M', 'Printed PPT',
        'Formula', 'Difference', 'M that would fit', 'Reason'
    ]
    return (f'Of {len(cells)} printed PPT cells the formula gives '
            f'{count["equal"]}; {count["rounding"]} more agree within the '
            f'rounding of the printed numbers, {count["different"]} do not.'
            '\n\n' + table(head, rows))
