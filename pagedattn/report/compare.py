"""Two runs, row by row: what became faster, what slower, and what cannot be told."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pagedattn.report.medians import (
    FEWEST,
    Interval,
    interval,
    median_draws,
    median_draws_of_quartiles,
)
from pagedattn.report.noise import scatter_between_runs, serial_widening
from pagedattn.report.tables import Table
from pagedattn.report.text import clean, duration, plural
from pagedattn.report.values import ResultsError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pagedattn.report.results import Run
    from pagedattn.report.rows import Row

VERDICTS = ("slower", "faster", "unclear", "same")
MARGIN = 0.03
_SIDES = 1.96  # standard deviations on each side, of a normal 95 % interval
_SCATTER_TOLD = 0.001


@dataclass(frozen=True, slots=True)
class Change:
    """One row in two runs.

    Attributes:
        name: of the row.
        before: its median in the first run, with its interval, microseconds.
        after: the same in the second.
        ratio: after over before, with its interval; above 1 is slower.
        verdict: one of `VERDICTS`.

    """

    name: str
    before: Interval
    after: Interval
    ratio: Interval
    verdict: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs of one suite.

    Attributes:
        changes: rows that both have, in the first run's order.
        added: names of rows that only the second has.
        removed: names of rows that only the first has.
        skipped: names of benchmarks of other suites, in either.
        margin: relative difference below which it does not matter.
        scatter: standard deviation of the rows' ratios, relative, beyond what their rounds say; the
            intervals of the ratios are wider by it.

    """

    changes: tuple[Change, ...]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    skipped: tuple[str, ...]
    margin: float
    scatter: float = 0.0

    @property
    def num_skipped(self) -> int:
        """How many benchmarks are of other suites."""
        return len(self.skipped)

    @property
    def counts(self) -> dict[str, int]:
        """How many rows have each verdict."""
        return {word: sum(c.verdict == word for c in self.changes) for word in VERDICTS}

    @property
    def mean_ratio(self) -> float | None:
        """Geometric mean of the ratios; None without rows."""
        if not self.changes:
            return None
        logs = [math.log(change.ratio.value) for change in self.changes]
        return math.exp(math.fsum(logs) / len(logs))

    def regressions(self, limit: float) -> list[Change]:
        """Rows that are slower by more than a fraction, beyond doubt: slower, and above it."""
        return [c for c in self.changes if c.verdict == "slower" and c.ratio.value > 1 + limit]


def compare(before: Run, after: Run, *, margin: float = MARGIN) -> Comparison:
    """Join two runs by row name and judge each row.

    Args:
        before: the first run.
        after: the second.
        margin: relative difference that matters in practice, above 0.

    Returns:
        The comparison. A row is slower (faster) if the interval of the ratio lies above (below) 1
        and the ratio differs from 1 by the margin at least; the same if the whole interval lies
        within the margin, or the difference is below it and the interval within twice the margin;
        else unclear. The interval holds the noise of the rounds and, where there are rows enough to
        tell, that between the runs.

    Raises:
        ResultsError: the runs have no row in common.

    """
    first, second = _by_name(before), _by_name(after)
    names = [name for name in first if name in second]
    if not names:
        raise ResultsError("The two runs have no row in common.")
    changes = [_change(first[name], second[name]) for name in names]
    logs = np.array([math.log(ratio.value) for _, _, ratio in changes])
    errors = np.array([math.log(ratio.high / ratio.low) / 2 / _SIDES for _, _, ratio in changes])
    scatter = scatter_between_runs(logs, errors, math.log1p(margin))
    judged = []
    for name, (old, new, own) in zip(names, changes, strict=True):
        ratio = _widened(own, _SIDES * scatter)
        rounds = min(_num_rounds(first[name]), _num_rounds(second[name]))
        judged.append(Change(name, old, new, ratio, _verdict(ratio, margin, rounds)))
    return Comparison(
        changes=tuple(judged),
        added=tuple(name for name in second if name not in first),
        removed=tuple(name for name in first if name not in second),
        skipped=tuple(name for run in (before, after) for f in run.files for name in f.skipped),
        margin=margin,
        scatter=math.expm1(scatter),
    )


