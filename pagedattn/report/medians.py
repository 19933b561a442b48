"""How sure a median is, and how sure the ratio of two: the bootstrap, without resampling.

The k-th smallest of n values drawn with replacement from a sample is the sample's value at rank
``ceil(n * U)``, where U is the k-th smallest of n uniform numbers and so has a Beta(k, n - k + 1)
distribution. Medians of resamples can therefore be drawn directly (Efron 1979 for the bootstrap;
David and Nagaraja, Order Statistics, §2.1 for the distribution).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

DRAWS = 2000
LEVEL = 0.95
FEWEST = 5
_NORMAL_IQR = 1.349
_MEDIAN_SE = 1.2533
_LEAST = 1e-9  # a microsecond's billionth: ratios of zeros mean nothing


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and the bounds that hold the true one in 95 % of cases."""

    value: float
    low: float
    high: float


def median_draws(sample: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw the medians of resamples: float64 [DRAWS].

    Args:
        sample: float64 [num_values], at least 1.
        rng: of the draws.

    """
    ordered, count = np.sort(sample), sample.size
    lower = (count + 1) // 2
    first = rng.beta(lower, count - lower + 1, DRAWS)
    medians = ordered[_rank(first, count)]
    if count % 2 == 0:
        # the next order statistic, given this one: the least of count - lower uniform numbers above
        step = 1.0 - rng.random(DRAWS) ** (1.0 / (count - lower))
        medians = (medians + ordered[_rank(first + (1.0 - first) * step, count)]) / 2
    return np.asarray(np.maximum(medians, _LEAST))


def _rank(uniform: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    return np.clip(np.ceil(uniform * count).astype(np.int64) - 1, 0, count - 1)


def median_draws_of_quartiles(
    q1: float, median: float, q3: float, rounds: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Draw medians where only quartiles were kept, as if the values were normal: float64 [DRAWS].

    The standard error of a normal sample's median is 1.2533 standard deviations over the root of
    its size, and its quartiles lie 1.349 deviations apart.
    """
    error = _MEDIAN_SE * (q3 - q1) / _NORMAL_IQR / np.sqrt(rounds)
    return np.asarray(np.maximum(median + error * rng.standard_normal(DRAWS), _LEAST))


def interval(draws: NDArray[np.float64], value: float) -> Interval:
    """The percentile interval of draws around a value."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(draws, (tail, 1 - tail)).tolist()
    return Interval(value, min(low, value), max(high, value))
