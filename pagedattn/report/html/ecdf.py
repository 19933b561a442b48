"""How the rounds of single rows were spread: which share of them took no longer than a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from pagedattn.report.doubts import spread_of
from pagedattn.report.html.figure import DataTable, Entry, Figure, Panel
from pagedattn.report.html.svg import Chart
from pagedattn.report.style import COLOURS
from pagedattn.report.text import clean, duration, number, plural

if TYPE_CHECKING:
    from pagedattn.report.rows import Row
    from pagedattn.report.summary import Summary

MOST_ROWS = 300
"""Rows whose rounds are in the page, the most spread ones."""

MOST_SAMPLES = 200
FIRST_DRAWN = 3
_ABOUT = (
    "A line climbs with each round of a row, from 0 % to 100 %, at the time that the round took, "
    "here over the row's own median. A steep line is a steady row; a long foot on the right is "
    "rounds that something disturbed; two steps are two speeds, such as two clocks."
)


def rows_with_samples(summary: Summary) -> list[tuple[str, Row]]:
    """Name the rows that kept their rounds, each name once, the most spread ones first."""
    named: dict[str, Row] = {}
    for group in (*summary.data, *summary.bookkeeping):
        for case in group.cases:
            for name, row in case.rows.items():
                if not row.samples_us:
                    continue
                text = clean(f"{case.label} · {name}")
                if text in named:
                    text = clean(f"{text} · {group.title}")
                named.setdefault(text, row)
    return most_spread(list(named.items()))


def most_spread(rows: list[tuple[str, Row]]) -> list[tuple[str, Row]]:
    """Return named rows by the width of their quartiles over the median, the widest first."""
    return sorted(rows, key=lambda found: (-spread_of(found[1]), found[0]))


def draw_ecdf(rows: list[tuple[str, Row]], first: int = FIRST_DRAWN) -> Figure:
    """Draw the first rows; the reader may choose others of `MOST_ROWS` in the page."""
    if not rows:
        return Figure("ecdf", "Spread of the rounds", reason="the files kept no row's rounds")
    kept = rows[:MOST_ROWS]
    ratios = {name: _ratios(row) for name, row in kept}
    drawn = dict(list(ratios.items())[:first])
    says = " ".join(_says(name, row) for name, row in kept[:first])
    about = _ABOUT
    if len(kept) < len(rows):
        about += f" The {MOST_ROWS} most spread of {len(rows):,} rows can be chosen."
    if any(len(row.samples_us) > MOST_SAMPLES for _, row in kept):
        about += f" Rows of more than {MOST_SAMPLES} rounds are drawn at so many of them, evenly."
    low = min(values[0] for values in drawn.values())
    high = max(values[-1] for values in drawn.values())
    chart = _draw(drawn, low, high, f"Share of the rounds against time over the median. {says}")
    chooser: dict[str, object] = {
        "names": [name for name, _ in kept],
        "medians": [duration(row.median_us) for _, row in kept],
        "ratios": list(ratios.values()),
        "drawn": len(drawn),
        "colours": len(COLOURS),
        "frame": [chart.left, chart.right, chart.top, chart.bottom],
    }
    return Figure(
        "ecdf",
        "Spread of the rounds",
        about,
        says,
        [Panel("", chart.markup(identity="ecdf-picture"))],
        [Entry(_line(place), name) for place, name in enumerate(drawn)],
        [_table(kept)],
        chooser=chooser,
    )


def _line(place: int) -> Markup:
    return Markup(
        '<svg class="key" aria-hidden="true" viewBox="0 0 26 16" width="26" height="16">'
        f'<path class="curve s{place % len(COLOURS)} dash{place // len(COLOURS) % 3}" '
        'd="M1 8H25"/></svg>'
    )


def _ratios(row: Row) -> list[float]:
    """Return at most `MOST_SAMPLES` rounds over the row's median, rising, with 4 decimals."""
    ordered = np.sort(np.asarray(row.samples_us)) / row.median_us
    if ordered.size > MOST_SAMPLES:
        ordered = ordered[np.linspace(0, ordered.size - 1, MOST_SAMPLES).round().astype(int)]
    return [round(value, 4) for value in ordered.tolist()]


def _says(name: str, row: Row) -> str:
    samples = np.asarray(row.samples_us)
    late = int(np.sum(samples > 1.1 * row.median_us))
    return (
        f"{name}: {plural(samples.size, 'round')}, median {duration(row.median_us)}, half of them "
        f"from {duration(row.q1_us)} to {duration(row.q3_us)}, the slowest "
        f"{samples.max() / row.median_us:.2f} times the median, "
        f"{late or 'none'} of them more than a tenth above it."
    )


def ticks_between(low: float, high: float, most: int = 7) -> list[float]:
    """Return at most `most` round places on a linear axis.

    >>> ticks_between(0.93, 1.24)
    [0.95, 1.0, 1.05, 1.1, 1.15, 1.2]
    """
    for power in range(-4, 19):
        for digit in (1, 2, 5):
            step = digit * 10.0**power
            first, last = int(np.ceil(low / step - 1e-9)), int(np.floor(high / step + 1e-9))
            if last - first < most:
                return [round(place * step, 6) for place in range(first, last + 1)]
    return [low]


def _draw(drawn: dict[str, list[float]], low: float, high: float, alt: str) -> Chart:
    chart = Chart(680, 320, alt, left=62)
    margin = 0.03 * (high - low) or 0.01
    x_scale = chart.x_scale(low - margin, high + margin)
    y_scale = chart.y_scale(0, 1)
    ticks = ticks_between(x_scale.low, x_scale.high)
    chart.x_axis(x_scale, ticks, lambda x: f"{x:g}x", "time of a round over the row's median")
    chart.y_axis(
        y_scale, [0, 0.25, 0.5, 0.75, 1], lambda y: f"{100 * y:g} %", "share of the rounds"
    )
    for place, values in enumerate(drawn.values()):
        points = [(x_scale.at(values[0]), y_scale.at(0))]
        for count, value in enumerate(values, 1):
            x = x_scale.at(value)
            points += [(x, points[-1][1]), (x, y_scale.at(count / len(values)))]
        points.append((chart.right, y_scale.at(1)))
        colours = len(COLOURS)
        chart.line(points, f"curve s{place % colours} dash{place // colours % 3}")
    return chart


def _table(rows: list[tuple[str, Row]]) -> DataTable:
    lines = []
    for name, row in rows:
        samples = np.asarray(row.samples_us)
        ranks = np.quantile(samples, (0.05, 0.95)).tolist()
        values = (row.min_us, ranks[0], row.q1_us, row.median_us, row.q3_us, ranks[1], row.max_us)
        texts = [number(value) for value in values]
        lines.append([name, str(samples.size), f"{100 * spread_of(row):.1f} %", *texts])
    header = ["row", "rounds", "quartiles / median", "least µs", "5 % µs", "q1 µs", "median µs"]
    header += ["q3 µs", "95 % µs", "most µs"]
    return DataTable("ecdf-data", "Rounds of each row", header, lines, 1)
