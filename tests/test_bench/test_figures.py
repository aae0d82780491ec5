"""What is drawn: every method has its place and a name that can be read."""
import itertools

import pytest

from mmpeft.bench.compare import reference
from mmpeft.bench.labels import Box, add_labels
from mmpeft.bench.rank_plots import _seats, ppt_bars, rank_flow
from mmpeft.bench.scatter_plots import (_log_axis, _sort, against_memory,
                                        against_parameters)
from mmpeft.bench.summary import MethodSummary, summarise
from .rows import cell, some_rows

pytest.importorskip('matplotlib')


def axes():
    from matplotlib.figure import Figure
    return Figure(figsize=(7, 4.5)).add_subplot()


def extent(annotation):
    """Of the name, without the line to its point."""
    from matplotlib.text import Text
    return Box(*Text.get_window_extent(annotation).extents)


def test_names_do_not_cover_each_other():
    """Twenty points in a heap."""
    plot = axes()
    points = [(1 + .1 * (i % 5), 2 + .07 * (i * 7 % 20)) for i in range(20)]
    names = [f'Method{i}' for i in range(20)]
    plot.plot(*zip(*points), 'o')
    plot.set(xlim=(0, 3), ylim=(0, 5))
    add_labels(plot, points, names, [.05] * 20, lines=[2.5])
    assert [t.get_text() for t in plot.texts] == names
    plot.figure.draw_without_rendering()
    boxes = [extent(text) for text in plot.texts]
    frame = plot.get_window_extent()
    for box in boxes:
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1
    for first, second in itertools.combinations(boxes, 2):
        height = first.y1 - first.y0
        assert first.shared(second) < .15 * height**2


def test_lonely_name_is_beside_its_point():
    plot = axes()
    plot.set(xlim=(0, 2), ylim=(0, 2))
    add_labels(plot, [(1, 1)], ['Mona'], [0.])
    x, y = plot.transData.transform((1, 1))
    plot.figure.draw_without_rendering()
    box = extent(plot.texts[0])
    assert box.center[1] == pytest.approx(y, abs=2)
    assert 0 < box.x0 - x < 15


def test_zero_has_a_place_on_the_logarithmic_axis():
    plot = axes()
    xs = _log_axis(plot, [0., .1, 2.])
    assert 0 < xs[0] < xs[1] == .1 and xs[2] == 2.
    left, right = plot.get_xlim()
    assert left < xs[0] and right > 2.
    assert min(plot.get_xticks()) == pytest.approx(.1)
    assert _log_axis(axes(), [.1, 2.]) == [.1, 2.]


def test_marks_by_sort():
    kinds = dict(Full='baseline', BitFit='stock', LoRA='module', LST='side')
    for kind, sort in kinds.items():
        assert _sort(MethodSummary(kind, kind)) == sort
    assert _sort(MethodSummary('own', '')) == 'module'


def test_ties_sit_apart():
    assert _seats([1, 1, 3], [2, 1, 3]) == [2, 1, 3]


def test_pictures():
    task, = summarise(some_rows())
    figures = [
        against_parameters(task),
        against_memory(task),
        ppt_bars(task),
        rank_flow(task, reference(task))
    ]
    assert len({f.file for f in figures}) == 4
    for figure in figures:
        assert figure.png.startswith(b'\x89PNG') and figure.caption
    assert 'ade20k, mIoU, Swin-L' in figures[-1].caption


def test_no_picture_without_numbers():
    task, = summarise([
        cell('Own', 1., metric_name='F1', saved_bytes=None),
        cell('Other', 2., metric_name='F1', saved_bytes=None)
    ])
    assert against_memory(task) is None
    assert reference(task) is None and rank_flow(task, None) is None
    frozen, = summarise([cell('Frozen', 1.)])
    assert against_parameters(frozen) is None
