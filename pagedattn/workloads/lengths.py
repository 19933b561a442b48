"""How long requests are: distributions to draw prompt and output lengths from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

_LOGNORMAL_POINTS = 400


@dataclass(frozen=True, slots=True)
class LengthDistribution:
    """A distribution of lengths in tokens, as a table of quantiles.

    ``quantiles`` holds points ``(probability, length)`` with rising probabilities, the first 0 and
    the last 1, and lengths that never fall, 1 or more; between two points the length is
    interpolated. Raises ``ValueError`` for any other table.

        >>> LengthDistribution(((0.0, 1.0), (1.0, 3.0))).median
        2.0
    """

    quantiles: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        table = np.array(self.quantiles, dtype=np.float64)
        if table.ndim != 2 or table.shape[0] < 2 or table.shape[1] != 2:
            raise ValueError(
                f"quantiles must be two or more points (probability, length), "
                f"not an array of shape {table.shape}."
            )
        probabilities, lengths = table.T
        rises = bool(np.all(np.diff(probabilities) > 0))
        if not (rises and probabilities[0] == 0 and probabilities[-1] == 1):
            raise ValueError(
                f"the probabilities must rise from 0 to 1, not {probabilities.tolist()}."
            )
        grows = bool(np.all(np.diff(lengths) >= 0))
        if not (grows and lengths[0] >= 1 and np.isfinite(lengths[-1])):
            raise ValueError(
                f"the lengths must be finite, 1 or more, and never fall, not {lengths.tolist()}."
            )

    @classmethod
    def lognormal(cls, mean: float, sigma: float, maximum: float) -> LengthDistribution:
        """A log-normal distribution, cut at 1 and at ``maximum`` tokens, with the given mean.

        ``sigma`` is the standard deviation of the logarithm. Raises ``ValueError`` for a mean that
        is not between 1 and ``maximum``, or a ``sigma`` that is not above 0.

            >>> round(LengthDistribution.lognormal(100, 0.8, 2048).mean, 6)
            100.0
        """
        if not 1 < mean < maximum or not 0 < sigma < math.inf:
            raise ValueError(
                f"the mean must be between 1 and {maximum:g} and sigma above 0, "
                f"not {mean:g} and {sigma:g}."
            )
        inner = (np.arange(_LOGNORMAL_POINTS) + 0.5) / _LOGNORMAL_POINTS
        probabilities = np.concatenate([[0.0], inner, [0.999, 0.9999, 1.0]])
        probabilities = np.unique(probabilities)
        ends = np.clip(probabilities, 1e-6, 1 - 1e-6)
        spread = np.exp(sigma * np.array([NormalDist().inv_cdf(p) for p in ends.tolist()]))
        low, high = 1e-9 * mean, 1e9 * mean
        while high / low > 1 + 1e-12:  # the mean rises with the median
            median = math.sqrt(low * high)
            lengths = np.clip(median * spread, 1.0, maximum)
            points = zip(probabilities.tolist(), lengths.tolist(), strict=True)
            distribution = cls(tuple(points))
            low, high = (median, high) if distribution.mean < mean else (low, median)
        return distribution

    @property
    def mean(self) -> float:
        """The mean length before rounding: the area under the quantile function."""
        probabilities, lengths = np.array(self.quantiles).T
        return float(np.sum(np.diff(probabilities) * (lengths[1:] + lengths[:-1]) / 2))

    @property
    def median(self) -> float:
        """The median length before rounding."""
        return self.quantile(0.5)

    @property
    def maximum(self) -> float:
        """The greatest length."""
        return self.quantiles[-1][1]

    def quantile(self, probability: float) -> float:
        """Return the length, before rounding, that a share ``probability`` of requests stays under.

        Raises ``ValueError`` unless ``probability`` is between 0 and 1.
        """
        if not 0 <= probability <= 1:
            raise ValueError(f"probability must be between 0 and 1, not {probability}.")
        return float(np.interp(probability, *np.array(self.quantiles).T))

    def sample(self, rng: np.random.Generator, num_requests: int) -> npt.NDArray[np.int64]:
        """Draw ``num_requests`` lengths, int64 ``[num_requests]``, by inverting the distribution.

        Takes ``num_requests`` numbers from ``rng``. Raises ``ValueError`` for a negative count.
        """
        if num_requests < 0:
            raise ValueError(f"num_requests must be 0 or more, not {num_requests}.")
        probabilities, lengths = np.array(self.quantiles).T
        drawn = np.interp(rng.random(num_requests), probabilities, lengths)
        return np.asarray(np.rint(drawn), dtype=np.int64)


@dataclass(frozen=True, slots=True)
class RequestLengths:
    """The lengths of requests: tokens in the prompt, and tokens generated, drawn independently."""

    name: str
    prompt: LengthDistribution
    output: LengthDistribution

    def sample(
        self, rng: np.random.Generator, num_requests: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Draw the prompts' and the outputs' lengths in tokens, each int64 ``[num_requests]``."""
        return self.prompt.sample(rng, num_requests), self.output.sample(rng, num_requests)


