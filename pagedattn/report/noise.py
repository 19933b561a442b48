"""Noise that the rounds of one run do not show by their spread alone.

Two kinds are looked for. Rounds that lie one after the other may be alike (a clock that drifts), so
that they say less than as many independent ones. And two runs of the same code may differ from row
to row by more than their rounds say (memory laid out otherwise, another neighbour on the machine),
which shows in the ratios of all rows together, most of which a change leaves alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

FEWEST_ROWS = 10
"""Rows that are needed to tell their common noise from a change of some of them."""

_MOST_ALIKE = 0.9
_NORMAL_95 = 1.96
_NORMAL_HALF = 0.6745


def serial_widening(samples: NDArray[np.float64]) -> float:
    """By how much an interval must be widened because neighbouring rounds are alike, 1 or more.

    The root of (1 + r) / (1 - r), as for a process whose next value has the correlation r with the
    last, where r is that of the ranks of neighbours and is more than chance gives to independent
    rounds. 1 for rounds that were sorted before they were kept: their order is lost.

    Args:
        samples: float64 [num_rounds], in the order of time.

    """
    steps = np.diff(samples)
    if samples.size < 5 or (steps >= 0).all() or (steps <= 0).all():
        return 1.0
    ranks = np.argsort(np.argsort(samples, kind="stable"), kind="stable").astype(np.float64)
    ranks -= ranks.mean()
    alike = float((ranks[1:] * ranks[:-1]).sum() / (ranks * ranks).sum())
    if alike < _NORMAL_95 / np.sqrt(samples.size):
        return 1.0
    # few rounds show less of it than there is (Marriott and Pope 1954; Kendall 1954)
    alike = min((alike * samples.size + 1) / (samples.size - 4), _MOST_ALIKE)
    return float(np.sqrt((1 + alike) / (1 - alike)))


def scatter_between_runs(
    logs: NDArray[np.float64], errors: NDArray[np.float64], most: float
) -> float:
    """Standard deviation of the logs of ratios beyond what their own errors explain.

    The width of the shortest interval that holds half of the rows says how the ratios scatter; rows
    that changed lie outside of it, be they half of all. What the rows' errors explain is taken off.

    Args:
        logs: logarithm of each row's ratio, float64 [num_rows].
        errors: its standard error, float64 [num_rows].
        most: the result is no larger.

    """
    if logs.size < FEWEST_ROWS:
        return 0.0
    ordered = np.sort(logs)
    half = logs.size // 2 + 1
    width = float((ordered[half - 1 :] - ordered[: logs.size - half + 1]).min())
    # the shortest of many intervals is narrow by chance: Rousseeuw and Leroy's factor, 1987
    scatter = width / 2 / _NORMAL_HALF * (1 + 5 / logs.size)
    return float(min(most, np.sqrt(max(0.0, scatter**2 - float(np.median(errors)) ** 2))))