def _by_name(run: Run) -> dict[str, Row]:
    """Name rows by their benchmark, or where that is not known by what they are of."""
    named: dict[str, Row] = {}
    copies: Counter[str] = Counter()
    for row in run.rows:
        parts = (row.area, row.operation, row.workload, row.num_sequences, row.implementation)
        words = " ".join(str(part) for part in parts if part is not None)
        unique = name = clean(row.fullname.rpartition("::")[2] or words)
        while unique in named:
            copies[name] += 1
            unique = f"{name} #{copies[name] + 1}"
        named[unique] = row
    return named


def _change(before: Row, after: Row) -> tuple[Interval, Interval, Interval]:
    """Return the two medians and their ratio."""
    # two streams: the draws of the two runs do not depend on each other
    draws_before, draws_after = _draws(before, 0), _draws(after, 1)
    value = after.median_us / before.median_us
    return (
        interval(draws_before, before.median_us),
        interval(draws_after, after.median_us),
        interval(draws_after / draws_before, value),
    )


def _draws(row: Row, stream: int) -> NDArray[np.float64]:
    if not row.samples_us:
        return median_draws_of_quartiles(row.q1_us, row.median_us, row.q3_us, row.rounds, stream)
    samples = np.asarray(row.samples_us)
    draws, factor = median_draws(samples, stream), serial_widening(samples)
    if factor == 1.0:
        return draws
    # a factor each way, so that no draw is below zero
    return np.asarray(row.median_us * (draws / row.median_us) ** factor)


def _num_rounds(row: Row) -> int:
    return len(row.samples_us) or row.rounds


def _widened(found: Interval, reach: float) -> Interval:
    """Widen a ratio's interval by noise of its own, of this reach in logarithms."""
    down = math.hypot(math.log(found.value / found.low), reach)
    up = math.hypot(math.log(found.high / found.value), reach)
    return Interval(found.value, found.value * math.exp(-down), found.value * math.exp(up))


def _verdict(ratio: Interval, margin: float, rounds: int) -> str:
    if rounds < FEWEST:
        return "unclear"
    if ratio.low > 1 and ratio.value >= 1 + margin:
        return "slower"
    if ratio.high < 1 and ratio.value <= 1 / (1 + margin):
        return "faster"
    inside = 1 / (1 + margin) < ratio.value < 1 + margin
    wide = 1 + 2 * margin
    return "same" if inside and ratio.low > 1 / wide and ratio.high < wide else "unclear"


def comparison_tables(comparison: Comparison, *, every: bool = False) -> list[Table]:
    """Make a table of the rows that changed or are unclear, all of them if `every`."""
    order = {word: place for place, word in enumerate(VERDICTS)}
    shown = [c for c in comparison.changes if every or c.verdict != "same"]
    shown.sort(key=lambda c: (order[c.verdict], -abs(math.log(c.ratio.value)), c.name))
    lines = [
        [
            change.name,
            change.verdict,
            _change_text(change.ratio.value),
            f"{_change_text(change.ratio.low)} to {_change_text(change.ratio.high)}",
            _with_bounds(change.before),
            _with_bounds(change.after),
        ]
        for change in shown
    ]
    header = ["row", "verdict", "change", "95 % interval", "before", "after"]
    tables = [Table("Rows", header, lines, 2)] if lines else []
    for title, names in (
        ("Only in the second run", comparison.added),
        ("Only in the first run", comparison.removed),
        ("Skipped, of other suites", tuple(dict.fromkeys(comparison.skipped))),
    ):
        if names:
            tables.append(Table(title, ["row"], [[name] for name in names], 1))
    return tables


def summary_sentence(comparison: Comparison) -> str:
    """Say what the comparison found, in a line."""
    counts = comparison.counts
    words = ", ".join(f"{counts[word]} {word}" for word in VERDICTS)
    mean = comparison.mean_ratio or 1.0
    text = f"{plural(len(comparison.changes), 'row')}: {words}; geometric mean {_change_text(mean)}"
    others = [
        f"{len(names)} {word}"
        for names, word in ((comparison.added, "new"), (comparison.removed, "removed"))
        if names
    ]
    if comparison.skipped:
        others.append(f"{comparison.num_skipped} of other suites skipped")
    if comparison.scatter >= _SCATTER_TOLD:
        others.append(f"rows scatter by {100 * comparison.scatter:.1f} % between the runs")
    return f"{text}; {', '.join(others)}" if others else text


def _change_text(ratio: float) -> str:
    return f"{100 * (ratio - 1):+z.1f} %"


def _with_bounds(found: Interval) -> str:
    return f"{duration(found.value)} ({duration(found.low)} to {duration(found.high)})"
