"""Two runs beside each other: how many rows have each verdict, and each change's interval."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from markupsafe import Markup

from pagedattn.report.compare import VERDICTS, comparison_tables
from pagedattn.report.html.figure import DataTable, Entry, Figure, Panel
from pagedattn.report.html.svg import Chart
from pagedattn.report.text import cut, plural

if TYPE_CHECKING:
    from pagedattn.report.compare import Change, Comparison

MOST_CHANGES = 40
_MEANINGS = {
    "slower": "surely slower, by more than the margin",
    "faster": "surely faster, by more than the margin",
    "unclear": "too noisy or too few rounds to tell",
    "same": "no difference that matters",
}


def verdict_counts(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Return word, count and meaning of each verdict, and of new and removed rows."""
    counts = [(word, f"{comparison.counts[word]:,}", _MEANINGS[word]) for word in VERDICTS]
    counts.append(("new", f"{len(comparison.added):,}", "only in the second run"))
    counts.append(("removed", f"{len(comparison.removed):,}", "only in the first run"))
    return counts


def comparison_data(comparison: Comparison) -> list[DataTable]:
    """Make the comparison's tables: all rows, the changed ones first, and those of one run."""
    about = (
        "Medians with 95 % bootstrap intervals. Rows that are slower come first, then faster, "
        "unclear and the same ones; among each the largest change."
    )
    return [
        DataTable.of(table, f"changes-{place}", about="" if place else about, tool=not place)
        for place, table in enumerate(comparison_tables(comparison, every=True))
    ]


def draw_changes(comparison: Comparison) -> Figure:
    """Draw the interval of the ratio of rows that changed or are unclear, or of the largest."""
    order = {word: place for place, word in enumerate(VERDICTS)}
    changes = sorted(
        comparison.changes,
        key=lambda c: (order[c.verdict], -abs(math.log(c.ratio.value)), c.name),
    )
    drawn = [change for change in changes if change.verdict != "same"] or changes
    about = (
        "The second run's median over the first's with its 95 % interval: right of 1 is slower. "
        f"The band is the margin of {100 * comparison.margin:g} %, within which a difference does "
        "not matter."
    )
    if len(drawn) > MOST_CHANGES:
        about += f" Drawn are the first {MOST_CHANGES} of {len(drawn):,}."
    drawn = drawn[:MOST_CHANGES]
    says = _says(comparison, drawn)
    chart = _draw(drawn, comparison.margin, f"Change of each row. {says}")
    words = [word for word in VERDICTS if any(change.verdict == word for change in drawn)]
    legend = [
        Entry(
            Markup('<span class="swatch verdict-{}" aria-hidden="true"></span>').format(word), word
        )
        for word in words
    ]
    data = DataTable(
        "changes-data",
        "Changes that are drawn",
        ["row", "verdict", "ratio", "from", "to"],
        [
            [
                change.name,
                change.verdict,
                *(f"{v:.3f}" for v in (change.ratio.value, change.ratio.low, change.ratio.high)),
            ]
            for change in drawn
        ],
        2,
    )
    title = "Changes with their intervals"
    return Figure("changes", title, about, says, [Panel("", chart.markup())], legend, [data])


def _says(comparison: Comparison, drawn: list[Change]) -> str:
    counts = comparison.counts
    words = ", ".join(f"{counts[word]} {word}" for word in VERDICTS)
    mean = comparison.mean_ratio or 1.0
    largest = max(drawn, key=lambda change: abs(math.log(change.ratio.value)))
    return (
        f"{plural(len(comparison.changes), 'row')}: {words}; the geometric mean of the ratios is "
        f"{mean:.3f}. The largest change drawn is {largest.name}: {largest.ratio.value:.3f}, from "
        f"{largest.ratio.low:.3f} to {largest.ratio.high:.3f}, {largest.verdict}."
    )


def _draw(changes: list[Change], margin: float, alt: str) -> Chart:
    row = 36
    chart = Chart(
        430, row * len(changes) + 56, alt, left=14, right=24, top=8, bottom=48, reach=(0.8, 1.3)
    )
    bounds = [end for c in changes for end in (c.ratio.low, c.ratio.high, c.ratio.value)]
    reach = max(1 + 2 * margin, *(max(end, 1 / max(end, 1e-9)) for end in bounds))
    reach = min(reach, 20.0) ** 1.05
    scale = chart.x_scale(1 / reach, reach, log=True)
    inside = scale.at(1 + margin) - scale.at(1 / (1 + margin))
    chart.box(scale.at(1 / (1 + margin)), chart.top, inside, row * len(changes), "band")
    chart.x_axis(scale, _ticks(reach), lambda x: f"{x:g}x", "second run's median over the first's")
    chart.line([(scale.at(1), chart.top), (scale.at(1), chart.bottom)], "axis")
    for place, change in enumerate(changes):
        y = chart.top + place * row + 26
        chart.text(chart.left, y - 11, cut(change.name, 56))
        ends = [(scale.at(end), y) for end in (change.ratio.low, change.ratio.high)]
        chart.line(ends, f"interval verdict-{change.verdict}")
        title = f"{change.name}: {change.ratio.value:.3f}, {change.verdict}"
        x = scale.at(change.ratio.value)
        chart.box(x - 4, y - 4, 8, 8, f"point verdict-{change.verdict}", title)
    return chart


def _ticks(reach: float) -> list[float]:
    """Return places on both sides of 1.

    >>> _ticks(1.12)
    [0.9, 0.95, 1.0, 1.05, 1.1]
    """
    for step in (0.01, 0.02, 0.05, 0.1, 0.2):
        count = int((reach - 1) / step + 1e-9)
        if count <= 2:
            near = [round(1 + step * place, 4) for place in range(-count, count + 1)]
            return [tick for tick in near if 1 / reach <= tick]
    wide = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
    narrow = (0.5, 0.7, 1.0, 1.5, 2.0)
    return [tick for tick in (wide if reach > 2.5 else narrow) if 1 / reach <= tick <= reach]
