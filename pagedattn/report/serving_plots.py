"""The plots of serving engines: rates and waits against users, and what memory was used for."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from pagedattn.report.serving import Engine, engines
from pagedattn.report.style import (
    COLOURS,
    INK,
    Look,
    Page,
    label,
    line_handle,
    log_ticks,
    marker_handle,
)
from pagedattn.report.text import duration, number, plural

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pagedattn.report.rows import Row
    from pagedattn.report.summary import Summary

_WIDTH, _LEFT, _GAP, _RIGHT = 10.0, 0.8, 0.85, 0.2
_TITLE, _HEIGHT, _FOOT = 0.62, 2.5, 0.62
_MARGIN, _LINE, _LETTERS = 0.2, 0.18, 95  # of a group's title: inches, inches, letters a line
_BAR = 0.3
_GIB = 2**30
_WEIGHTS, _USED, _FREE, _GRAPHS, _REST = COLOURS[0], COLOURS[2], "#a9dcc9", COLOURS[4], "#bbbbbb"


def draw_serving(summary: Summary, looks: dict[str, Look]) -> Figure | str:
    """Draw each model's rates and waits against users, and its rate with all at once."""
    found = engines(summary)
    swept = _by_title([engine for engine in found if engine.sweep])
    full = _by_title([engine for engine in found if engine.throughput is not None])
    if not swept and not full:
        return "no row is of a sweep over users or of all requests at once"
    names = sorted({engine.implementation for engine in found})
    handles = [marker_handle(looks[name]) for name in names]
    subtitle = "Clients that send their next request when they have an answer."
    if swept:
        subtitle += " Lines: medians; dashed: the 99th percentile; ringed: the knee."
        handles.append(line_handle("99th percentile", "--"))
    page = Page(_WIDTH, "Serving", subtitle, handles)
    top = page.top
    for title, group in swept.items():
        top += _head_height(title)
        width = (_WIDTH - _LEFT - 2 * _GAP - _RIGHT) / 3
        axes = [
            page.axes(_LEFT + place * (width + _GAP), top, width, _HEIGHT) for place in range(3)
        ]
        _head(axes[0], title)
        _draw_lines(axes[0], group, looks, "output tokens a second", _rate, None)
        _draw_lines(axes[1], group, looks, "wait for the first token", _first, _first_99)
        _draw_lines(axes[2], group, looks, "time between tokens", _between, _between_99)
        top += _HEIGHT + _FOOT
    for name, group in full.items():
        title = f"{name}: {_at_once(group)}"
        top += _head_height(title)
        height = _BAR * len(group) + 0.1
        side = min(4.2, 0.3 + 0.085 * max(len(engine.implementation) for engine in group))
        axes_of_bars = page.axes(side, top, _WIDTH - side - 1.0, height)
        _head(axes_of_bars, title)
        _draw_bars(axes_of_bars, group, looks)
        top += height + _FOOT
    return page.finish(top)


def _by_title(found: list[Engine]) -> dict[str, list[Engine]]:
    groups: dict[str, list[Engine]] = {}
    for engine in found:
        groups.setdefault(engine.title, []).append(engine)
    return groups


def _lines(title: str) -> list[str]:
    return textwrap.wrap(label(title, 300), _LETTERS)


def _head(axes: Axes, title: str) -> None:
    axes.annotate(
        "\n".join(_lines(title)),
        (_MARGIN / _WIDTH, 1.0),
        xycoords=("figure fraction", "axes fraction"),
        xytext=(0, 22),
        textcoords="offset points",
        fontsize=11.5,
        fontweight="bold",
        linespacing=1.1,
    )


def _head_height(title: str) -> float:
    return _TITLE + _LINE * (len(_lines(title)) - 1)


def _at_once(group: list[Engine]) -> str:
    row = group[0].throughput
    return f"{plural((row.num_requests if row else 0) or 0, 'request')} at once"


def _rate(row: Row) -> float | None:
    return row.output_tokens_per_s


def _first(row: Row) -> float | None:
    return row.first_token_p50_us


def _first_99(row: Row) -> float | None:
    return row.first_token_p99_us


def _between(row: Row) -> float | None:
    return row.inter_token_p50_us


def _between_99(row: Row) -> float | None:
    return row.inter_token_p99_us


def _draw_lines(
    axes: Axes,
    group: list[Engine],
    looks: dict[str, Look],
    title: str,
    value: Callable[[Row], float | None],
    high: Callable[[Row], float | None] | None,
) -> None:
    """Draw a line for each engine; times are microseconds on a logarithmic scale."""
    axes.set_title(title, fontsize=10.5, fontweight="normal")
    seen: list[float] = []
    users: set[int] = set()
    for engine in group:
        look = looks[engine.implementation]
        rows = [row for row in engine.sweep if value(row)]
        places = [row.num_users or 1 for row in rows]
        middle = [value(row) or 0.0 for row in rows]
        users.update(places)
        seen += middle
        axes.plot(
            places,
            middle,
            color=look.colour,
            marker=look.marker,
            markersize=6,
            markeredgecolor=INK,
            markeredgewidth=0.5,
            linewidth=1.8,
            zorder=3,
        )
        if high is not None:
            above = [high(row) or 0.0 for row in rows]
            seen += [one for one in above if one]
            axes.plot(places, above, color=look.colour, linestyle="--", linewidth=1.4, zorder=2.5)
        knee = engine.knee
        if knee is not None and knee in rows:
            axes.plot(
                [knee.num_users or 1],
                [value(knee) or 0.0],
                marker="o",
                markersize=13,
                markerfacecolor="none",
                markeredgecolor=INK,
                zorder=4,
            )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted(users)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))
    axes.tick_params(labelsize=9)
    axes.set_xlabel("users at once", fontsize=9.5)
    if not seen:
        return
    if high is None:
        axes.set_ylim(0, 1.12 * max(seen))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:,.0f}"))
    else:
        low, top = min(seen) / 1.4, max(seen) * 1.4
        axes.set_yscale("log")
        axes.set_ylim(low, top)
        axes.yaxis.set_major_locator(FixedLocator(log_ticks(low, top, 6)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: duration(tick)))


