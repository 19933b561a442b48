"""Medians of resamples are drawn as resampling would draw them."""

import numpy as np
import pytest

from pagedattn.report.medians import interval, median_draws, median_draws_of_quartiles


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
