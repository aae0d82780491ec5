"""Ranks, their correlations, and bootstrap intervals."""
import itertools
import math

import numpy as np
import pytest

from mmpeft.bench.bootstrap import mean_interval, place_intervals
from mmpeft.bench.ranks import agreement, kendall, places, spearman

A = [3., 1., 4., 1., 5., 9., 2., 6.]
B = [2., 7., 1., 8., 2., 8., 1., 8.]


def test_places():
    assert places([10, 30, 20, 30]).tolist() == [4, 1, 3, 1]
    assert places([[1, 2], [2, 1]]).tolist() == [[2, 1], [1, 2]]


def test_same_and_opposite_order():
    down = list(range(6))[::-1]
    assert spearman(range(6), range(6)) == pytest.approx(1)
    assert kendall(range(6), [x**3 for x in range(6)]) == pytest.approx(1)
    assert spearman(range(6), down) == pytest.approx(-1)
    assert kendall(range(6), down) == pytest.approx(-1)


def test_as_scipy_has_it():
    stats = pytest.importorskip('scipy.stats')
    assert spearman(A, B) == pytest.approx(stats.spearmanr(A, B)[0])
    assert kendall(A, B) == pytest.approx(stats.kendalltau(A, B)[0])


def test_by_hand():
    """One pair of three is in another order."""
    assert kendall([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    assert spearman([1, 2, 3], [1, 3, 2]) == pytest.approx(.5)


def test_share_of_orders_as_good():
    """All of them where they are few: of 4! orders, two agree so well."""
    found = agreement([1, 2, 3, 4], [10, 20, 30, 40])
    assert found.count == 4
    assert found.spearman_p == found.kendall_p == pytest.approx(2 / 24)
    # by enumeration, independent of the vectorised one
    values = [2., 1., 4., 3., 5.]
    rho = spearman(range(5), values)
    as_good = [
        abs(spearman(range(5), order)) >= abs(rho) - 1e-9
        for order in itertools.permutations(values)
    ]
    assert agreement(range(5), values).spearman_p == pytest.approx(
        sum(as_good) / math.factorial(5))


def test_drawn_orders_are_seeded():
    found = agreement(A, B)
    assert found == agreement(A, B)
    assert found.spearman_p == pytest.approx(
        agreement(A, B, seed=1).spearman_p, abs=.03)


def test_too_little_to_compare():
    assert agreement([1, 2], [2, 1]) is None
    assert agreement([1, 1, 1], [1, 2, 3]) is None
    with pytest.raises(ValueError, match='3 values .* with 2'):
        agreement([1, 2, 3], [1, 2])


def test_mean_interval():
    assert mean_interval([40.]) is None
    low, high = mean_interval([40., 41., 43.])
    assert (low, high) == mean_interval([40., 41., 43.])
    assert 40 <= low < 124 / 3 < high <= 43
    # many values: as the normal distribution has it
    values = np.random.default_rng(0).normal(50, 2, 400)
    low, high = mean_interval(list(values))
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert high - values.mean() == pytest.approx(half, rel=.1)
    assert values.mean() - low == pytest.approx(half, rel=.1)


@pytest.mark.parametrize('count,share', [(2, .5), (3, .75), (5, .84),
                                         (10, .89)])
def test_coverage(count, share):
    """What docs/en/bench_report.md says of few seeds."""
    rng = np.random.default_rng(count)
    held = 0
    for _ in range(400):
        low, high = mean_interval(rng.normal(size=count))
        held += low <= 0 <= high
    assert held / 400 == pytest.approx(share, abs=.06)


def test_place_intervals():
    found = place_intervals(
        dict(first=[9., 9.1, 9.2], a=[1., 3., 2.], b=[2., 1., 3.]))
    assert found['first'] == (1, 1)
    assert found['a'] == found['b'] == (2, 3)
    assert set(place_intervals(dict(a=[1.], b=[2.])).values()) == {None}
