"""The latency plot: time against context and batch, a panel for each value of the other."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from pagedattn.report.style import (
    INK,
    Look,
    Page,
    line_handle,
    log_ticks,
    marker_handle,
    power_ticks,
)
from pagedattn.report.summary import Case, Summary, implementations_of, shared
from pagedattn.report.text import cut, duration, plural, tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 3
_PANELS_WIDTH = 10.0
_LEFT, _GAP = 0.95, 0.3
_PANEL_HEIGHT, _TITLES, _TICKS, _LABEL = 2.1, 0.36, 0.32, 0.36
_OPTIONS = ("window", "soft_cap", "alibi", "sinks")
_SHAPE = ("num_query_heads", "num_kv_heads", "head_size", "block_size", "dtype", *_OPTIONS)
_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Point:
    """A case at its batch and longest context; `family` is what else tells its shape apart."""

    case: Case
    batch: int
    context: int
    family: tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Section:
    """One kind of attention on one device; `usual` is the family that most of its points have."""

    title: str
    points: list[Point]
    usual: tuple[object, ...]

    def blocks(self) -> list[Block]:
        """Return the panels against context and those against batch.

        A batch has a panel if it has several contexts, and a context if it has several batches. A
        point that is on none of these is shown on a panel of its batch.
        """
        contexts, batches = _partners(self.points, "batch"), _partners(self.points, "context")
        lone = {
            point.batch
            for point in self.points
            if len(contexts[point.batch]) < 2 and len(batches[point.context]) < 2
        }
        by_batch = [size for size, seen in contexts.items() if len(seen) > 1 or size in lone]
        by_context = [length for length, seen in batches.items() if len(seen) > 1]
        blocks = [Block("context", "batch", by_batch), Block("batch", "context", by_context)]
        return [block for block in blocks if block.values]


@dataclass(frozen=True, slots=True)
class Block:
    """Panels with the same x, one for each value of what is fixed in them."""

    x: Literal["context", "batch"]
    fixed: Literal["context", "batch"]
    values: list[int]

    @property
    def x_label(self) -> str:
        """What stands along the panels."""
        return "longest context [tokens]" if self.x == "context" else "batch [sequences]"

    def title(self, value: int) -> str:
        """Say what is fixed in a panel."""
        return plural(value, "sequence") if self.fixed == "batch" else f"{tokens(value)} tokens"


def _partners(points: list[Point], fixed: Literal["context", "batch"]) -> dict[int, set[int]]:
    """Return the values of the other dimension that are seen at each value of the fixed one."""
    seen: dict[int, set[int]] = {}
    for point in points:
        here, other = (point.batch, point.context)[:: 1 if fixed == "batch" else -1]
        seen.setdefault(here, set()).add(other)
    return dict(sorted(seen.items()))


def draw_latency(summary: Summary, looks: dict[str, Look]) -> Figure | str:
    """Draw the attention rows that say their batch and context, or say why there is nothing."""
    sections = latency_sections(summary)
    if not sections:
        return "no attention row says its kind, batch and context"
    cases = [point.case for section in sections for point in section.points]
    handles = [marker_handle(looks[name]) for name in implementations_of(cases)]
    subtitle = (
        "Median time of one launch with quartiles, against the longest context and the batch."
    )
    if any(point.family != section.usual for section in sections for point in section.points):
        subtitle += (
            " Hollow: other heads, head size, block size or dtype than the panels' usual one, or"
            " sequences of unequal length."
        )
    if any(shared(case, "limit_us") for case in cases):
        handles.append(line_handle("limit (roofline)", "-"))
    page = Page(_LEFT + _PANELS_WIDTH + 0.3, "Latency", subtitle, handles)
    top = page.top
    for section in sections:
        top = _draw_section(page, section, top, looks)
    return page.finish(top + 0.05)


def latency_sections(summary: Summary) -> list[Section]:
    """Put the cases of attention that say their batch and context together, by kind and device."""
    sections: dict[tuple[str, str], list[Point]] = {}
    for group in summary.data:
        for case in group.cases if group.area == "attention" else ():
            batch, context, kind = (shared(case, name) for name in ("batch", "context", "kind"))
            if isinstance(batch, int) and isinstance(context, int) and batch and context and kind:
                point = Point(case, batch, context, _family(case, batch, context))
                sections.setdefault((str(kind), group.device), []).append(point)
    return [
        Section(cut(f"{kind} on {device}", 60), points, _most_common(points))
        for (kind, device), points in sections.items()
    ]


def _family(case: Case, batch: int, context: int) -> tuple[object, ...]:
    """Return what else tells two shapes apart; the last item is whether lengths are unequal.

    Lengths are unequal if the bytes that must move are less than 90 % of what `batch` sequences of
    `context` tokens have. Under a window they move less, and nothing is said of their lengths.
    """
    shape = tuple(shared(case, name) for name in _SHAPE)
    total, heads, size, dtype = (
        shared(case, name) for name in ("bytes", "num_kv_heads", "head_size", "dtype")
    )
    element = _DTYPE_BYTES.get(str(dtype))
    if not (isinstance(total, float) and isinstance(heads, int) and isinstance(size, int)):
        return (*shape, False)
    if shared(case, "window") is not None:
        return (*shape, False)
    return (*shape, bool(element and total < 0.9 * 2 * batch * context * heads * size * element))


def _most_common(points: list[Point]) -> tuple[object, ...]:
    return Counter(point.family for point in points).most_common(1)[0][0]


def _draw_section(page: Page, section: Section, top: float, looks: dict[str, Look]) -> float:
    """Draw a section's panels below `top`, in inches, and return where it ends."""
    rows = [row for point in section.points for row in point.case.rows.values()]
    times = [row.q3_us for row in rows] + [max(row.q1_us, row.median_us / 100) for row in rows]
    limits = [row.limit_us for row in rows if row.limit_us]
    low = max(min(times + limits), min(times) / 2.5) / 1.25
    y_limits = (low, max(times) * 1.3)
    for block in section.blocks():
        xs = [getattr(point, block.x) for point in section.points]
        columns = min(_COLUMNS, max(2, len(block.values)))
        width = (_PANELS_WIDTH - _GAP * (columns - 1)) / columns
        for i, value in enumerate(block.values):
            line, column = divmod(i, columns)
            panel_top = top + _TITLES + line * (_PANEL_HEIGHT + _TITLES + _TICKS)
            axes = page.axes(_LEFT + column * (width + _GAP), panel_top, width, _PANEL_HEIGHT)
            axes.set_title(f"{section.title}, {block.title(value)}", fontsize=11)
            _scale(axes, xs, y_limits, width)
            axes.set_xlabel(block.x_label if i + columns >= len(block.values) else "")
            if column:
                axes.tick_params(axis="y", labelleft=False, length=0)
            else:
                axes.set_ylabel("median time", fontsize=10)
            points = [point for point in section.points if getattr(point, block.fixed) == value]
            _draw_panel(axes, points, section.usual, looks, block.x, _spread(xs, axes, width))
        num_lines = -(-len(block.values) // columns)
        top += num_lines * (_TITLES + _PANEL_HEIGHT + _TICKS) + _LABEL
    return top


def _scale(axes: Axes, xs: list[int], y_limits: tuple[float, float], width: float) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(min(xs) / 2, max(xs) * 2)
    axes.set_ylim(y_limits)
    axes.xaxis.set_major_locator(FixedLocator(power_ticks(xs, int(width * 1.6))))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens(round(value))))
    axes.yaxis.set_major_locator(FixedLocator(log_ticks(*y_limits, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: duration(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())


def _spread(xs: list[int], axes: Axes, width: float) -> float:
    """Return how many octaves the implementations of one x are spread over.

    At most half an inch, 0.6 octaves, and 0.4 of the smallest distance between two places that are
    half an octave or more apart, so that x stays readable.
    """
    low, high = axes.get_xlim()
    places = [math.log2(x) for x in sorted(set(xs))]
    gaps = [later - place for place, later in pairwise(places)]
    half_inch = 0.5 / width * math.log2(high / low)
    return min([0.4 * gap for gap in gaps if gap >= 0.5] + [0.6, half_inch])


def _draw_panel(
    axes: Axes,
    points: list[Point],
    usual: tuple[object, ...],
    looks: dict[str, Look],
    x: Literal["context", "batch"],
    spread: float,
) -> None:
    """Draw implementations side by side over `spread` octaves; lines join the usual shapes."""
    names = implementations_of(point.case for point in points)
    for i, name in enumerate(names):
        shift = 2.0 ** (spread * (i / max(1, len(names) - 1) - 0.5))
        look = looks[name]
        for is_usual in (False, True):
            chosen = [
                (getattr(point, x) * shift, point.case.rows[name])
                for point in sorted(points, key=lambda point: (point.batch, point.context))
                if name in point.case.rows and (point.family == usual) is is_usual
            ]
            axes.errorbar(
                [place for place, _ in chosen],
                [row.median_us for _, row in chosen],
                yerr=[
                    [row.median_us - row.q1_us for _, row in chosen],
                    [row.q3_us - row.median_us for _, row in chosen],
                ],
                color=look.colour,
                linestyle="-" if is_usual else "none",
                linewidth=1.6,
                marker=look.marker,
                markersize=6.5,
                markerfacecolor=look.colour if is_usual else "white",
                markeredgecolor=INK if is_usual else look.colour,
                markeredgewidth=0.6 if is_usual else 1.4,
                elinewidth=1.4,
                capsize=2.5,
                zorder=3,
            )
    for point in points:
        limit = shared(point.case, "limit_us")
        if isinstance(limit, float) and limit:
            reach = 2.0 ** (0.7 * spread)
            ends = [getattr(point, x) / reach, getattr(point, x) * reach]
            axes.plot(ends, [limit, limit], color=INK, linewidth=1.8, zorder=2)
