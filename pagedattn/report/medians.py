"""How sure a median is, and how sure the ratio of two: the bootstrap, without resampling.

The k-th smallest of n values drawn with replacement from a sample is the sample's value at rank
``ceil(n * U)``, where U is the k-th smallest of n uniform numbers and so has a Beta(k, n - k + 1)
distribution. Medians of resamples can therefore be drawn directly (Efron 1979 for the bootstrap;
David and Nagaraja, Order Statistics, §2.1 for the distribution).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

DRAWS = 2000
LEVEL = 0.95
FEWEST = 5
_NORMAL_IQR = 1.349
_MEDIAN_SE = 1.2533
_HEAPS = 0.8  # of the quartiles' distance; a normal sample of 30 has a skew of 0.25 or so
_LEAST = 1e-9  # a microsecond's billionth: ratios of zeros mean nothing


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and the bounds that hold the true one in 95 % of cases."""

    value: float
    low: float
    high: float


def median_draws(sample: NDArray[np.float64], stream: int) -> NDArray[np.float64]:
    """Draw the medians of resamples: float64 [DRAWS].

    Args:
        sample: float64 [num_values], at least 1.
        stream: names the draws: the same number gives the same, others independent ones.

    """
    ordered = np.sort(sample)
    lower, upper = _ranks(sample.size, stream)
    medians = (ordered[lower] + ordered[upper]) / 2
    return np.asarray(np.maximum(medians, _LEAST))


@lru_cache(maxsize=1000)
def _ranks(count: int, stream: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ranks, from 0, of the two middle values of resamples; the same one twice for odd counts."""
    rng = np.random.default_rng((count, stream))
    lower = (count + 1) // 2
    first = rng.beta(lower, count - lower + 1, DRAWS)
    if count % 2:
        return _rank(first, count), _rank(first, count)
    # the next order statistic, given this one: the least of count - lower uniform numbers above
    step = 1.0 - rng.random(DRAWS) ** (1.0 / (count - lower))
    return _rank(first, count), _rank(first + (1.0 - first) * step, count)


def _rank(uniform: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    return np.clip(np.ceil(uniform * count).astype(np.int64) - 1, 0, count - 1)


def median_draws_of_quartiles(
    q1: float, median: float, q3: float, rounds: int, stream: int
) -> NDArray[np.float64]:
    """Draw medians where only quartiles were kept, as if the values were normal: float64 [DRAWS].

    The standard error of a normal sample's median is 1.2533 standard deviations over the root of
    its size, and its quartiles lie 1.349 deviations apart. As few rounds give quartiles that are
    unsure themselves, draws are Student's with half as many degrees of freedom. A median that lies
    beside a quartile is one of two heaps of values, and may be in either: then the draws reach the
    other quartile.
    """
    width = q3 - q1
    error = _MEDIAN_SE * width / _NORMAL_IQR / np.sqrt(rounds)
    if abs(q1 + q3 - 2 * median) > _HEAPS * width:
        error = max(error, width / 1.9)
    return np.asarray(np.maximum(median + error * _students(rounds, stream), _LEAST))


@lru_cache(maxsize=1000)
def _students(rounds: int, stream: int) -> NDArray[np.float64]:
    freedom = max(1.0, (rounds - 1) / 2)
    return np.random.default_rng((rounds, stream)).standard_t(freedom, DRAWS)


def interval(draws: NDArray[np.float64], value: float) -> Interval:
    """The percentile interval of draws around a value."""
    tail = (1 - LEVEL) / 2
    ends = [round(share * (draws.size - 1)) for share in (tail, 1 - tail)]
    low, high = np.partition(draws, ends)[ends].tolist()
    return Interval(value, min(low, value), max(high, value))
