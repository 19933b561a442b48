"""The hit-rate plot: what a prefix cache finds again against the size of its pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from pagedattn.report.comparison import HitRates, hit_rates, share_text
from pagedattn.report.style import (
    INK,
    ROOF,
    Look,
    Page,
    label,
    line_handle,
    log_ticks,
    marker_handle,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pagedattn.report.summary import Summary

_WIDTH, _LEFT, _RIGHT, _HEIGHT = 10.0, 0.9, 0.35, 3.4
_TITLE, _FOOT = 0.4, 0.7


def draw_hit_rate(summary: Summary, looks: dict[str, Look]) -> Figure | str:
    """Draw a panel for each workload of prefix caches, or say why there is none."""
    workloads = hit_rates(summary)
    if not workloads:
        return "no row is of a prefix cache's hits"
    names = sorted({name for rates in workloads for name in rates.rows})
    handles = [marker_handle(looks[name]) for name in names]
    subtitle = "Share of the blocks looked up that the cache had."
    if any(rates.ideal is not None for rates in workloads):
        handles.append(line_handle("a cache that forgets nothing", "--", ROOF))
        subtitle += " Where lines meet, the later one of the legend is the thinner, on top."
    page = Page(_WIDTH, "Prefix cache hit rate", subtitle, handles)
    top = page.top
    for rates in workloads:
        axes = page.axes(_LEFT, top + _TITLE, _WIDTH - _LEFT - _RIGHT, _HEIGHT)
        axes.set_title(label(rates.title, 90))
        _draw(axes, rates, looks)
        top += _TITLE + _HEIGHT + _FOOT
    return page.finish(top)


def _draw(axes: Axes, rates: HitRates, looks: dict[str, Look]) -> None:
    """Draw a line for each implementation, thick ones first, so that equal ones are all seen."""
    for place, (name, rows) in enumerate(rates.rows.items()):
        look = looks[name]
        behind = len(rates.rows) - 1 - place
        pools = sorted(rows)
        axes.plot(
            pools,
            [100 * (rows[pool].hit_rate or 0.0) for pool in pools],
            color=look.colour,
            marker=look.marker,
            linewidth=1.8 + 3.2 * behind,
            markersize=6.5 + 5.5 * behind,
            markeredgecolor=INK,
            markeredgewidth=0.6,
            zorder=3 + 0.1 * place,
        )
    if rates.ideal is not None:
        axes.axhline(100 * rates.ideal, color=ROOF, linestyle="--", linewidth=1.8, zorder=2)
        axes.annotate(
            f"{share_text(rates.ideal)}",
            (0.0, 100 * rates.ideal),
            xycoords=("axes fraction", "data"),
            xytext=(6, 4),
            textcoords="offset points",
            fontsize=9.5,
        )
    low, high = rates.pools[0] / 1.25, rates.pools[-1] * 1.25
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(log_ticks(low, high, 9)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("blocks in the pool, log scale")
    axes.set_ylim(0, 1.14 * _highest(rates))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.set_ylabel("hit rate")


def _highest(rates: HitRates) -> float:
    shares = [row.hit_rate or 0.0 for rows in rates.rows.values() for row in rows.values()]
    return 100 * max([*shares, rates.ideal or 0.0]) or 1.0
