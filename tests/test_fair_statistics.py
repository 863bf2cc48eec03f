"""The statistics of benchmarks/fair.py, beside brute force."""

import itertools
import math
import random
from statistics import fmean

import pytest

from benchmarks.fair_statistics import bootstrap_difference, front, holm, hypervolume, probability_of_improvement


def test_the_interval_of_a_clear_difference_excludes_none_and_holds_it():
    found = bootstrap_difference([0.80, 0.82, 0.79, 0.81, 0.83], [0.50, 0.52, 0.49, 0.51, 0.53])
    assert found.mean == pytest.approx(0.3)
    assert 0 < found.low < 0.3 < found.high
    assert found.p < 0.005


def test_the_interval_is_that_of_all_resamples():
    ours, theirs = [0.1, 0.4, 0.2], [0.3, 0.35, 0.1]
    d = fmean(ours) - fmean(theirs)

    def of(x, y):
        spread = sum(sum((a - fmean(arm)) ** 2 for a in arm) / 2 / 3 for arm in (x, y)) ** 0.5
        return fmean(x) - fmean(y), spread

    t = []
    for x, y in itertools.product(itertools.product(ours, repeat=3), itertools.product(theirs, repeat=3)):
        mean, se = of(x, y)
        t.append(abs(mean - d) / se if se > 1e-12 else float("inf"))
    p = sum(value >= abs(d) / of(ours, theirs)[1] for value in t) / len(t)
    # 10,000 draws of 729 resamples: p has a standard error of .005.
    assert bootstrap_difference(ours, theirs).p == pytest.approx(p, abs=0.02)


def test_of_two_arms_alike_the_interval_holds_0_nearly_always():
    generator = random.Random(0)

    def arm():
        return [generator.gauss(0, 1) for _ in range(5)]

    held = [bootstrap_difference(arm(), arm()) for _ in range(60)]
    assert sum(found.low <= 0 <= found.high for found in held) >= 56  # .95 of 60 is 57; the percentile's .89 gives 53
    assert all((found.p < 0.05) == (not found.low <= 0 <= found.high) for found in held if abs(found.p - 0.05) > 1e-3)


def test_where_no_seed_differs_the_difference_is_known():
    assert bootstrap_difference([1.0, 1.0], [0.0, 0.0]).low == 1.0
    assert bootstrap_difference([0.0, 0.0], [0.0, 0.0]).p == 1.0


def test_seeds_that_hardly_differ_have_an_interval_without_ends():
    """A third of the resamples draws equal seeds alone: of the unbounded ones there are more than 5 %."""
    found = bootstrap_difference([0.0, 0.0, 0.0, 0.0, 1.0], [0.0] * 5)
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert found.p > 0.05


def test_one_seed_has_no_interval():
    with pytest.raises(ValueError, match="at least 2 seeds"):
        bootstrap_difference([1.0], [0.0, 0.0])


def test_holm_by_hand():
    # 3 x .01; then 2 x .02 = .04; then max(.04, 1 x .03).
    assert holm({"b": 0.02, "a": 0.01, "c": 0.03}) == pytest.approx({"b": 0.04, "a": 0.03, "c": 0.04})
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}


def test_the_probability_of_improvement_counts_a_tie_as_half():
    # (2 > 1), (2 = 2), (3 > 1), (3 > 2)
    assert probability_of_improvement([2, 3], [1, 2]) == 3.5 / 4


def test_the_front_and_its_hypervolume_by_hand():
    points = [(0.2, 0.9), (0.5, 0.5), (0.4, 0.4), (0.9, 0.1), (0.5, 0.3)]
    assert front(points) == [(0.2, 0.9), (0.5, 0.5), (0.9, 0.1)]
    assert hypervolume(points) == pytest.approx(0.2 * 0.9 + 0.3 * 0.5 + 0.4 * 0.1)
    assert hypervolume([(0.0, 1.0), (1.0, 0.0)]) == 0.0


def test_the_hypervolume_is_the_share_of_a_grid_below_some_point():
    generator = random.Random(1)
    grid = [((i + 0.5) / 60, (j + 0.5) / 60) for i in range(60) for j in range(60)]
    for _ in range(5):
        points = [(generator.randint(0, 60) / 60, generator.randint(0, 60) / 60) for _ in range(6)]
        below = sum(any(x <= a and y <= b for a, b in points) for x, y in grid)
        assert hypervolume(points) == pytest.approx(below / len(grid))
