"""A panel of horizontal lines, one for each case and implementation, with their labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from pagedattn.report.style import INK, ROOF, Look, Page, label, log_ticks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from matplotlib.axes import Axes

    from pagedattn.report.rows import Row
    from pagedattn.report.summary import Case

_BAR, _CASE_GAP = 0.17, 0.14
_TITLE, _FOOT = 0.4, 0.75
_NOTE_WIDTH = 0.75


@dataclass(frozen=True, slots=True)
class Line:
    """A row's line, `y` inches below the panel's top; its value, and those at the quartiles."""

    y: float
    row: Row
    value: float
    low: float
    high: float


class Panel:
    """Axes below `top` inches of the page; `bottom` is where they and their labels end.

    Every case has a line for each of its rows, at `value_at(row, microseconds)`.
    """

    def __init__(
        self,
        page: Page,
        title: str,
        cases: list[Case],
        top: float,
        label_width: float,
        value_at: Callable[[Row, float], float],
    ) -> None:
        self.lines: list[Line] = []
        self._spans: list[tuple[float, float]] = []
        y = _CASE_GAP / 2
        for case in cases:
            start = y
            y += _CASE_GAP / 2
            for row in case.rows.values():
                ends = sorted(value_at(row, us) for us in (row.q1_us or row.median_us, row.q3_us))
                self.lines.append(Line(y + _BAR / 2, row, value_at(row, row.median_us), *ends))
                y += _BAR
            y += _CASE_GAP / 2
            self._spans.append((start, y))
        height = y + _CASE_GAP / 2
        self._width = page.width - label_width - 0.25
        self.axes = self._axes(page, title, (label_width, top + _TITLE, self._width, height))
        self.axes.set_yticks(
            [sum(span) / 2 for span in self._spans],
            [label(case.label) for case in cases],
            fontsize=10.5,
        )
        self.bottom = top + _TITLE + height + _FOOT

    def _axes(self, page: Page, title: str, box: tuple[float, float, float, float]) -> Axes:
        """Make axes whose y counts inches downwards, every second case on a grey ground."""
        axes = page.axes(*box)
        axes.set_ylim(box[3], 0)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_title(label(title, 80))
        for low, high in self._spans[::2]:
            axes.axhspan(low, high, color="#f4f4f4", linewidth=0, zorder=0)
        return axes

    def draw_bars(self, looks: dict[str, Look], start: float) -> None:
        """Draw a bar from `start` to each line's value, and whiskers at the quartiles."""
        half = _BAR * 0.47
        for name, lines in self._by_implementation():
            look = looks[name]
            corners = [
                [
                    *((start, line.y - half), (line.value, line.y - half)),
                    *((line.value, line.y + half), (start, line.y + half)),
                ]
                for line in lines
            ]
            bars = PolyCollection(
                corners, facecolor=look.colour, hatch=look.hatch, linewidth=0, zorder=2
            )
            self.axes.add_collection(bars, autolim=False)
        self._draw_whiskers()

    def draw_markers(self, looks: dict[str, Look]) -> None:
        """Draw a marker at each line's value, and whiskers that are wider than it."""
        self._draw_whiskers()
        for name, lines in self._by_implementation():
            look = looks[name]
            self.axes.plot(
                [line.value for line in lines],
                [line.y for line in lines],
                look.marker,
                color=look.colour,
                markersize=8,
                markeredgecolor=INK,
                markeredgewidth=0.6,
                zorder=3.5,
            )

    def _by_implementation(self) -> list[tuple[str, list[Line]]]:
        """Lines of each implementation: one artist for all takes a fraction of the time."""
        found: dict[str, list[Line]] = {}
        for line in self.lines:
            found.setdefault(line.row.implementation, []).append(line)
        return list(found.items())

    def _draw_whiskers(self) -> None:
        ends = [((line.low, line.y), (line.high, line.y)) for line in self.lines]
        whiskers = LineCollection(ends, colors=INK, linewidths=1.3, zorder=3)
        self.axes.add_collection(whiskers, autolim=False)
        xs, ys = zip(*(end for both in ends for end in both), strict=True)
        self.axes.plot(xs, ys, "|", color=INK, markersize=5, zorder=3)

    def draw_roofs(self, roofs: list[float | None]) -> None:
        """Draw a dashed line down the panel, at each case's own roof."""
        points = [
            (roof or float("nan"), y)
            for span, roof in zip(self._spans, roofs, strict=True)
            for y in span
        ]
        xs, ys = zip(*points, strict=True)
        self.axes.plot(xs, ys, color=ROOF, linestyle="--", linewidth=1.8, zorder=1.5)

    def scale_from_zero(self, furthest: float, unit: str) -> None:
        """Count from 0 to `furthest`, with room for notes."""
        self.axes.set_xlim(0, (furthest or 1.0) * self._width / (self._width - _NOTE_WIDTH))
        self.axes.xaxis.set_major_locator(MaxNLocator(6))
        self.axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        self.axes.set_xlabel(unit)

    def scale_by_factors(
        self,
        start: float | None,
        shown: Callable[[float], str],
        title: str,
        *,
        both_sides: bool = False,
    ) -> None:
        """Fit a logarithmic axis to the lines and `start`, with room for notes.

        The room is at the right, and at the left if a line ends before `start` or `both_sides`.
        """
        extra = [] if start is None else [start]
        low = min([line.low for line in self.lines] + extra) / 1.15
        high = max([line.high for line in self.lines] + extra) * 1.15
        starts_before = start is not None and min(line.value for line in self.lines) < start
        sides = 2 if both_sides or starts_before else 1
        margin = (high / low) ** (_NOTE_WIDTH / (self._width - sides * _NOTE_WIDTH))
        low, high = low / (margin if sides == 2 else 1.0), high * margin
        self.axes.set_xscale("log")
        self.axes.set_xlim(low, high)
        self.axes.xaxis.set_major_locator(FixedLocator(log_ticks(low, high, 7)))
        self.axes.xaxis.set_minor_locator(NullLocator())
        self.axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value)))
        self.axes.set_xlabel(title)

    def write_notes(
        self,
        shown: Callable[[float], str],
        start: float = 0.0,
        others: Mapping[int, float] | None = None,
    ) -> None:
        """Write each line's value at its far end, seen from `start`.

        Where `others` has another value for the `id` of a line's row, seen from that.
        """
        for line in self.lines:
            is_left = line.value < (others or {}).get(id(line.row), start)
            end = min(line.low, line.value) if is_left else max(line.high, line.value)
            self._write(shown(line.value), end, line.y, is_left)

    def draw_ratios(
        self, looks: dict[str, Look], others: Mapping[int, float], shown: Callable[[float], str]
    ) -> None:
        """Draw a link from each line to its row's value in `others`, and their ratio at its end.

        `others` has values by the `id` of a row, `shown` gets the other value over the line's.
        """
        for line in self.lines:
            other = others.get(id(line.row))
            if other is None:
                continue
            colour = looks[line.row.implementation].colour
            self.axes.plot(
                [line.value, other],
                [line.y, line.y],
                color=colour,
                linewidth=3.2,
                alpha=0.4,
                solid_capstyle="butt",
                zorder=2,
            )
            self._write(shown(other / line.value), other, line.y, other < line.value, "bold")

    def _write(
        self, text: str, end: float, y: float, is_left: bool, weight: str = "normal"
    ) -> None:
        self.axes.annotate(
            text,
            (end, y),
            xytext=(-5 if is_left else 5, 0),
            textcoords="offset points",
            horizontalalignment="right" if is_left else "left",
            verticalalignment="center_baseline",
            fontsize=8.5,
            fontweight=weight,
            zorder=5,
            bbox={"boxstyle": "square,pad=0.06", "fc": "white", "lw": 0, "alpha": 0.6},
        )
