"""Length distributions: sampling inverts the table, and the fitted one has the published mean."""

import numpy as np
import pytest

from pagedattn.workloads import AZURE_CONVERSATION, LengthDistribution


@pytest.mark.parametrize(
    ("part", "mean", "median", "maximum"),
    [("prompt", 1154.7, 1020, 14050), ("output", 211.1, 129, 1000)],
)
def test_the_fitted_azure_lengths_have_the_published_moments(part, mean, median, maximum):
    distribution = getattr(AZURE_CONVERSATION, part)
    assert distribution.mean == pytest.approx(mean, rel=0.01)
    assert distribution.median == median
    assert distribution.maximum == maximum
    assert len(distribution.quantiles) <= 33


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sampled_azure_lengths_come_within_three_percent(seed):
    prompt, output = AZURE_CONVERSATION.sample(np.random.default_rng(seed), 20_000)
    assert np.mean(prompt) == pytest.approx(1154.7, rel=0.03)
    assert np.median(prompt) == pytest.approx(1020, rel=0.03)
    assert np.mean(output) == pytest.approx(211.1, rel=0.03)
    assert np.median(output) == pytest.approx(129, rel=0.03)
    assert prompt.min() >= 1
    assert prompt.max() <= 14050
    assert output.max() <= 1000
    assert abs(np.corrcoef(prompt, output)[0, 1]) < 0.03


def test_the_same_seed_gives_the_same_lengths():
    first, again, other = (
        AZURE_CONVERSATION.prompt.sample(np.random.default_rng(seed), 50) for seed in (3, 3, 4)
    )
    assert first.tolist() == again.tolist() != other.tolist()


def test_lengths_are_integers_of_one_or_more():
    lengths = LengthDistribution(((0.0, 1), (1.0, 1.2))).sample(np.random.default_rng(0), 100)
    assert lengths.dtype == np.int64
    assert set(lengths.tolist()) == {1}


def test_lengths_are_rounded_to_the_nearest():
    distribution = LengthDistribution(((0.0, 2.7), (1.0, 2.7)))
    assert set(distribution.sample(np.random.default_rng(0), 10).tolist()) == {3}


def test_sampling_inverts_the_table():
    distribution = LengthDistribution(((0.0, 1), (0.25, 101), (1.0, 1001)))
    lengths = distribution.sample(np.random.default_rng(0), 40_000)
    for probability in (0.1, 0.25, 0.5, 0.9):
        share = np.mean(lengths <= distribution.quantile(probability))
        assert share == pytest.approx(probability, abs=0.01)
    assert np.mean(lengths) == pytest.approx(distribution.mean, rel=0.01)


def test_the_mean_is_the_area_under_the_quantiles():
    assert LengthDistribution(((0.0, 10), (0.5, 20), (1.0, 100))).mean == 7.5 + 30


def test_no_requests_have_no_lengths():
    assert AZURE_CONVERSATION.output.sample(np.random.default_rng(0), 0).shape == (0,)
    with pytest.raises(ValueError, match="num_requests must be 0 or more, not -1"):
        AZURE_CONVERSATION.output.sample(np.random.default_rng(0), -1)


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_a_quantile_outside_zero_to_one_is_refused(probability):
    with pytest.raises(ValueError, match="probability must be between 0 and 1"):
        AZURE_CONVERSATION.output.quantile(probability)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ((), "two or more points"),
        (((0.0, 1),), "two or more points"),
        (((0.1, 1), (1.0, 2)), "rise from 0 to 1"),
        (((0.0, 1), (0.9, 2)), "rise from 0 to 1"),
        (((0.0, 1), (0.5, 2), (0.5, 3), (1.0, 4)), "rise from 0 to 1"),
        (((0.0, 0), (1.0, 2)), "1 or more"),
        (((0.0, 5), (1.0, 2)), "never fall"),
        (((0.0, 1), (1.0, float("inf"))), "finite"),
        (((0.0, 1), (1.0, float("nan"))), "finite"),
    ],
    ids=repr,
)
def test_a_table_that_is_no_distribution_is_refused(table, message):
    with pytest.raises(ValueError, match=message):
        LengthDistribution(table)
