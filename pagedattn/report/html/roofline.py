"""The roofline: operations per byte against operations a second, under the run's own roofs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from pagedattn.report.html.figure import (
    DataTable,
    Entry,
    Figure,
    Panel,
    left_out,
    legend_of,
    share_text,
)
from pagedattn.report.html.svg import Chart
from pagedattn.report.plots import limited
from pagedattn.report.style import log_ticks
from pagedattn.report.text import MISSING, flops_rate, number, plural

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pagedattn.report.rows import Row
    from pagedattn.report.style import Look
    from pagedattn.report.summary import Summary

_ABOUT = (
    "Each mark is a row: the operations that it needs for a byte that it must read, and the "
    "operations a second that it did at its median. Memory allows no more than the slanted roof, "
    "the matrix units no more than the flat one. Both were measured on the same device by the run."
)


@dataclass(frozen=True, slots=True)
class Roof:
    """A device's limits; None where the run did not measure them.

    `read` is in GB/s, `peak` in TFLOP/s.
    """

    read: float | None
    peak: float | None

    def at(self, intensity: float) -> float | None:
        """Return the TFLOP/s that are possible at so many operations a byte."""
        slanted = None if self.read is None else 1e-3 * self.read * intensity
        limits = [limit for limit in (slanted, self.peak) if limit is not None]
        return min(limits, default=None)


def roof_of(rows: Iterable[Row]) -> Roof:
    """Return the roofs that rows of one device were measured against.

    The read bandwidth is in the rows. The matrix rate follows from the limit of a row that
    arithmetic bounds: its operations over its limit. The highest, if several runs differ. Over fp8
    that may be of products in fp8, so such rows say nothing of it.
    """
    rows = list(rows)
    reads = [row.measured_read_gb_per_s for row in rows if row.measured_read_gb_per_s]
    peaks = [
        row.flops / row.limit_us * 1e-6
        for row in rows
        if row.flops and row.limit_us and row.bytes and row.measured_read_gb_per_s
        if row.dtype != "float8_e4m3"
        # 1e-3 GB/s is a byte in a microsecond
        if row.limit_us > 1.01 * row.bytes / row.measured_read_gb_per_s * 1e-3
    ]
    return Roof(max(reads, default=None), max(peaks, default=None))


def draw_roofline(summary: Summary, looks: dict[str, Look]) -> Figure:
    """Draw a panel for each device that has rows with bytes and operations."""
    found: dict[str, list[tuple[str, Row]]] = {}
    everything: dict[str, list[Row]] = {}
    for group in summary.data:
        for case in group.cases:
            everything.setdefault(group.device, []).extend(case.rows.values())
        for case in limited(group).cases:
            for row in case.rows.values():
                if row.bytes and row.flops:
                    found.setdefault(group.device, []).append((case.label, row))
    if not found:
        return Figure("roofline", "Roofline", reason="no row says its bytes and operations")
    panels, sentences, data = [], [], []
    for place, (device, points) in enumerate(found.items(), 1):
        roof = roof_of(everything[device])
        says = _says(device, points, roof)
        chart = _draw(points, roof, looks, f"Roofline of {device}. {says}")
        panels.append(Panel(f"on {device}", chart.markup()))
        sentences.append(says)
        data.append(_table(place, device, points, roof))
    names = sorted({row.implementation for points in found.values() for _, row in points})
    return Figure(
        "roofline",
        "Roofline",
        _ABOUT + left_out(summary.data),
        " ".join(sentences),
        panels,
        [*legend_of(looks, names), *_roof_entries()],
        data,
    )


def _roof_entries() -> list[Entry]:
    line = Markup(
        '<svg class="key" aria-hidden="true" viewBox="0 0 26 16" width="26" height="16">'
        '<path class="roof" d="M1 8H25"/></svg>'
    )
    return [Entry(line, "measured roof")]


def _flops_tick(rate: float) -> str:
    """Return a round rate for an axis.

    >>> _flops_tick(100.0), _flops_tick(0.01)
    ('100 TFLOP/s', '10 GFLOP/s')
    """
    return f"{rate:g} TFLOP/s" if rate >= 1 else f"{1e3 * rate:g} GFLOP/s"


def _intensity(row: Row) -> float:
    return (row.flops or 0.0) / (row.bytes or 1.0)


def _rate(row: Row) -> float:
    return (row.flops or 0.0) / row.median_us * 1e-6


def _limit(row: Row, roof: Roof) -> float | None:
    """Return the TFLOP/s that a row says are possible for it, or else those of the roofs."""
    if row.flops and row.limit_us:
        return row.flops / row.limit_us * 1e-6
    return roof.at(_intensity(row))


def _share(row: Row, roof: Roof) -> float | None:
    limit = _limit(row, roof)
    return None if not limit else _rate(row) / limit


def _says(device: str, points: list[tuple[str, Row]], roof: Roof) -> str:
    parts = [f"{plural(len(points), 'row')} on {device}"]
    if roof.read is None:
        parts.append("the run measured no roofs")
        return "; ".join(parts) + "."
    parts.append(f"read roof {number(roof.read)} GB/s")
    if roof.peak is not None:
        ridge = 1e3 * roof.peak / roof.read
        right = sum(_intensity(row) > ridge for _, row in points)
        parts.append(
            f"matrix roof {flops_rate(roof.peak)}, reached from {ridge:.0f} operations a byte on, "
            f"where {plural(right, 'row')} {'lies' if right == 1 else 'lie'}"
        )
    shares = [(_share(row, roof) or 0.0, label, row) for label, row in points]
    for word, (share, label, row) in (
        ("nearest to its roof", max(shares, key=lambda point: point[0])),
        ("farthest", min(shares, key=lambda point: point[0])),
    ):
        parts.append(f"{word}: {label} by {row.implementation} with {share_text(share)}")
    return "; ".join(parts) + "."


def _draw(points: list[tuple[str, Row]], roof: Roof, looks: dict[str, Look], alt: str) -> Chart:
    chart = Chart(680, 400, alt, left=92)
    xs, ys = [_intensity(row) for _, row in points], [_rate(row) for _, row in points]
    ridge = 1e3 * roof.peak / roof.read if roof.peak and roof.read else None
    x_low, x_high = min(xs) / 1.7, max([*xs, 3 * (ridge or 0.0)]) * 1.7
    tops = [roof.at(x) for x in (x_low, x_high)]
    y_high = max([*ys, *(top for top in tops if top)]) * 1.8
    x_scale = chart.x_scale(x_low, x_high, log=True)
    y_scale = chart.y_scale(min(ys) / 1.6, y_high, log=True)
    chart.x_axis(
        x_scale, log_ticks(x_low, x_high, 9), lambda x: f"{x:g}", "operations a byte [FLOP/byte]"
    )
    chart.y_axis(y_scale, log_ticks(y_scale.low, y_high, 8), _flops_tick, "")
    corners = [x for x in (x_low, ridge, x_high) if x is not None]
    line = [(x_scale.at(x), y_scale.at(top)) for x in corners if (top := roof.at(x))]
    chart.line(line, "roof")
    if roof.peak is not None:
        chart.text(chart.right - 4, y_scale.at(roof.peak) - 7, flops_rate(roof.peak), anchor="end")
    if roof.read is not None:
        # beside the slanted part, at the height that its middle has
        x = (x_low * (ridge or x_high)) ** 0.5
        chart.text(
            x_scale.at(x) - 8,
            y_scale.at(roof.at(x) or 1.0) - 6,
            f"{number(roof.read)} GB/s",
            anchor="end",
        )
    for label, row in points:
        share = _share(row, roof)
        of_roof = "" if share is None else f", {share_text(share)} of its roof"
        title = f"{label}, {row.implementation}: {flops_rate(_rate(row))}{of_roof}"
        place = (x_scale.at(_intensity(row)), y_scale.at(_rate(row)))
        chart.mark(*place, looks[row.implementation], title=title)
    return chart


def _table(place: int, device: str, points: list[tuple[str, Row]], roof: Roof) -> DataTable:
    lines = [
        [
            label,
            row.implementation,
            number(_intensity(row)),
            number(_rate(row)),
            MISSING if (limit := _limit(row, roof)) is None else number(limit),
            share_text(_share(row, roof)),
        ]
        for label, row in points
    ]
    header = ["case", "implementation", "FLOP/byte", "TFLOP/s", "roof TFLOP/s", "share of roof"]
    return DataTable(f"roofline-data-{place}", f"Roofline on {device}", header, lines, 2)
