"""Latency against context and against batch, with the spread of each row's rounds."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pagedattn.report.html.figure import DataTable, Figure, Panel, left_out, legend_of
from pagedattn.report.html.svg import Chart, colour_of
from pagedattn.report.latency import latency_sections
from pagedattn.report.plots import limited
from pagedattn.report.style import log_ticks, power_ticks
from pagedattn.report.summary import implementations_of, shared
from pagedattn.report.text import MISSING, duration, number, plural, tokens

if TYPE_CHECKING:
    from pagedattn.report.html.svg import Scale
    from pagedattn.report.latency import Block, Point, Section
    from pagedattn.report.style import Look
    from pagedattn.report.summary import Summary

_ABOUT = (
    "The median time of a launch; the bar of each mark goes from the lower to the upper quartile "
    "of its rounds. Both axes are logarithmic. Lines join cases that differ in nothing else; a "
    "hollow mark has other heads, head size, block size or dtype than the panels' usual one, or "
    "sequences of unequal length. A short level line is the case's limit: the least time that the "
    "measured roofs allow."
)


def draw_latency(summary: Summary, looks: dict[str, Look]) -> Figure:
    """Draw a panel for each batch with several contexts and each context with several batches."""
    groups = tuple(limited(group) for group in summary.data)
    sections = latency_sections(replace(summary, data=groups))
    if not sections:
        reason = "no attention row says its kind, batch and context"
        return Figure("latency", "Latency", reason=reason)
    panels: list[Panel] = []
    for section in sections:
        rows = [row for point in section.points for row in point.case.rows.values()]
        lows = [max(row.q1_us, row.median_us / 100) for row in rows]
        limits = [row.limit_us for row in rows if row.limit_us]
        low = max(min(lows + limits), min(lows) / 2.5) / 1.25
        high = max(row.q3_us for row in rows) * 1.3
        for block in section.blocks():
            panels += [_panel(section, block, value, (low, high), looks) for value in block.values]
    cases = [point.case for section in sections for point in section.points]
    says = " ".join(_says(section) for section in sections)
    about = _ABOUT + left_out(summary.data)
    legend = legend_of(looks, implementations_of(cases))
    data = [_table(place, section) for place, section in enumerate(sections, 1)]
    return Figure("latency", "Latency", about, says, panels, legend, data, wide=False)


def _says(section: Section) -> str:
    rows = [(row, point) for point in section.points for row in point.case.rows.values()]
    fastest = min(rows, key=lambda found: found[0].median_us)
    slowest = max(rows, key=lambda found: found[0].median_us)
    widest = max(rows, key=lambda found: (found[0].q3_us - found[0].q1_us) / found[0].median_us)
    spread = (widest[0].q3_us - widest[0].q1_us) / widest[0].median_us
    return (
        f"{section.title}, {plural(len(section.points), 'case')}: from "
        f"{duration(fastest[0].median_us)} ({fastest[0].implementation}, {fastest[1].case.label}) "
        f"to {duration(slowest[0].median_us)} ({slowest[0].implementation}, "
        f"{slowest[1].case.label}); the widest quartiles are {100 * spread:.0f} % of the median "
        f"({widest[0].implementation}, {widest[1].case.label})."
    )


def _panel(
    section: Section,
    block: Block,
    value: int,
    limits: tuple[float, float],
    looks: dict[str, Look],
) -> Panel:
    title = f"{section.title}, {block.title(value)}"
    points = [point for point in section.points if getattr(point, block.fixed) == value]
    points.sort(key=lambda point: (point.batch, point.context))
    names = implementations_of(point.case for point in points)
    chart = Chart(
        340, 240, f"{title}. {_panel_says(points, block)}", left=62, right=12, reach=(0.8, 1.2)
    )
    xs = [getattr(point, block.x) for point in section.points]
    x_scale = chart.x_scale(min(xs) / 2, max(xs) * 2, log=True)
    y_scale = chart.y_scale(*limits, log=True)
    chart.x_axis(x_scale, power_ticks(xs, 6), lambda x: tokens(round(x)), block.x_label)
    chart.y_axis(y_scale, log_ticks(*limits, 6), duration, "")
    for point in points:
        limit = shared(point.case, "limit_us")
        if isinstance(limit, float) and limits[0] <= limit <= limits[1]:
            x = x_scale.at(getattr(point, block.x))
            chart.line([(x - 13, y_scale.at(limit)), (x + 13, y_scale.at(limit))], "limit")
    for place, name in enumerate(names):
        # side by side within 16 pixels, so that equal medians do not hide each other
        shift = 16 * (place / max(1, len(names) - 1) - 0.5)
        own = [point for point in points if name in point.case.rows]
        _draw_line(chart, own, name, looks[name], section, block, (x_scale, y_scale), shift)
    return Panel(title, chart.markup())


def _draw_line(
    chart: Chart,
    points: list[Point],
    name: str,
    look: Look,
    section: Section,
    block: Block,
    scales: tuple[Scale, Scale],
    shift: float,
) -> None:
    x_scale, y_scale = scales
    places = {id(point): x_scale.at(getattr(point, block.x)) + shift for point in points}
    usual = [point for point in points if point.family == section.usual]
    line = [(places[id(point)], y_scale.at(point.case.rows[name].median_us)) for point in usual]
    chart.line(line, f"curve {colour_of(look)}")
    for point in points:
        row, x = point.case.rows[name], places[id(point)]
        chart.line([(x, y_scale.at(row.q1_us)), (x, y_scale.at(row.q3_us))], "whisker")
        title = (
            f"{point.case.label}, {name}: {duration(row.median_us)}, quartiles "
            f"{duration(row.q1_us)} and {duration(row.q3_us)}"
        )
        hollow = point.family != section.usual
        chart.mark(x, y_scale.at(row.median_us), look, hollow=hollow, title=title)


def _panel_says(points: list[Point], block: Block) -> str:
    parts = []
    for name in implementations_of(point.case for point in points):
        own = [point for point in points if name in point.case.rows]
        ends = [own[0], own[-1]] if len(own) > 1 else own
        said = [
            f"{duration(point.case.rows[name].median_us)} at {_place(point, block)}"
            for point in ends
        ]
        parts.append(f"{name}: {' and '.join(said)}")
    return "; ".join(parts) + "."


def _place(point: Point, block: Block) -> str:
    value: int = getattr(point, block.x)
    return f"{tokens(value)} tokens" if block.x == "context" else plural(value, "sequence")


def _table(place: int, section: Section) -> DataTable:
    lines = [
        [
            point.case.label,
            name,
            str(point.batch),
            str(point.context),
            number(row.median_us),
            number(row.q1_us),
            number(row.q3_us),
            MISSING if row.limit_us is None else number(row.limit_us),
        ]
        for point in section.points
        for name, row in point.case.rows.items()
    ]
    header = ["case", "implementation", "sequences", "longest context"]
    header += ["median µs", "q1 µs", "q3 µs", "limit µs"]
    return DataTable(f"latency-data-{place}", section.title, header, lines, 2)