# fmt: off
# five points a line, not one
AZURE_CONVERSATION = RequestLengths(
    name="azure-conversation",
    prompt=LengthDistribution(
        (
            (0.0000, 2), (0.0275, 128), (0.0325, 167), (0.1325, 247), (0.1400, 317),
            (0.1450, 369), (0.3675, 422), (0.3875, 448), (0.3950, 530), (0.3975, 644),
            (0.4100, 863), (0.4300, 946), (0.5000, 1020), (0.7125, 1140), (0.8100, 1321),
            (0.8250, 1435), (0.8600, 2034), (0.8975, 2672), (0.9050, 2922), (0.9200, 4073),
            (0.9325, 4077), (0.9525, 4083), (0.9825, 4101), (0.9925, 4180), (0.9975, 5416),
            (0.9993, 6440), (0.9998, 7173), (1.0000, 14050),
        )
    ),
    output=LengthDistribution(
        (
            (0.0000, 7), (0.0350, 36), (0.0575, 44), (0.1525, 67), (0.2025, 78),
            (0.3950, 102), (0.4400, 110), (0.5000, 129), (0.5925, 170), (0.6475, 217),
            (0.6575, 228), (0.6700, 371), (0.6750, 373), (0.7000, 384), (0.7375, 394),
            (0.7750, 396), (0.8750, 416), (0.9250, 430), (0.9500, 451), (0.9650, 490),
            (0.9800, 540), (0.9925, 617), (0.9963, 663), (1.0000, 1000),
        )
    ),
)
# fmt: on
"""Conversations served by Azure in November 2023.

Quantile tables fitted to the 19,366 requests of AzureLLMInferenceTrace_conv.csv (Azure/
AzurePublicDataset, CC-BY-4.0), published with Splitwise (Patel et al., ISCA 2024): prompts with
mean 1154.7, median 1020 and maximum 14,050 tokens; outputs with mean 211.1, median 129 and maximum
1000. The tables lie 8.9 and 1.2 tokens from the trace on average over the quantiles. The trace's
two lengths hardly depend on each other (rank correlation 0.07), so they are drawn independently.
"""

SHAREGPT = RequestLengths(
    name="sharegpt",
    prompt=LengthDistribution.lognormal(161.31, 1.2, 1024),
    output=LengthDistribution.lognormal(337.99, 0.75, 2048),
)
"""Conversations shared with ChatGPT, as SOSP '23 used them: its Figure 11 gives the means.

Log-normal; the paper prints no spread. The one of the outputs, which decides how many tokens a
running request has, was chosen so that Orca (Oracle) keeps the shares of its Figure 2; that of the
prompts hardly matters (`tests/claims/test_paper_memory_use.py`).
"""

ALPACA = RequestLengths(
    name="alpaca",
    prompt=LengthDistribution.lognormal(19.31, 0.5, 1024),
    output=LengthDistribution.lognormal(58.45, 0.85, 1024),
)
"""Instructions generated for Alpaca, as SOSP '23 used them: its Figure 11 gives the means.

Log-normal; the outputs' spread was chosen so that Orca (Oracle) batches as many requests as in its
Figure 13b.
"""
