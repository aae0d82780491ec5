"""What rows say about methods, and about their order in print."""
import pytest

from mmpeft.bench.compare import compare, reference
from mmpeft.bench.published import read_published
from mmpeft.bench.summary import summarise
from mmpeft.counting import ppt_factor
from .rows import cell, some_plan, some_rows


def test_summary():
    task, = summarise(some_rows(), some_plan())
    assert [m.name for m in task.measured
            ] == ['Mona', 'Full', 'LoRA', 'BitFit', 'Frozen']
    mona, full = task.measured[:2]
    assert mona.scores == {0: 50.5, 1: 51.} and mona.missing == [2]
    assert full.score == pytest.approx(50.1)
    assert full.spread == pytest.approx(.6557, abs=1e-4)
    assert (mona.place, full.place) == (1, 2)
    assert full.ppt == pytest.approx(50.1 * ppt_factor(86_000_000))
    assert full.ppt_place == 5
    assert {
        m.name: m.missing
        for m in task.methods[5:]
    } == dict(
        Adapter=[0, 1, 2], SSF=[0, 1, 2])
    assert task.methods[-1].score is None and task.methods[-1].ppt is None


def test_ppt_by_the_formula_where_a_row_has_none():
    row = cell('LoRA', 50., ppt=None, ppt_with_head=None)
    method, = summarise([row])[0].methods
    assert method.ppt == 50. * ppt_factor(3_000_000)
    assert method.ppt_with_head == 50. * ppt_factor(4_000_000)
    row['backbone_trainable'] = None
    assert summarise([row])[0].methods[0].ppt is None


def test_methods_by_their_class():
    rows = [
        cell('low rank', 1., spec='LoRA:rank=4'),
        cell('LoRA', 2., spec='LoRA:rank=8'),
        cell('two', 3., spec='LoRA+BitFit'),
        cell('own', 4., spec='NobodyKnows')
    ]
    task, = summarise(rows)
    assert {
        m.name: m.kind
        for m in task.methods
    } == {
        'low rank': 'LoRA',
        'LoRA': 'LoRA',
        'two': '',
        'own': ''
    }
    assert task.find('LoRA').name == 'LoRA'


def test_order_of_the_print_agrees_with_it():
    """Rows with the printed numbers agree with their column, fully."""
    printed = [
        r for r in read_published()
        if r['task'] == 'coco' and r['metric'] == 'box AP' and r['ppt']
    ]
    rows = [
        cell(
            r['method'],
            float(r['value']),
            metric_name='coco/bbox_mAP',
            ppt=100 * float(r['ppt'])) for r in printed
        if not r['source'].startswith('mona')
    ]
    task, = summarise(rows)
    assert reference(task).title == 'coco, box AP, Swin-B'
    found, = (c for c in compare(task) if c.column == reference(task))
    assert len(found.methods) == 10
    assert found.by_score.spearman == pytest.approx(1)
    assert found.by_ppt.kendall == pytest.approx(1)
