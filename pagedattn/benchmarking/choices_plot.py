"""The picture of choices: a point for each batch, how long it takes and what choosing loses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from pagedattn.benchmarking.choices import AS_IT_IS
from pagedattn.report.style import COLOURS, MARKERS, Page, log_ticks
from pagedattn.report.text import duration

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from pagedattn.benchmarking.choices import TimedWays

_WIDTH, _LEFT, _RIGHT, _FOOT, _HEIGHT = 10.0, 1.0, 0.25, 0.6, 4.0
_LEAST_MOST = 5.0  # per cent that the axis goes up to, at least
_TICKS = 8


def draw_choices(found: Sequence[TimedWays], machine: str) -> Figure:
    """Draw the batches, a colour and a marker for each kind.

    Call it under `pagedattn.report.style.plain_style`.
    """
    by_kind: dict[str, list[TimedWays]] = {}
    for batch in found:
        by_kind.setdefault(batch.kind, []).append(batch)
    points = [
        Line2D(
            [batch.seconds[batch.chosen[AS_IT_IS]] * 1e6 for batch in batches],
            [100 * batch.loss() for batch in batches],
            label=kind,
            linestyle="none",
            marker=MARKERS[i % len(MARKERS)],
            color=COLOURS[i % len(COLOURS)],
            markersize=7,
            markeredgecolor="white",
            zorder=3,
            clip_on=False,
        )
        for i, (kind, batches) in enumerate(by_kind.items())
    ]
    ways = sum(len(batch.seconds) for batch in found)
    page = Page(
        _WIDTH,
        "What the chosen way takes longer than the fastest",
        f"{machine}: {ways} ways of batches that were drawn at random, timed by turns. Where the "
        "fastest way is chosen, nothing is lost.",
        [*points],
    )
    axes = page.axes(_LEFT, page.top, _WIDTH - _LEFT - _RIGHT, _HEIGHT)
    for line in points:
        axes.add_line(line)
    times = [batch.seconds[batch.chosen[AS_IT_IS]] * 1e6 for batch in found]
    least, most = 0.9 * min(times), 1.1 * max(times)
    axes.set_xscale("log")
    axes.set_xlim(least, most)
    axes.set_ylim(0, max(_LEAST_MOST, *(105 * batch.loss() for batch in found)))
    axes.xaxis.set_major_locator(FixedLocator(log_ticks(least, most, _TICKS)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda microseconds, _: duration(microseconds)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g} %"))
    axes.set_xlabel("time of the chosen way")
    axes.set_ylabel("longer than the fastest")
    return page.finish(page.top + _HEIGHT + _FOOT)
