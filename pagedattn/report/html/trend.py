"""The medians of rows over several runs of one machine, in the order of time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from pagedattn.report.html.figure import DataTable, Entry, Figure, Panel
from pagedattn.report.html.svg import Chart
from pagedattn.report.style import COLOURS
from pagedattn.report.text import MISSING, clean, cut, duration, plural

if TYPE_CHECKING:
    from pagedattn.report.results import ResultsFile, Run

NAMED = 6
MOST_LINES = 200
_TIME = "measured at"
_ABOUT = (
    "Each line is a row: its median in each run over that in the first. The named lines moved "
    "most from the first run to the last; the thick one is the geometric mean of all rows that "
    "every run has. Runs stand in the order of their time, at equal distances."
)


@dataclass(frozen=True, slots=True)
class History:
    """A row's medians in microseconds, one for each run, None where a run lacks it."""

    name: str
    medians: tuple[float | None, ...]

    @property
    def change(self) -> float:
        """The last median over the first, of those runs that have the row."""
        known = [median for median in self.medians if median is not None]
        return known[-1] / known[0]

    @property
    def is_whole(self) -> bool:
        """Whether every run has the row."""
        return None not in self.medians


def files_in_time(run: Run) -> list[ResultsFile]:
    """Return the files of the first one's machine, the oldest first.

    Files without a time stay in the order in which they were given, before the others.
    """
    first = run.files[0]
    same = [file for file in run.files if file.machine == first.machine]
    return sorted(same, key=lambda file: dict(file.about).get(_TIME, ""))


def histories_of(files: list[ResultsFile]) -> list[History]:
    """Return the rows that two or more files have, by their full names, in the order of files."""
    found: dict[str, list[float | None]] = {}
    for place, file in enumerate(files):
        for row in file.rows:
            if row.fullname:
                medians = found.setdefault(row.fullname, [None] * len(files))
                medians[place] = row.median_us
    short = [clean(name.rpartition("::")[2]) for name in found]
    names = short if len(set(short)) == len(short) else [clean(name) for name in found]
    return [
        History(name, tuple(medians))
        for name, medians in zip(names, found.values(), strict=True)
        if sum(median is not None for median in medians) > 1
    ]


def draw_trend(run: Run) -> Figure:
    """Draw rows over the runs, or say that there is one run, or none that repeats another's."""
    title = "Trend over runs"
    files = files_in_time(run)
    if len(files) < 2:
        reason = "it takes two or more files of one machine that have rows in common"
        return Figure("trend", title, reason=reason)
    histories = histories_of(files)
    if not histories:
        return Figure("trend", title, reason="no row is in more than one of the files")
    by_change = sorted(histories, key=lambda row: (-abs(math.log(row.change)), row.name))
    named, means = by_change[:NAMED], _means(histories)
    about = _ABOUT
    if len(files) < len(run.files):
        about += f" Of {len(run.files)} files, {len(files)} are of the first one's machine."
    if len(by_change) > MOST_LINES:
        about += f" Drawn are the {MOST_LINES} rows that moved most."
    says = _says(histories, named, means, len(files))
    chart = _draw(by_change[:MOST_LINES], means, len(files), f"Medians over runs. {says}")
    legend = [Entry(_line(f"s{place}"), cut(row.name, 72)) for place, row in enumerate(named)]
    if means:
        legend.append(Entry(_line("mean"), "geometric mean"))
    return Figure(
        "trend",
        title,
        about,
        says,
        [Panel("", chart.markup())],
        legend,
        [_runs_table(files), _table(by_change, len(files))],
    )


def _line(kind: str) -> Markup:
    return Markup(
        '<svg class="key" aria-hidden="true" viewBox="0 0 26 16" width="26" height="16">'
        '<path class="curve {}" d="M1 8H25"/></svg>'
    ).format(kind)


def _means(histories: list[History]) -> list[float]:
    """Return the geometric mean over the first run's, for each run; empty without whole rows."""
    whole = [row.medians for row in histories if row.is_whole]
    return (
        [
            math.exp(
                math.fsum(
                    math.log((medians[place] or 1.0) / (medians[0] or 1.0)) for medians in whole
                )
                / len(whole)
            )
            for place in range(len(whole[0]))
        ]
        if whole
        else []
    )


def _says(
    histories: list[History], named: list[History], means: list[float], num_files: int
) -> str:
    parts = [f"{plural(len(histories), 'row')} in {plural(num_files, 'run')}"]
    if means:
        parts.append(f"the geometric mean of the last run is {means[-1]:.3f} times the first's")
    moved = [f"{row.name} {row.change:.2f} times" for row in named[:3]]
    parts.append(f"moved most, last over first: {', '.join(moved)}")
    return "; ".join(parts) + "."


def _draw(histories: list[History], means: list[float], num_files: int, alt: str) -> Chart:
    chart = Chart(680, 320, alt, left=62, right=24)
    lines = [_ratios(row) for row in histories]
    values = [ratio for line in lines for _, ratio in line] + means
    reach = max(1.02, *(max(value, 1 / value) for value in values)) ** 1.08
    x_scale = chart.x_scale(0, num_files - 1)
    y_scale = chart.y_scale(1 / reach, reach, log=True)
    step = max(1, math.ceil(num_files / 12))
    runs = range(0, num_files, step)
    chart.x_axis(x_scale, runs, lambda x: f"{round(x) + 1}", "run, the oldest first")
    ticks = sorted({tick for share in _steps(reach) for tick in (1 + share, 1 / (1 + share))})
    chart.y_axis(y_scale, ticks, lambda y: f"{y:.2f}x", "")
    # the named ones last, so that they lie on top
    for place in reversed(range(len(lines))):
        kind = f"s{place % len(COLOURS)}" if place < NAMED else "faint"
        points = [(x_scale.at(x), y_scale.at(ratio)) for x, ratio in lines[place]]
        chart.line(points, f"curve {kind}")
    points = [(x_scale.at(x), y_scale.at(ratio)) for x, ratio in enumerate(means)]
    chart.line(points, "curve mean")
    return chart


def _steps(reach: float) -> list[float]:
    """Return distances from 1 for ticks, up to the reach.

    >>> _steps(1.12), _steps(3.5)
    ([0.0, 0.05, 0.1], [0.0, 1.0, 2.0])
    """
    for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0):
        count = int((reach - 1) / step + 1e-9)
        if count <= 3:
            return [round(step * place, 4) for place in range(count + 1)]
    return [0.0, reach - 1]


def _ratios(row: History) -> list[tuple[int, float]]:
    known = [(place, median) for place, median in enumerate(row.medians) if median is not None]
    return [(place, median / known[0][1]) for place, median in known]


def _runs_table(files: list[ResultsFile]) -> DataTable:
    lines = [
        [
            str(place),
            file.name,
            *(dict(file.about).get(name, MISSING) for name in (_TIME, "commit")),
        ]
        for place, file in enumerate(files, 1)
    ]
    return DataTable("trend-runs", "Runs", ["run", "file", "time", "commit"], lines, 4)


def _table(histories: list[History], num_files: int) -> DataTable:
    lines = [
        [
            row.name,
            *(MISSING if median is None else duration(median) for median in row.medians),
            f"{row.change:.3f}",
        ]
        for row in histories
    ]
    header = ["row", *(f"run {place}" for place in range(1, num_files + 1)), "last / first"]
    return DataTable("trend-data", "Medians over runs", header, lines, 1)
