"""The heat map: how many times faster than the baseline each implementation is at each workload."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pagedattn.report.html.figure import DataTable, Figure, Panel, left_out
from pagedattn.report.html.svg import LETTER, Chart
from pagedattn.report.plots import num_drawn
from pagedattn.report.summary import implementations_of
from pagedattn.report.text import cut, duration, plural, times

if TYPE_CHECKING:
    from pagedattn.report.summary import Case, Group, Summary

_ABOUT = (
    "The median of the baseline over that of the implementation: 2x took half the time, 0.5x twice "
    "the time. The deeper the colour the farther from 1x, green is faster and red slower; every "
    "cell has its number. An empty cell was not measured."
)
_ROW, _CELL = 21, 92
_STEPS = (1.05, 1.2, 1.5, 2.5, 5.0)
"""Ratios at which a cell's colour deepens."""


def draw_heatmap(summary: Summary) -> Figure:
    """Draw a panel for each area and device that compares implementations with a baseline."""
    panels: list[Panel] = []
    sentences, data = [], []
    for group in (*summary.data, *summary.bookkeeping):
        baseline = baseline_of(group, summary.baseline)
        if baseline is None:
            continue
        cases = [case for case in group.cases if baseline in case.rows and len(case.rows) > 1]
        cases = cases[: num_drawn(group)]
        if not cases:
            continue
        says = _says(cases, baseline)
        chart = _draw(cases, baseline, f"{group.title}. {says}")
        place = len(panels) + 1
        panels.append(Panel(f"{group.title}, over {cut(baseline, 48)}", chart.markup()))
        sentences.append(f"{group.title}: {says}")
        data.append(_table(f"heatmap-data-{place}", group, cases, baseline))
    if not panels:
        reason = "no workload was measured with a baseline and another implementation"
        return Figure("heatmap", "Speed-up", reason=reason)
    about = _ABOUT + left_out((*summary.data, *summary.bookkeeping))
    return Figure("heatmap", "Speed-up", about, " ".join(sentences), panels, data=data)


def baseline_of(group: Group, baseline: str | None) -> str | None:
    """Return what a group's speed-ups are over: its peer, or the run's baseline if it has it."""
    if group.peer is not None:
        return group.peer
    names = group.implementations
    return baseline if len(names) > 1 and baseline in names else None


def _ratios(cases: list[Case], baseline: str) -> list[tuple[float, str, Case]]:
    return [
        (ratio, name, case)
        for case in cases
        for name in case.rows
        if name != baseline and (ratio := case.speedup(name, baseline)) is not None
    ]


def _says(cases: list[Case], baseline: str) -> str:
    ratios = _ratios(cases, baseline)
    names = sorted({name for _, name, _ in ratios})
    parts = [
        f"{name} is faster than {baseline} in {sum(ratio > 1 for ratio in own)} of {len(own)}"
        for name in names
        if (own := [ratio for ratio, other, _ in ratios if other == name])
    ]
    low, high = (choose(ratios, key=lambda found: found[0]) for choose in (min, max))
    return (
        f"{plural(len(cases), 'workload')}: {', '.join(parts)}; from {times(low[0])} "
        f"({low[1]}, {low[2].label}) to {times(high[0])} ({high[1]}, {high[2].label})."
    )


def shade(ratio: float) -> str:
    """Return the class of a cell's colour.

    >>> shade(1.0), shade(1.3), shade(0.1)
    ('level0', 'up2', 'down5')
    """
    level = sum(max(ratio, 1 / ratio) >= step for step in _STEPS)
    return "level0" if not level else f"{'up' if ratio > 1 else 'down'}{level}"


def _draw(cases: list[Case], baseline: str, alt: str) -> Chart:
    names = [name for name in implementations_of(cases) if name != baseline]
    labels = [cut(case.label, 44) for case in cases]
    left = 14 + LETTER * max(map(len, labels))
    widths = [max(_CELL, 14 + LETTER * min(len(name), 24)) for name in names]
    height = 26 + _ROW * len(cases) + 4
    chart = Chart(left + sum(widths) + 4, height, alt, left=left, right=4, top=26, bottom=4)
    x = left
    for name, width in zip(names, widths, strict=True):
        chart.text(x + width / 2, 16, cut(name, 24), anchor="middle", kind="label")
        x += width
    for place, (case, label) in enumerate(zip(cases, labels, strict=True)):
        y = chart.top + place * _ROW
        chart.text(left - 8, y + 15, label, anchor="end")
        x = left
        for name, width in zip(names, widths, strict=True):
            ratio = case.speedup(name, baseline)
            if ratio is not None:
                ours, theirs = (case.rows[one].median_us for one in (name, baseline))
                title = f"{case.label}: {name} {duration(ours)}, {baseline} {duration(theirs)}"
                chart.box(x + 1, y + 1, width - 2, _ROW - 2, f"cell {shade(ratio)}", title)
                chart.text(x + width / 2, y + 15, times(ratio), anchor="middle", kind="value")
            x += width
    return chart


def _table(identity: str, group: Group, cases: list[Case], baseline: str) -> DataTable:
    names = [name for name in implementations_of(cases) if name != baseline]
    lines = [
        [
            case.label,
            duration(case.rows[baseline].median_us),
            *(duration(case.rows[name].median_us) if name in case.rows else "-" for name in names),
            *(times(case.speedup(name, baseline)) for name in names),
        ]
        for case in cases
    ]
    header = ["workload", baseline, *names, *(f"{name} over {baseline}" for name in names)]
    return DataTable(identity, group.title, header, lines, 1)
