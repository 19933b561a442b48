"""Medians of resamples are drawn as resampling would draw them."""

import numpy as np
import pytest

from pagedattn.report.medians import interval, median_draws, median_draws_of_quartiles
from pagedattn.report.noise import scatter_between_runs, serial_widening


@pytest.mark.parametrize("count", [1, 2, 5, 8, 30, 31])
def test_draws_are_distributed_as_medians_of_resamples(count):
    rng = np.random.default_rng(count)
    sample = rng.lognormal(size=count)
    drawn = np.sort(np.concatenate([median_draws(sample, stream) for stream in range(20)]))
    resampled = np.sort(np.median(rng.choice(sample, (drawn.size, count)), axis=1))
    # the largest distance of the two distributions (Kolmogorov and Smirnov), at 40,000 draws each
    points = np.concatenate([drawn, resampled])
    shares = [np.searchsorted(s, points, side="right") / s.size for s in (drawn, resampled)]
    assert np.abs(shares[0] - shares[1]).max() < 0.015


def test_the_interval_covers_the_true_median_as_often_as_it_says():
    rng = np.random.default_rng(7)
    covered = 0
    for stream in range(400):
        sample = rng.normal(10.0, 1.0, 30)
        found = interval(median_draws(sample, stream), float(np.median(sample)))
        covered += found.low <= 10.0 <= found.high
    assert 0.90 < covered / 400 < 0.99


def test_quartiles_alone_give_about_the_same_interval_for_a_normal_sample():
    rng = np.random.default_rng(3)
    sample = rng.normal(100.0, 5.0, 200)
    whole = interval(median_draws(sample, 0), float(np.median(sample)))
    q1, median, q3 = np.percentile(sample, (25, 50, 75)).tolist()
    less = interval(median_draws_of_quartiles(q1, median, q3, 200, 1), median)
    assert (less.high - less.low) == pytest.approx(whole.high - whole.low, rel=0.4)


def test_an_interval_holds_its_value():
    found = interval(np.linspace(2.0, 3.0, 100), 1.0)
    assert found.low == 1.0
    assert found.high > 2.9


def test_neighbours_that_are_alike_widen_and_independent_or_sorted_rounds_do_not():
    rng = np.random.default_rng(0)
    independent = rng.lognormal(size=(500, 30))
    factors = [serial_widening(sample) for sample in independent]
    assert np.mean(np.array(factors) > 1) < 0.05
    alike = np.empty(2000)
    alike[0] = 0
    for i in range(1, alike.size):
        alike[i] = 0.6 * alike[i - 1] + rng.normal()
    # (1 + 0.6) / (1 - 0.6) = 4
    assert serial_widening(alike) == pytest.approx(2.0, rel=0.1)
    assert serial_widening(np.sort(alike)) == serial_widening(np.sort(alike)[::-1]) == 1.0
    assert serial_widening(np.ones(30)) == 1.0


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4])
def test_scatter_between_runs_is_found_beside_rows_that_changed(share):
    rng = np.random.default_rng(1)
    logs = rng.normal(0, 0.02, 400) + np.where(np.arange(400) < share * 400, 0.5, 0.0)
    errors = np.full(400, 0.01)
    expected = np.sqrt(0.02**2 - 0.01**2)
    # half of all rows are a larger part of those that did not change, and reach further
    assert 0.8 < scatter_between_runs(logs, errors, 1.0) / expected < 1.2 + 3 * share
    assert scatter_between_runs(logs, errors, 0.005) == 0.005
    assert scatter_between_runs(logs, np.full(400, 0.2), 1.0) == 0.0
    assert scatter_between_runs(logs[:9], errors[:9], 1.0) == 0.0


@pytest.mark.parametrize("median", [1.0, 1.08])
def test_a_median_in_one_of_two_heaps_may_be_in_the_other(median):
    found = interval(median_draws_of_quartiles(1.0, median, 1.08, 1000, 0), median)
    assert found.low <= 1.0
    assert found.high >= 1.08
    middle = interval(median_draws_of_quartiles(1.0, 1.04, 1.08, 1000, 0), 1.04)
    assert 1.03 < middle.low < middle.high < 1.05
