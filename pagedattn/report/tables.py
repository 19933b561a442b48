"""The tables of a report, as cells; and cells as aligned text or markdown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pagedattn.report.doubts import doubts_of_row
from pagedattn.report.text import (
    MISSING,
    cut,
    duration,
    escape,
    flops_rate,
    number,
    percent,
    plural,
    times,
)

if TYPE_CHECKING:
    from pagedattn.report.rows import Row
    from pagedattn.report.summary import Case, Group, Summary


DOUBT = "?"
"""Behind a median that should not be taken as it stands; see `pagedattn.report.doubts`."""

_WIDEST = 120  # letters of a name that a terminal shows


@dataclass(frozen=True, slots=True)
class Table:
    """Cells of text; columns from `first_number` on are aligned to the right."""

    title: str
    header: list[str]
    lines: list[list[str]]
    first_number: int

    def as_text(self) -> str:
        """Return the table with aligned columns, for a terminal."""
        lines = [[cut(cell, _WIDEST) for cell in line] for line in [self.header, *self.lines]]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts = [
            "  ".join(
                cell.rjust(width) if place >= self.first_number else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([cut(self.title, 2 * _WIDEST), *texts])

    def as_markdown(self) -> str:
        """Return the table in markdown, its names escaped."""
        rule = ["---" if i < self.first_number else "---:" for i in range(len(self.header))]
        lines = [[escape(cell) for cell in line] for line in [self.header, *self.lines]]
        lines.insert(1, rule)
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def headline_tables(summary: Summary) -> list[Table]:
    """Make a table for each area and device: a line per workload with its best implementation.

    Medians are microseconds. "of the limit" is the best one's share of the measured read
    bandwidth, or its TFLOP/s where work has 100 operations a byte or more. `DOUBT` marks medians.
    """
    return [_headline(group, summary.baseline) for group in summary.data]


def _headline(group: Group, baseline: str | None) -> Table:
    names = group.implementations
    compares = baseline in names and len(names) > 1
    speedup = [f"best over {baseline}"] if compares else []
    header = ["workload", "best", "median µs", "share or rate", *speedup]
    lines = []
    for case in group.cases:
        best = case.best
        ratio = [times(case.speedup(best.implementation, baseline or ""))] if compares else []
        medians = [_median(case.rows[name]) if name in case.rows else MISSING for name in names]
        line = [case.label, best.implementation, _median(best), _quality(best)]
        lines.append([*line, *ratio, *medians])
    return Table(group.title, [*header, *(f"{name} µs" for name in names)], lines, 2)


def _median(row: Row) -> str:
    return number(row.median_us) + (f" {DOUBT}" if doubts_of_row(row) else "")


def _quality(row: Row) -> str:
    """Return how near a row is to its limit: the share of bandwidth, or the rate."""
    if row.is_compute_bound or (row.gb_per_s is None and row.tflop_per_s is not None):
        return flops_rate(row.tflop_per_s or 0.0)
    if row.share_of_bandwidth is not None:
        return percent(row.share_of_bandwidth)
    return MISSING if row.gb_per_s is None else f"{number(row.gb_per_s)} GB/s"


def bookkeeping_tables(summary: Summary) -> list[Table]:
    """Make a table for each bookkeeping area: medians, a column for each number of sequences.

    Cases that were measured beside a peer are in `comparison_tables` instead.
    """
    tables = []
    for group in summary.bookkeeping:
        compared = {id(case) for case in group.compared}
        alone = [case for case in group.cases if id(case) not in compared]
        if alone:
            tables.append(_bookkeeping(group.title, alone))
    return tables


def _bookkeeping(title: str, cases: list[Case]) -> Table:
    rows = [row for case in cases for row in case.rows.values()]
    sizes = sorted({row.num_sequences for row in rows if row.num_sequences is not None})
    medians: dict[tuple[str, str, str], dict[int | None, str]] = {}
    for row in rows:
        names = (row.operation or MISSING, row.workload, row.implementation)
        medians.setdefault(names, {})[row.num_sequences] = duration(row.median_us)
    columns: list[int | None] = [*sizes]
    if any(row.num_sequences is None for row in rows):
        columns.append(None)
    titles = [plural(size, "sequence") if size is not None else "median" for size in columns]
    lines = [
        [*names, *(cells.get(size, MISSING) for size in columns)]
        for names, cells in medians.items()
    ]
    return Table(title, ["operation", "workload", "implementation", *titles], lines, 3)


def full_tables(summary: Summary) -> list[Table]:
    """Make a table for each area and device with a line for each case and implementation."""
    header = [
        "case",
        "implementation",
        "median µs",
        "q1 µs",
        "q3 µs",
        "rounds",
        "GB/s",
        "share",
        "TFLOP/s",
        "error / budget",
        "host µs",
    ]
    return [
        Table(
            group.title,
            header,
            [_full(case, row) for case in group.cases for row in case.rows.values()],
            2,
        )
        for group in (*summary.data, *summary.bookkeeping)
    ]


def _full(case: Case, row: Row) -> list[str]:
    error = MISSING
    if row.error is not None:
        budget = MISSING if row.error_budget is None else f"{row.error_budget:.2g}"
        error = f"{row.error:.2g} / {budget}"
    return [
        case.label,
        row.implementation,
        number(row.median_us),
        number(row.q1_us),
        number(row.q3_us),
        str(row.rounds),
        number(row.gb_per_s),
        percent(row.share_of_bandwidth),
        number(row.tflop_per_s),
        error,
        number(row.host_us),
    ]