def _draw_bars(axes: Axes, group: list[Engine], looks: dict[str, Look]) -> None:
    rows = [engine.throughput for engine in group]
    rates = [(row.output_tokens_per_s if row else None) or 0.0 for row in rows]
    for place, (engine, rate) in enumerate(zip(group, rates, strict=True)):
        look = looks[engine.implementation]
        axes.barh(
            place, rate, 0.7, color=look.colour, hatch=look.hatch, edgecolor="white", zorder=3
        )
        axes.annotate(
            f"{number(rate)}",
            (rate, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
        )
    axes.set_yticks(range(len(group)), [label(engine.implementation, 48) for engine in group])
    axes.tick_params(labelsize=9.5)
    axes.set_ylim(len(group) - 0.45, -0.55)
    axes.set_xlim(0, 1.12 * (max(rates) or 1.0))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:,.0f}"))
    axes.set_xlabel("output tokens a second", fontsize=9.5)
    axes.grid(visible=False, axis="y")


def draw_serving_memory(summary: Summary, looks: dict[str, Look]) -> Figure | str:
    """Draw what each engine's memory is used for, and its blocks in use over time."""
    found = [
        (engine, engine.memory)
        for engine in engines(summary)
        if engine.memory is not None and (engine.memory.pool_over_time or _parts(engine.memory)[0])
    ]
    if not found:
        return "no row says what memory an engine used"
    names = sorted({engine.implementation for engine, _ in found})
    handles = [
        Patch(facecolor=_WEIGHTS, label="weights"),
        Patch(facecolor=_USED, label="KV pool, most in use"),
        Patch(facecolor=_FREE, label="KV pool, not used"),
        Patch(facecolor=_GRAPHS, label="CUDA graphs"),
        Patch(facecolor=_REST, label="else, in use"),
        *(line_handle(f"{name}: blocks in use", "-", looks[name].colour) for name in names),
        line_handle("this project's block manager", "--", INK),
    ]
    subtitle = (
        "Left: memory after the start, as the engine and the device say, and as the calculator "
        "predicts. Right: blocks in use after each step, and in a block manager given the same "
        "requests, where it is known what is stored."
    )
    page = Page(_WIDTH, "Memory of a serving engine", subtitle, handles)
    top = page.top
    for engine, row in found:
        title = f"{engine.title}, {engine.implementation}"
        top += _head_height(title)
        width = (_WIDTH - 1.05 - _GAP - _RIGHT) / 2
        left = page.axes(1.05, top, width - 0.3, 1.9)
        right = page.axes(1.05 + width + _GAP - 0.1, top, width, 1.9)
        _head(left, title)
        _draw_stack(left, row)
        _draw_pool(right, row, looks[engine.implementation])
        top += 1.9 + _FOOT
    return page.finish(top)


def _parts(row: Row) -> tuple[list[tuple[float, str]], list[tuple[float, str]]]:
    """What the engine's memory is used for, and what was predicted: bytes and colours."""
    said: list[tuple[float, str]] = []
    if row.kv_pool_bytes:
        share = (row.peak_blocks or 0) / max(1, row.pool_blocks or 1)
        used = share * row.kv_pool_bytes
        said = [
            (row.weights_bytes or 0.0, _WEIGHTS),
            (used, _USED),
            (row.kv_pool_bytes - used, _FREE),
            (row.graphs_bytes or 0.0, _GRAPHS),
        ]
        rest = (row.in_use_bytes or 0.0) - sum(size for size, _ in said)
        said.append((max(0.0, rest), _REST))
    predicted = [
        (row.predicted_weights_bytes or 0.0, _WEIGHTS),
        (row.predicted_kv_pool_bytes or 0.0, _FREE),
    ]
    return said, predicted


def _draw_stack(axes: Axes, row: Row) -> None:
    bars = dict(zip(("engine", "calculator"), _parts(row), strict=True))
    longest = 0.0
    for place, parts in enumerate(bars.values()):
        start = 0.0
        for size, colour in parts:
            axes.barh(place, size / _GIB, 0.55, left=start, color=colour, zorder=3)
            start += size / _GIB
        longest = max(longest, start)
        axes.annotate(
            f"{start:.3g} GiB",
            (start, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
        )
    axes.set_yticks(range(len(bars)), list(bars))
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 1.25 * (longest or 1.0))
    axes.tick_params(labelsize=9.5)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("GiB", fontsize=9.5)
    axes.grid(visible=False, axis="y")


def _draw_pool(axes: Axes, row: Row, look: Look) -> None:
    samples = row.pool_over_time
    seconds = [sample.seconds for sample in samples]
    axes.plot(
        seconds,
        [sample.blocks for sample in samples],
        color=look.colour,
        linewidth=4.0,
        solid_capstyle="butt",
        zorder=3,
    )
    expected = [float("nan") if s.expected is None else s.expected for s in samples]
    axes.plot(seconds, expected, color=INK, linestyle="--", linewidth=1.4, zorder=4)
    axes.set_ylim(0, 1.15 * max((sample.blocks for sample in samples), default=1.0) or 1.0)
    axes.set_xlim(0, max(seconds, default=1.0) or 1.0)
    axes.tick_params(labelsize=9)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:,.0f}"))
    axes.set_xlabel("seconds since the first request", fontsize=9.5)
    axes.set_ylabel("blocks in use", fontsize=9.5)
