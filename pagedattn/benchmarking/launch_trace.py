"""What the marks of a launch say: when its programs came to named moments, and the phases between.

The kernels note the moments themselves if they are compiled for it, see
`pagedattn/attention/cuda/trace.cuh`. Here is what can be said of them without a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pagedattn.report.tables import Table
from pagedattn.report.text import number, percent

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from numpy.typing import NDArray

MOMENTS = {
    "started": "program started",
    "lengths_known": "lengths known",
    "first_asked": "first tile asked for",
    "first_there": "first tile there",
    "last_there": "last tile there",
    "last_folded": "last tile folded",
    "sums_there": "warps added up",
    "written": "result or part written",
    "last_to_come": "was last to come",
    "merged": "parts merged",
    "ended": "program ended",
}
"""Names of the kernels' `Moment`, in its order, and what they are called in a table.

A program with several rows notes the first time of the first four, and the last of the others.
"""

_NAMES = tuple(MOMENTS)
_FIRST = 4  # moments that count when the first warp comes to them; others count when the last does

PHASES = {
    "waiting for lengths": "lengths_known",
    "waiting for the first tile": "first_there",
    "reading": "last_there",
    "adding up": "written",
    "merging": "ended",
}
"""Phases of a program that has work, and the moment that ends each; the first begins at its start.

A program that merges nothing ends as soon as it has written, or has said that it has.
"""

_BOUNDARIES = [_NAMES.index(name) for name in ("started", *PHASES.values())]


@dataclass(frozen=True)
class LaunchTrace:
    """When the programs of one launch came to each moment.

    Attributes:
        at_us: float64 [num_programs, moments in the order of `MOMENTS`], microseconds from the
            start of the first program; NaN where a program never came to a moment.

    """

    at_us: NDArray[np.float64]

    @classmethod
    def of_marks(cls, marks: NDArray[np.int64]) -> LaunchTrace:
        """Make one of what the warps noted.

        Args:
            marks: int64 [num_programs, warps, at least as many as `MOMENTS`], nanoseconds of one
                clock; 0 or less where a warp did not come to a moment.

        Raises:
            ValueError: no program started.

        """
        noted = marks[:, :, : len(MOMENTS)]
        is_there = noted > 0
        if not is_there[:, :, 0].any():
            raise ValueError("no program noted that it started, so nothing was launched")
        zero = noted[:, :, 0][is_there[:, :, 0]].min()
        times = np.where(is_there, (noted - zero) * 1e-3, np.nan)
        early = np.where(is_there, times, np.inf).min(axis=1)
        late = np.where(is_there, times, -np.inf).max(axis=1)
        at_us = np.where(np.arange(len(MOMENTS)) < _FIRST, early, late)
        return cls(np.where(is_there.any(axis=1), at_us, np.nan))

    def of(self, moment: str) -> NDArray[np.float64]:
        """Return the times of one moment, float64 [num_programs]."""
        return self.at_us[:, _NAMES.index(moment)]

    @property
    def span_us(self) -> float:
        """From the first program's start to the last one's end."""
        return float(np.nanmax(self.of("ended")))

    def boundaries(self) -> NDArray[np.float64]:
        """Return when the phases of the programs with work begin, and the last one ends.

        Returns:
            float64 [programs with work, phases + 1], microseconds, in the order in which programs
            end. A program that got no tile, or noted not all, is left out.

        """
        found = self.at_us[:, _BOUNDARIES]
        found = found[~np.isnan(found).any(axis=1)]
        return found[np.argsort(found[:, -1], kind="stable")]

    def read_gb_per_s(self, num_bytes: int) -> float:
        """Rate of `num_bytes` between the first tile asked for and the last one there."""
        seconds = np.nanmax(self.of("last_there")) - np.nanmin(self.of("first_asked"))
        return float(num_bytes / seconds * 1e-3)


def typical(traces: Sequence[LaunchTrace]) -> LaunchTrace:
    """Return the launch that half of the others are no longer than."""
    return sorted(traces, key=lambda trace: trace.span_us)[(len(traces) - 1) // 2]


def clock_step_ns(traces: Sequence[LaunchTrace]) -> int:
    """Return the steps in which the clock moves, as far as the times tell: nanoseconds."""
    times = np.concatenate([trace.at_us.ravel() for trace in traces])
    return int(np.gcd.reduce(np.rint(times[~np.isnan(times)] * 1e3).astype(np.int64)))


def moment_table(traces: Sequence[LaunchTrace], title: str) -> Table:
    """Make the table of moments: over programs, of several launches the median of each number."""
    lines = []
    for name, words in MOMENTS.items():
        each = [times[~np.isnan(times)] for times in (trace.of(name) for trace in traces)]
        each = [times for times in each if times.size]
        if each:
            count = np.median([times.size for times in each])
            limits = np.median([np.percentile(times, (0, 50, 100)) for times in each], axis=0)
            lines.append([words, f"{count:.0f}", *(f"{us:.2f}" for us in limits)])
    return Table(title, ["moment", "programs", "least µs", "median µs", "most µs"], lines, 1)


def phase_table(traces: Sequence[LaunchTrace], title: str) -> Table:
    """Make the table of phases: over the programs with work of all launches."""
    widths = np.concatenate([np.diff(trace.boundaries()) for trace in traces])
    total = widths.sum()
    lines = [
        [name, number(float(np.median(each))), percent(float(each.sum() / total))]
        for name, each in zip(PHASES, widths.T, strict=True)
        if each.size
    ]
    return Table(title, ["phase", "median µs", "of the programs' time"], lines, 1)


def to_frame(traces: Sequence[LaunchTrace]) -> pd.DataFrame:
    """Return a row for each program of each launch: both numbers, and a column a moment in µs.

    A moment to which no program of the launches came has a column all the same, without values.
    """
    import pandas as pd

    frames = []
    for launch, trace in enumerate(traces):
        frame = pd.DataFrame(trace.at_us, columns=[f"{name}_us" for name in MOMENTS])
        frame.insert(0, "launch", launch)
        frame.insert(1, "program", np.arange(len(frame)))
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)
