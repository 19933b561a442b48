"""The picture of a launch: a bar for each program with work, a colour for each phase."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from pagedattn.benchmarking.launch_trace import PHASES
from pagedattn.report.style import COLOURS, Page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pagedattn.benchmarking.launch_trace import LaunchTrace

_WIDTH, _LEFT, _RIGHT, _FOOT = 10.0, 0.8, 0.25, 0.6
_THIN, _LEAST, _MOST = 0.042, 1.8, 6.5  # inches: a program, and all of them
_COLOURS = dict(
    zip(PHASES, (COLOURS[4], COLOURS[1], COLOURS[0], COLOURS[2], COLOURS[3]), strict=True)
)


def draw_trace(trace: LaunchTrace, title: str, subtitle: str) -> Figure:
    """Draw the programs with work from the top in the order in which they end.

    Call it under `pagedattn.report.style.plain_style`.
    """
    handles = [Patch(facecolor=colour, label=name) for name, colour in _COLOURS.items()]
    page = Page(_WIDTH, title, subtitle, [*handles])
    boundaries = trace.boundaries()
    edges = np.repeat(np.arange(len(boundaries) + 1) - 0.5, 2)[1:-1]  # of each bar, both
    height = min(max(_THIN * len(boundaries), _LEAST), _MOST)
    axes = page.axes(_LEFT, page.top, _WIDTH - _LEFT - _RIGHT, height)
    for begin, end, colour in zip(
        boundaries.T[:-1], boundaries.T[1:], _COLOURS.values(), strict=True
    ):
        # as one shape: bars by themselves would be rounded to pixels, with gaps in between
        axes.fill_betweenx(
            edges, np.repeat(begin, 2), np.repeat(end, 2), color=colour, linewidth=0, zorder=3
        )
    axes.set_xlim(0, trace.span_us)
    axes.set_ylim(len(boundaries) - 0.5, -0.5)
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(10))
    axes.set_xlabel("µs from the start of the first program")
    axes.set_ylabel("programs, as they end")
    return page.finish(page.top + height + _FOOT)
