"""All plots of a run, and the files they are written to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pagedattn.report.bars import draw_bandwidth, draw_bookkeeping, draw_speedup
from pagedattn.report.comparison import hit_rates
from pagedattn.report.hit_rate import draw_hit_rate
from pagedattn.report.latency import draw_latency
from pagedattn.report.serving import engines
from pagedattn.report.serving_plots import draw_serving, draw_serving_memory
from pagedattn.report.style import looks_of, plain_style, save
from pagedattn.report.text import clean, plural

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from matplotlib.figure import Figure

    from pagedattn.report.style import Look
    from pagedattn.report.summary import Group, Summary

_DRAW: dict[str, Callable[[Summary, dict[str, Look]], Figure | str]] = {
    "latency": draw_latency,
    "bandwidth": draw_bandwidth,
    "speedup": draw_speedup,
    "bookkeeping": draw_bookkeeping,
    "hit_rate": draw_hit_rate,
}
_DRAW_SERVING: dict[str, Callable[[Summary, dict[str, Look]], Figure | str]] = {
    "serving": draw_serving,
    "serving_memory": draw_serving_memory,
}


MOST_CASES = 40
"""Cases of a group that are all drawn: nobody could read a picture of more; the tables have all."""

FIRST_CASES = 16
"""Cases that are drawn of a group of more, from its first on."""


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot of the report: its file names, or `reason` why the run has nothing to draw."""

    name: str
    files: tuple[str, ...]
    alt: str
    reason: str | None


def write_plots(summary: Summary, folder: Path, formats: tuple[str, ...]) -> list[Plot]:
    """Write ``NAME.FORMAT`` into `folder` for each plot that the run has data for.

    Of a group with more than `MOST_CASES` the first `FIRST_CASES` are drawn, and its title says so.
    The same summary gives the same bytes.
    """
    plots = []
    summary = replace(
        summary,
        data=tuple(limited(group) for group in summary.data),
        bookkeeping=tuple(limited(group) for group in summary.bookkeeping),
    )
    looks = looks_of(summary.implementations)
    with plain_style():
        for name, draw in _kinds(summary).items():
            figure = draw(summary, looks)
            if isinstance(figure, str):
                plots.append(Plot(name, (), "", figure))
                continue
            files = tuple(f"{name}.{suffix}" for suffix in formats)
            for file in files:
                save(figure, folder / file)
            plots.append(Plot(name, files, _alt(name, summary), None))
    return plots


def num_drawn(group: Group) -> int:
    """Return how many of a group's cases are drawn, from its first on."""
    return len(group.cases) if len(group.cases) <= MOST_CASES else FIRST_CASES


def limited(group: Group) -> Group:
    """Return the group with the cases that are drawn, and where those are not all a title so."""
    count = num_drawn(group)
    if count == len(group.cases):
        return group
    title = f"{group.title}, the first {count} of {len(group.cases):,}"
    return replace(group, title=title, cases=group.cases[:count])


def _kinds(summary: Summary) -> dict[str, Callable[[Summary, dict[str, Look]], Figure | str]]:
    """Return the plots that a run like this could have: engines are drawn by their own."""
    kinds = _DRAW if summary.data or summary.bookkeeping else {}
    return kinds | _DRAW_SERVING if summary.serving else kinds


def _alt(name: str, summary: Summary) -> str:
    """Say in words what a plot shows, for a reader who does not see it."""
    if name in _DRAW_SERVING:
        count = len(engines(summary))
        what = {
            "serving": "Tokens a second and waits against users at once",
            "serving_memory": "Memory of a serving engine, beside the calculator's, and blocks "
            "in use over time",
        }[name]
        return f"{what}, {plural(count, 'engine')}; the tables have the numbers"
    if name == "bookkeeping":
        count = sum(len(group.cases) for group in summary.bookkeeping)
        return f"Median time with quartiles of {plural(count, 'bookkeeping operation')}"
    if name == "hit_rate":
        count = len({pool for rates in hit_rates(summary) for pool in rates.pools})
        return f"Hit rate of prefix caches against {plural(count, 'size')} of the pool"
    count = len(summary.data_cases)
    baseline = clean(summary.baseline or "")
    about = {
        "latency": "Latency against context and batch size, with quartiles",
        "bandwidth": "Bandwidth against the measured roof",
        "speedup": f"Speedup over {baseline}",
    }[name]
    return f"{about}, {plural(count, 'workload')}; the tables have the numbers"
