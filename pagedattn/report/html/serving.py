"""Serving engines: output tokens a second and waits against users at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pagedattn.report.html.figure import DataTable, Figure, Panel, legend_of
from pagedattn.report.html.svg import Chart, colour_of
from pagedattn.report.serving import engines
from pagedattn.report.style import log_ticks, power_ticks
from pagedattn.report.text import MISSING, duration, number, plural

if TYPE_CHECKING:
    from collections.abc import Callable

    from pagedattn.report.rows import Row
    from pagedattn.report.serving import Engine
    from pagedattn.report.style import Look
    from pagedattn.report.summary import Summary

_ABOUT = (
    "Each mark is a step of a sweep: so many clients that send their next request when they have "
    "an answer. Waits are medians with a bar up to the 99th percentile. More users get more tokens "
    "a second together until the engine is full; from then on they only wait longer. All axes are "
    "logarithmic."
)
_WHAT = (
    ("output_tokens_per_s", None, "output tokens a second", number),
    ("first_token_p50_us", "first_token_p99_us", "wait for the first token", duration),
    ("inter_token_p50_us", "inter_token_p99_us", "time between tokens", duration),
)


def draw_serving(summary: Summary, looks: dict[str, Look]) -> Figure:
    """Draw three panels for each model and load that an engine was swept over users of."""
    by_title: dict[str, list[Engine]] = {}
    for engine in engines(summary):
        if engine.sweep:
            by_title.setdefault(engine.title, []).append(engine)
    title = "Serving against users"
    if not by_title:
        return Figure("serving", title, reason="no row is of a sweep over users")
    panels = [
        _panel(name if len(by_title) > 1 else "", group, looks, *what)
        for name, group in by_title.items()
        for what in _WHAT
    ]
    found = [engine for group in by_title.values() for engine in group]
    names = sorted({engine.implementation for engine in found})
    says = " ".join(_says(engine) for engine in found)
    data = [_table(place, engine) for place, engine in enumerate(found, 1)]
    legend = legend_of(looks, names)
    return Figure("serving", title, _ABOUT, says, panels, legend, data, wide=False)


def _value(row: Row, name: str | None) -> float | None:
    return getattr(row, name) if name else None


def _says(engine: Engine) -> str:
    first, last = engine.sweep[0], engine.sweep[-1]
    knee = engine.knee
    ends = [
        f"{plural(row.num_users or 0, 'user')}: {number(row.output_tokens_per_s)} output tokens a "
        f"second, first token after "
        f"{MISSING if row.first_token_p50_us is None else duration(row.first_token_p50_us)}"
        for row in (first, last)
    ]
    at = f"the knee is at {knee.num_users}" if knee else "the sweep ends before the knee"
    return f"{engine.implementation}, {engine.title}: {'; '.join(ends)}; {at}."


def _panel(
    title: str,
    group: list[Engine],
    looks: dict[str, Look],
    name: str,
    high: str | None,
    what: str,
    say: Callable[[float], str],
) -> Panel:
    rows = [row for engine in group for row in engine.sweep if _value(row, name)]
    values = [found for row in rows for one in (name, high) if (found := _value(row, one))]
    parts = [
        f"{plural(row.num_users or 0, 'user')} {say(_value(row, name) or 0.0)}" for row in rows
    ]
    name_of = f"{title}, {what}" if title else what
    alt = f"{name_of}. {', '.join(parts)}."
    chart = Chart(340, 240, alt, left=66, reach=(0.8, 1.2))
    users = [row.num_users or 1 for row in rows] or [1]
    x_scale = chart.x_scale(min(users) / 1.3, max(users) * 1.3, log=True)
    low, top = min(values, default=1.0) / 1.3, max(values, default=1.0) * 1.3
    y_scale = chart.y_scale(low, top, log=True)
    chart.x_axis(x_scale, power_ticks(users, 6), lambda x: f"{x:g}", "users at once")
    tick = duration if say is duration else _count
    chart.y_axis(y_scale, log_ticks(low, top, 6), tick, "")
    for engine in group:
        look = looks[engine.implementation]
        drawn = [row for row in engine.sweep if _value(row, name)]
        places = [
            (x_scale.at(row.num_users or 1), y_scale.at(_value(row, name) or 1.0)) for row in drawn
        ]
        chart.line(places, f"curve {colour_of(look)}")
        for (x, y), row in zip(places, drawn, strict=True):
            above = _value(row, high)
            if above:
                chart.line([(x, y), (x, y_scale.at(above))], "whisker")
            users_now = plural(row.num_users or 0, "user")
            shown = say(_value(row, name) or 0.0)
            chart.mark(x, y, look, title=f"{engine.implementation}, {users_now}: {shown}")
    return Panel(name_of, chart.markup())


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _table(place: int, engine: Engine) -> DataTable:
    lines = [
        [
            str(row.num_users),
            number(row.output_tokens_per_s),
            *(
                MISSING if (value := _value(row, name)) is None else duration(value)
                for what in _WHAT[1:]
                for name in what[:2]
            ),
        ]
        for row in engine.sweep
    ]
    header = ["users", "output tokens/s", "first token", "p99", "between tokens", "p99"]
    title = f"{engine.implementation}, {engine.title}"
    return DataTable(f"serving-data-{place}", title, header, lines, 0)
