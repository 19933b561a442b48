"""The headline: for each workload the best implementation, and this project's beside its peers'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pagedattn.report.doubts import WHAT_IS_DOUBTED, doubts_of_row, share_of_limit
from pagedattn.report.html.figure import DataTable, share_text
from pagedattn.report.text import MISSING, clean, duration, number, plural

if TYPE_CHECKING:
    from pagedattn.report.rows import Row
    from pagedattn.report.summary import Case, Summary

_OWN = ("triton", "torch", "cuda", "cuda_fp8", "reference", "pagedattn")
ABOUT = (
    "A line per workload, the worst first. «Ours / peer» is the median of this project's fastest "
    "implementation over that of the fastest of the others: 2 means twice the time, below 1 this "
    "project is faster; lines without both come last. The shares are the best one's: of the limit "
    "that the measured roofs set, and of the measured read bandwidth. "
    f"{WHAT_IS_DOUBTED}"
)


@dataclass(frozen=True, slots=True)
class Line:
    """A workload: the fastest row, this project's fastest, the others' fastest."""

    area: str
    case: Case
    own: Row | None
    peer: Row | None

    @property
    def ratio(self) -> float | None:
        """The project's median over the peer's; above 1 is slower."""
        if self.own is None or self.peer is None:
            return None
        return self.own.median_us / self.peer.median_us


def is_own(implementation: str) -> bool:
    """Whether an implementation is this project's, and not another's that it is measured beside.

    >>> is_own("triton"), is_own("pagedattn_from_lists"), is_own("vllm_triton")
    (True, True, False)
    """
    return implementation in _OWN or implementation.startswith("pagedattn_")


def headline(summary: Summary) -> list[Line]:
    """Return a line for each case, the worst ratio first, those without one last."""
    lines = [
        Line(
            group.title,
            case,
            _fastest([row for name, row in case.rows.items() if is_own(name)]),
            _fastest([row for name, row in case.rows.items() if not is_own(name)]),
        )
        for group in (*summary.data, *summary.bookkeeping)
        for case in group.cases
    ]
    # a stable sort: cases without a ratio keep the order of the tables
    return sorted(lines, key=lambda line: -(line.ratio or 0.0))


def _fastest(rows: list[Row]) -> Row | None:
    return min(rows, key=lambda row: (row.median_us, row.implementation), default=None)


def headline_sentence(lines: list[Line]) -> str:
    """Say in a line how this project does beside its peers."""
    ratios = [line.ratio for line in lines if line.ratio is not None]
    if not ratios:
        return "No workload was measured both with this project and with a peer."
    faster = sum(ratio < 1 for ratio in ratios)
    worst = lines[0]
    own, peer = (row.implementation if row else "" for row in (worst.own, worst.peer))
    return (
        f"Of {plural(len(ratios), 'workload')} that a peer ran too, this project is faster in "
        f"{faster}. The worst is {worst.case.label}: {own} takes {worst.ratio or 0:.2f} times "
        f"as long as {peer}."
    )


def headline_table(lines: list[Line]) -> DataTable:
    """Make the headline's table."""
    header = ["workload", "ours / peer", "best's median", "of the limit", "of the bandwidth"]
    header += ["TFLOP/s", "best", "ours", "peer", "doubt", "area"]
    cells = [_cells(line) for line in lines]
    table = DataTable("headline-table", "Headline", header, cells, 1, ABOUT, True, 6)
    return table.without_empty_columns()


def _cells(line: Line) -> list[str]:
    best = line.case.best
    return [
        line.case.label,
        MISSING if line.ratio is None else f"{line.ratio:.2f}",
        duration(best.median_us),
        share_text(share_of_limit(best)),
        share_text(best.share_of_bandwidth),
        number(best.tflop_per_s),
        clean(best.implementation),
        MISSING if line.own is None else clean(line.own.implementation),
        MISSING if line.peer is None else clean(line.peer.implementation),
        ", ".join(_doubts(line)) or MISSING,
        line.area,
    ]


def _doubts(line: Line) -> list[str]:
    rows = {id(row): row for row in (line.case.best, line.own, line.peer) if row is not None}
    return [
        f"{clean(row.implementation)}: {doubt}"
        for row in rows.values()
        for doubt in doubts_of_row(row)
    ]


def rows_table(summary: Summary) -> DataTable:
    """Make a table of all rows."""
    header = ["workload", "implementation", "median µs", "q1 µs", "q3 µs"]
    header += ["rounds", "GB/s", "of the bandwidth", "TFLOP/s", "of the limit", "error", "budget"]
    header += ["host µs", "doubt", "area"]
    lines = [
        [
            case.label,
            clean(row.implementation),
            *(number(value) for value in (row.median_us, row.q1_us, row.q3_us)),
            str(row.rounds),
            number(row.gb_per_s),
            share_text(row.share_of_bandwidth),
            number(row.tflop_per_s),
            share_text(share_of_limit(row)),
            *(
                MISSING if value is None else f"{value:.2g}"
                for value in (row.error, row.error_budget)
            ),
            number(row.host_us),
            ", ".join(doubts_of_row(row)) or MISSING,
            group.title,
        ]
        for group in (*summary.data, *summary.bookkeeping)
        for case in group.cases
        for row in case.rows.values()
    ]
    about = (
        "Each case under each implementation. Quartiles are over the rounds. GB/s count 1e9 bytes, "
        "TFLOP/s 1e12 operations. Host time is what an eager launch costs its caller."
    )
    table = DataTable("rows-table", "All rows", header, lines, 2, about, True, 13)
    return table.without_empty_columns()
