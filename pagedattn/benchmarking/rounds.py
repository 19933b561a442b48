"""How many rounds a benchmark gets: until its median is known well enough."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class StopRule:
    """When enough rounds were timed.

    Attributes:
        precision: half the width of the median's 95 % interval over the median, to be reached.
        least: rounds of each contender, however sure.
        most: rounds of each contender, however unsure.
        seconds: of measured launches of one contender, after which it is enough.

    """

    precision: float = 0.01
    least: int = 10
    most: int = 100
    seconds: float = 1.0

    def enough(self, samples: Sequence[float]) -> bool:
        """Whether these rounds, in seconds, will do."""
        if len(samples) < self.least:
            return False
        if len(samples) >= self.most or self.spent(samples):
            return True
        return median_precision(samples) <= self.precision

    def spent(self, samples: Sequence[float]) -> bool:
        """Whether these rounds are the least ones, and so long that no others will be timed."""
        return len(samples) >= self.least and math.fsum(samples) >= self.seconds


def median_precision(samples: Sequence[float]) -> float:
    """Half the width of the median's 95 % interval, over the median; infinite for 5 or fewer.

    The interval lies between two of the ordered samples, whatever their distribution: as many lie
    below the true median as heads fall in so many throws (David and Nagaraja, Order Statistics,
    §7.1).

    Args:
        samples: any unit, above 0.

    """
    ordered = sorted(samples)
    rank = _rank_below(len(ordered))
    if rank is None:
        return math.inf
    middle = len(ordered) // 2
    median = (ordered[middle] + ordered[~middle]) / 2
    return (ordered[~rank] - ordered[rank]) / 2 / median if median else math.inf


@lru_cache(maxsize=1000)
def _rank_below(count: int) -> int | None:
    """Rank, from 0, of the interval's lower end; its upper is as far from the other side."""
    below, found = 0.0, None
    for rank in range(count // 2):
        below += math.comb(count, rank) / 2**count  # chance that the true median lies lower
        if 2 * below > 1 - LEVEL:
            break
        found = rank
    return found
