"""The statistics that benchmarks report, against values worked out by hand."""

from __future__ import annotations

import itertools

import numpy as np

from benchmarks.statistics import interquartile_mean, interval


def test_interquartile_mean_by_hand():
    """A quarter of the runs is dropped on each side, rounded down to whole runs."""
    assert interquartile_mean(np.array([0.0, 1.0, 2.0, 100.0])) == 1.5
    assert interquartile_mean(np.array([5.0, 1.0, 3.0])) == 3.0  # a quarter of three runs rounds down to none
    assert interquartile_mean(np.array([-9.0, 1.0, 2.0, 6.0, 50.0])) == 3.0


def test_interval_equals_all_resamples():
    """With two runs in each of two tasks, all resamples can be listed; the interval has their quantiles."""
    groups = [[0.0, 1.0], [10.0, 30.0]]
    means = [
        interquartile_mean(np.array([*first, *second]))
        for first in itertools.product(groups[0], repeat=2)
        for second in itertools.product(groups[1], repeat=2)
    ]
    # 5, 5.5, 15 and 15.5 in 3, 9, 1 and 3 of 16 resamples: quantiles far from a jump are exact
    assert sorted(means) == [5.0] * 3 + [5.5] * 9 + [15.0] + [15.5] * 3
    assert interval(groups, level=0.9) == (5.0, 15.5)
    assert interval(groups, level=0.3) == (5.5, 5.5)


def test_interval_of_equal_runs_is_a_point():
    """Equal runs give an interval of width 0; the same seed gives the same interval."""
    assert interval([[500.0] * 5]) == (500.0, 500.0)
    assert interval([[1.0, 2.0, 4.0]], seed=3) == interval([[1.0, 2.0, 4.0]], seed=3)
