"""The bandwidth, speedup and bookkeeping plots: a line of the page for each case."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from pagedattn.report.panel import Panel
from pagedattn.report.style import ROOF, Look, Page, bar_handle, label, line_handle, marker_handle
from pagedattn.report.summary import Case, Summary, implementations_of, shared
from pagedattn.report.text import duration, number, plural, times

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from matplotlib.figure import Figure

    from pagedattn.report.rows import Row
    from pagedattn.report.summary import Group

_WIDTH = 10.0


def draw_bandwidth(summary: Summary, looks: dict[str, Look]) -> Figure | str:
    """Draw GB/s beside the measured roof, TFLOP/s where arithmetic is the limit, or say why not."""
    plans = [
        (group.title, is_compute, cases)
        for group in summary.data
        for is_compute in (False, True)
        if (cases := _only(group.cases, partial(_has_rate, is_compute)))
    ]
    if not plans:
        return "no row says its bytes or GB/s"
    shown = [case for _, _, cases in plans for case in cases]
    handles = [bar_handle(looks[name]) for name in implementations_of(shown)]
    subtitle = "At the median time of a launch; whiskers at the quartiles."
    if any(is_compute for _, is_compute, _ in plans):
        subtitle += " Work of 100 operations a byte or more is in FLOP/s."
    if any(_roof(case) for _, is_compute, cases in plans for case in cases if not is_compute):
        handles.append(line_handle("measured read bandwidth", "--", ROOF))
    else:
        subtitle += " The run has no measured bandwidth to compare with."
    page = Page(_WIDTH, "Bandwidth", subtitle, handles)
    top = page.top
    for title, is_compute, cases in plans:
        unit, scale = _unit(is_compute, cases)
        panel = Panel(
            page,
            f"{title}, compute-bound" if is_compute else title,
            cases,
            top,
            _label_width(shown),
            partial(_rate_at, is_compute, scale),
        )
        roofs = [None if is_compute else _roof(case) for case in cases]
        panel.draw_bars(looks, 0.0)
        panel.draw_roofs(roofs)
        panel.scale_from_zero(
            max([line.high for line in panel.lines] + [roof for roof in roofs if roof]), unit
        )
        panel.write_notes(number)
        top = panel.bottom
    return page.finish(top)


def draw_speedup(summary: Summary, looks: dict[str, Look]) -> Figure | str:
    """Draw each implementation's speedup over the baseline, or say why there is nothing."""
    baseline = summary.baseline
    if baseline is None:
        return "no workload moves data on a device"
    plans = []
    num_without = 0
    for group in summary.data:
        cases = [case for case in group.cases if baseline in case.rows and len(case.rows) > 1]
        num_without += len(group.cases) - len(cases)
        if cases:
            plans.append((group.title, _only(cases, lambda row: row.implementation != baseline)))
    if not plans:
        return f"no workload was measured with {baseline} and another implementation"
    medians = {
        id(row): case.rows[baseline].median_us
        for case in summary.data_cases
        if baseline in case.rows
        for row in case.rows.values()
    }
    shown = [case for _, cases in plans for case in cases]
    name = label(baseline, 32)
    subtitle = (
        f"The median time of {name} over that of the implementation: right of the line is faster. "
        f"Whiskers at the implementation's quartiles."
    )
    if num_without:
        subtitle += f" Left out: {plural(num_without, 'workload')} without such a pair."
    handles = [bar_handle(looks[name]) for name in implementations_of(shown)]
    handles.append(line_handle(f"{name} = 1x", "-", looks[baseline].colour))
    page = Page(_WIDTH, f"Speedup over {name}", subtitle, handles)
    top = page.top
    for title, cases in plans:
        panel = Panel(
            page, title, cases, top, _label_width(shown), lambda row, us: medians[id(row)] / us
        )
        panel.draw_bars(looks, 1.0)
        panel.scale_by_factors(1.0, lambda ratio: f"{ratio:g}x", f"speedup over {name}, log scale")
        panel.axes.axvline(1.0, color=looks[baseline].colour, linewidth=2.2, zorder=4)
        panel.write_notes(times, 1.0)
        top = panel.bottom
    return page.finish(top)


def draw_bookkeeping(summary: Summary, looks: dict[str, Look]) -> Figure | str:
    """Draw the time of each operation of block manager and page table, or say why not."""
    if not summary.bookkeeping:
        return "no row is of the block manager or the page table"
    shown = [case for group in summary.bookkeeping for case in group.cases]
    handles = [marker_handle(looks[name]) for name in implementations_of(shown)]
    subtitle = "Median time of one call, with quartiles."
    peers = {group.peer for group in summary.bookkeeping if group.peer is not None}
    if peers:
        names = " or ".join(label(name, 32) for name in sorted(peers))
        subtitle += f" In bold: how many times faster than {names}."
    page = Page(_WIDTH, "Bookkeeping", subtitle, handles)
    top = page.top
    for group, title, cases in _panels(summary.bookkeeping):
        panel = Panel(page, title, cases, top, _label_width(shown), lambda _, us: us)
        panel.draw_markers(looks)
        beside = {
            id(row): case.rows[group.peer].median_us
            for case in cases
            for name, row in case.rows.items()
            if group.peer is not None and group.peer in case.rows and name != group.peer
        }
        panel.scale_by_factors(
            None, duration, "median time of a call, log scale", both_sides=bool(beside)
        )
        panel.draw_ratios(looks, beside, times)
        panel.write_notes(duration, others=beside)
        top = panel.bottom
    return page.finish(top)


def _panels(groups: Iterable[Group]) -> Iterator[tuple[Group, str, list[Case]]]:
    """Give a panel to each group's single calls, and one to its replays of whole traces."""
    for group in groups:
        calls = [case for case in group.cases if case.first.hit_rate is None]
        if calls:
            yield group, group.title, calls
        replays = [case for case in group.cases if case.first.hit_rate is not None]
        if replays:
            yield group, f"{group.title}, all calls of a trace", replays


def _only(cases: Iterable[Case], keep: Callable[[Row], bool]) -> list[Case]:
    """Return the cases with the rows to keep; cases without any are left out."""
    kept = [
        Case(case.label, {name: row for name, row in case.rows.items() if keep(row)})
        for case in cases
    ]
    return [case for case in kept if case.rows]


def _has_rate(is_compute: bool, row: Row) -> bool:
    return row.is_compute_bound is is_compute and (is_compute or row.gb_per_s is not None)


def _rate_at(is_compute: bool, scale: float, row: Row, us: float) -> float:
    """Return a row's rate had it taken `us`."""
    rate = row.tflop_per_s if is_compute else row.gb_per_s
    return (rate or 0.0) * scale * row.median_us / us


def _unit(is_compute: bool, cases: list[Case]) -> tuple[str, float]:
    """Return the unit that suits the rates, and how many of it the column's unit is."""
    if not is_compute:
        return "GB/s", 1.0
    rates = [row.tflop_per_s or 0.0 for case in cases for row in case.rows.values()]
    return ("TFLOP/s", 1.0) if max(rates) >= 1 else ("GFLOP/s", 1e3)


def _roof(case: Case) -> float | None:
    roof = shared(case, "measured_read_gb_per_s")
    return roof if isinstance(roof, float) else None


def _label_width(cases: list[Case]) -> float:
    return 0.3 + 0.086 * max(len(label(case.label)) for case in cases)
