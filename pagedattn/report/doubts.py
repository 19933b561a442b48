"""What a reader must know before the verdicts of a comparison are taken for those on the code."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from pagedattn.report.noise import FEWEST_ROWS

if TYPE_CHECKING:
    from pagedattn.report.compare import Comparison
    from pagedattn.report.results import Run

MOST_LOAD = 1.25
"""Processes that want to run, a core: benchmarks by themselves keep the cores busy, no more."""


def doubts(before: Run, after: Run, comparison: Comparison) -> list[str]:
    """Say which run's machine was busy, and whether all rows moved alike; a sentence each.

    A machine that was slow for the whole of a run makes all rows slow, and the rows alone cannot
    tell that from a change of the code that they share.
    """
    found = [
        f"{file.name} ended with {file.load:.1f} processes at a time on {file.num_cores} cores: "
        f"its times may be those of a busy machine."
        for run in (before, after)
        for file in run.files
        if file.load is not None and file.num_cores and file.load > MOST_LOAD * file.num_cores
    ]
    if len(comparison.changes) >= FEWEST_ROWS:
        middle = statistics.median(math.log(change.ratio.value) for change in comparison.changes)
        if abs(middle) >= math.log1p(comparison.margin):
            found.append(
                f"Half of the rows changed by {100 * math.expm1(middle):+.1f} % or more: that is "
                f"something that all share, the machine or the code; run the first again to tell."
            )
    return found
