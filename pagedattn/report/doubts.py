"""What a reader must know before numbers are taken as they stand, of a row, a run, a comparison."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from pagedattn.report.medians import FEWEST
from pagedattn.report.noise import FEWEST_ROWS
from pagedattn.report.text import percent, plural, times

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pagedattn.report.compare import Comparison
    from pagedattn.report.results import ResultsFile, Run
    from pagedattn.report.rows import Row

MOST_LOAD = 1.25
"""Processes that want to run, a core: benchmarks by themselves keep the cores busy, no more."""


VARYING = frozenset(
    {
        *("SM clock", "memory clock", "temperature", "clocks held back by", "CPU clock"),
        *("measured read bandwidth", "measured copy bandwidth", "load when it ended"),
        *("commit", "measured at", "pagedattn"),
    }
)
"""What is different from run to run, or meant to be: not to be told of a comparison."""

WIDE = 0.1
"""Distance of a row's quartiles over its median from which on it is doubted."""

WHAT_IS_DOUBTED = (
    f"A row gets a doubt if it had fewer than {FEWEST} rounds, if its quartiles are "
    f"{100 * WIDE:.0f} % of its median apart or more, if it is faster than its limit allows, or if "
    f"its error is above its budget."
)


def doubts_of_row(row: Row) -> list[str]:
    """Say why a row should not be trusted as it stands; empty if nothing speaks against it."""
    found = []
    if row.rounds < FEWEST:
        found.append(plural(row.rounds, "round"))
    if spread_of(row) >= WIDE:
        found.append(f"spread {percent(spread_of(row))}")
    share = share_of_limit(row)
    if share is not None and share > 1:
        found.append(f"{times(share)} faster than its limit")
    if row.error is not None and row.error_budget is not None and row.error > row.error_budget:
        found.append("error above its budget")
    return found


def spread_of(row: Row) -> float:
    """Return the distance of a row's quartiles over its median."""
    return (row.q3_us - row.q1_us) / row.median_us


def share_of_limit(row: Row) -> float | None:
    """Return the least time that the roofs allow over the median."""
    return None if not row.limit_us else row.limit_us / row.median_us


def busy_machines(files: Iterable[ResultsFile]) -> list[str]:
    """Say of which files the machine was busy with more than the benchmarks; a sentence each."""
    return [
        f"{file.name} ended with {file.load:.1f} processes at a time on {file.num_cores} cores: "
        f"its times may be those of a busy machine."
        for file in files
        if file.load is not None and file.num_cores and file.load > MOST_LOAD * file.num_cores
    ]


def differences(before: ResultsFile, after: ResultsFile) -> str | None:
    """Say in which settings and versions two runs differ, in a sentence; None if in none."""
    one, other = dict(before.about), dict(after.about)
    found = [
        f"{label} ({one[label]}; {other[label]})"
        for label in one
        if label in other and label not in VARYING and one[label] != other[label]
    ]
    return f"The runs differ in {', '.join(found)}." if found else None


def doubts_of_comparison(before: Run, after: Run, comparison: Comparison) -> list[str]:
    """Say what differs, what is in doubt, and whether all rows moved alike; a sentence each.

    A machine that was slow for the whole of a run makes all rows slow, and the rows alone cannot
    tell that from a change of the code that they share.
    """
    found = busy_machines((*before.files, *after.files))
    if (sentence := differences(before.files[0], after.files[0])) is not None:
        found.insert(0, sentence)
    both = {row.fullname for row in before.rows} & {row.fullname for row in after.rows}
    doubted = {
        row.fullname
        for run in (before, after)
        for row in run.rows
        if row.fullname in both and doubts_of_row(row)
    }
    if doubted:
        verb = "has" if len(doubted) == 1 else "have"
        found.append(
            f"{len(doubted)} of {plural(len(both), 'row')} {verb} a doubt in one of the runs, such "
            f"as {min(doubted).rpartition('::')[2]}: a report of each run says which and why."
        )
    if 0 < len(comparison.changes) < FEWEST_ROWS:
        found.append(
            f"From {plural(len(comparison.changes), 'row')} it cannot be told whether rows scatter "
            f"between runs or all moved alike, as on a busy machine: that takes {FEWEST_ROWS}."
        )
    elif comparison.changes:
        middle = statistics.median(math.log(change.ratio.value) for change in comparison.changes)
        if abs(middle) >= math.log1p(comparison.margin):
            found.append(
                f"Half of the rows changed by {100 * math.expm1(middle):+.1f} % or more: that is "
                f"something that all share, the machine or the code; run the first again to tell."
            )
    return found
