"""Which cells come when."""
import itertools

import pytest

from mmpeft.bench.cells import chosen, doomed, final_cells, next_cells
from mmpeft.bench.climb import climb
from mmpeft.bench.plan import Plan, Task

METHODS = dict(Full='Full', Frozen='Frozen', Mona='Mona:dim=4')


def task(**values):
    return Task(
        **{
            **dict(
                name='seg',
                config='c.py',
                metric='mIoU',
                methods=METHODS,
                seeds=(0, 1),
                lrs=(1., 2., 4., 8.)),
            **values
        })


def run_all(plan, score, rows=None):
    """Every cell of a plan by the score of each, None for a failure."""
    rows, order = rows if rows is not None else {}, []
    while cells := next_cells(plan, rows):
        for cell in cells:
            metric = score(cell)
            order.append(cell)
            rows[cell.name] = dict(
                status='failed' if metric is None else 'done',
                metric=metric,
                reason='why',
                exit_status=0)
    return rows, order


@pytest.mark.parametrize('best, tried', [(0, [1, 2, 0]), (1, [1, 2, 0]),
                                         (2, [1, 2, 3]), (3, [1, 2, 3])])
def test_a_grid_is_climbed_from_its_middle(best, tried):
    rows, order = run_all(
        Plan('p', dict(seg=task(methods=dict(Full='Full')))),
        lambda c: -abs(c.lr - 2.**best))
    tune = [c.lr for c in order if c.phase == 'tune']
    assert tune == [2.**i for i in tried]
    assert [c.lr for c in order if c.phase == 'final'] == [2.**best] * 2


def test_every_rate_may_be_tried():
    rows, order = run_all(
        Plan('p', dict(seg=task(rule='all'))), lambda c: c.lr)
    assert sum(c.phase == 'tune' for c in order) == 4 * len(METHODS)


def test_no_rate_to_choose():
    for lrs, rate in (((), None), ((.5, ), .5)):
        order = run_all(Plan('p', dict(seg=task(lrs=lrs))), lambda c: 1.)[1]
        assert {c.phase for c in order} == {'final'}
        assert {c.lr for c in order} == {rate}
        # Seed by seed, so that a table is there early.
        assert [c.seed for c in order] == [0, 0, 0, 1, 1, 1]


def test_a_tie_goes_to_the_smaller_rate():
    rows = run_all(Plan('p', dict(seg=task())), lambda c: 7.)[0]
    assert chosen(task(), 'Mona', rows).lr == 1.


def test_frozen_chooses_the_rate_of_the_head():
    own = task(head_lrs=(1., 10.), lrs=(1., 2.))
    plan = Plan('p', dict(seg=own))
    assert {(c.method, c.head_lr)
            for c in next_cells(plan, {})} == {('Frozen', 1.), ('Frozen', 10.)}
    order = run_all(plan, lambda c: c.head_lr)[1]
    final = [c for c in order if c.phase == 'final']
    assert {c.head_lr for c in final} == {10.}
    assert len({c.method for c in final}) == 3


def test_failures():
    own = task()
    plan = Plan('p', dict(seg=own))
    # A rate that diverges counts as tried, and the walk goes on.
    rows, order = run_all(plan, lambda c: None if c.lr > 1 else 5.)
    assert chosen(own, 'Full', rows).lr == 1.
    assert doomed(own, 'Full', rows) is None
    # All of them: the final cells have the reason and are not run.
    rows, order = run_all(plan, lambda c: None if c.method == 'Mona' else 5.)
    assert not [c for c in order if (c.method, c.phase) == ('Mona', 'final')]
    assert doomed(own, 'Mona', rows) == 'why'
    assert [c.lr for c in final_cells(own, 'Mona', rows)] == [None, None]


def test_a_refused_method_is_asked_once():
    own = task()
    first = next(
        c for c in next_cells(Plan('p', dict(seg=own)), {})
        if c.method == 'Mona')
    rows = {
        first.name:
        dict(status='failed', metric=None, reason='no grid', exit_status=2)
    }
    assert 'Mona' not in {
        c.method
        for c in next_cells(Plan('p', dict(seg=own)), rows)
    }
    assert doomed(own, 'Mona', rows) == 'no grid'


def test_the_walk_ends_for_any_scores():
    """Whatever comes out, the best that was tried is found."""
    for scores in itertools.product([None, 1., 2.], repeat=5):
        known = {}
        for _ in range(6):
            missing, order = climb(5, known)
            if not missing:
                break
            known.update({i: scores[i] for i in missing})
        assert not missing
        done = [s for s in known.values() if s is not None]
        assert bool(order) == bool(done)
        assert not order or scores[order[0]] == max(done)


def test_names_are_folders():
    names = {
        c.name
        for c in next_cells(
            Plan('p', dict(seg=task(
                methods={'LoRA, r=4/+x': 'LoRA:rank=4'}))), {})
    }
    assert names == {
        'seg_LoRA-r-4-x_tune_lr2_seed100', 'seg_LoRA-r-4-x_tune_lr4_seed100'
    }


def test_what_no_rate_changes_is_tried_with_all():
    """A rate that is as good as the best is an end that is not yet known."""
    scores = {}
    while missing := climb(5, scores)[0]:
        scores.update(dict.fromkeys(missing, 39.23))
    assert set(scores) == set(range(5))
    assert climb(5, scores) == ([], [0, 1, 2, 3, 4])
