"""The whole page, of one run or of a comparison, from its sections and the template."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from pagedattn.report.comparison import hit_rate_tables
from pagedattn.report.doubts import busy_machines
from pagedattn.report.html.changes import comparison_data, draw_changes, verdict_counts
from pagedattn.report.html.ecdf import draw_ecdf, most_spread, rows_with_samples
from pagedattn.report.html.figure import DataTable, Figure
from pagedattn.report.html.headline import headline, headline_sentence, headline_table, rows_table
from pagedattn.report.html.heatmap import draw_heatmap
from pagedattn.report.html.latency import draw_latency
from pagedattn.report.html.roofline import draw_roofline, roof_of
from pagedattn.report.html.serving import draw_serving
from pagedattn.report.html.trend import draw_trend, files_in_time
from pagedattn.report.html.waste import draw_waste
from pagedattn.report.markdown import machine_table
from pagedattn.report.results import Run
from pagedattn.report.serving import serving_tables
from pagedattn.report.style import looks_of
from pagedattn.report.support import SUPPORT_ABOUT, support_tables
from pagedattn.report.text import MISSING, clean, flops_rate, plural

if TYPE_CHECKING:
    from pagedattn.report.compare import Comparison
    from pagedattn.report.results import ResultsFile
    from pagedattn.report.rows import Row
    from pagedattn.report.summary import Summary


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page with a heading; what it lacks is empty."""

    identity: str
    title: str
    texts: list[str] = field(default_factory=list)
    counts: list[tuple[str, str, str]] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    tables: list[DataTable] = field(default_factory=list)


def make_page(run: Run, summary: Summary, command: str) -> str:
    """Return a run's page; the same run, summary and command give the same text."""
    looks = looks_of(summary.implementations)
    sections = [_headline(summary)]
    verdicts = _verdicts(run)
    if verdicts is not None:
        sections.insert(0, verdicts)
    figures = [
        draw_roofline(summary, looks),
        draw_heatmap(summary),
        draw_latency(summary, looks),
        draw_serving(summary, looks),
        draw_ecdf(rows_with_samples(summary)),
        draw_waste(summary),
        draw_trend(run),
    ]
    others = [*serving_tables(summary), *hit_rate_tables(summary)]
    if others:
        tables = [DataTable.of(table, f"engines-{i}") for i, table in enumerate(others, 1)]
        sections.append(Section("engines", "Serving engines and prefix caches", tables=tables))
    support = [
        DataTable.of(table, f"support-{i}") for i, table in enumerate(support_tables(run), 1)
    ]
    if support:
        sections.append(
            Section("support", "What each implementation supports", [SUPPORT_ABOUT], tables=support)
        )
    drawn = [figure for figure in figures if figure.reason is None]
    sections += [Section(figure.identity, figure.title, figures=[figure]) for figure in drawn]
    if summary.data or summary.bookkeeping:
        sections.append(Section("rows", "All rows", tables=[rows_table(summary)]))
    sections.append(Section("environment", "Environment", tables=[environment(run.files)]))
    missing = [figure for figure in figures if figure.reason is not None]
    if missing:
        texts = [f"{figure.title}: {figure.reason}." for figure in missing]
        sections.append(Section("left-out", "Left out", texts))
    return _render("Benchmark report", _opening(run, summary), sections, command)


def make_comparison_page(
    before: Run, after: Run, comparison: Comparison, verdict: str, command: str
) -> str:
    """Return the page of a comparison; `verdict` is a sentence about a limit, or empty."""
    mean = comparison.mean_ratio or 1.0
    both = plural(len(comparison.changes), "row")
    texts = [f"{both} in both runs; the second run takes {mean:.3f} times as long, geometric mean."]
    if verdict:
        texts.append(verdict)
    rows = [
        (clean(f"{word}: {row.fullname.rpartition('::')[2] or row.workload}"), row)
        for word, run in (("before", before), ("after", after))
        for row in run.rows
        if row.samples_us
    ]
    tables = comparison_data(comparison)
    ecdf = draw_ecdf(_pairs(most_spread(rows)), first=2)
    sections = [
        Section("verdicts", "Verdicts", texts, verdict_counts(comparison)),
        Section("changes", "Changes", figures=[draw_changes(comparison)], tables=tables),
        Section("ecdf", ecdf.title, figures=[ecdf]),
        Section("environment", "Environment", tables=[environment(before.files + after.files)]),
    ]
    names = [clean(run.files[0].name) for run in (before, after)]
    return _render("Comparison", [f"{names[0]} against {names[1]}."], sections, command)


def _pairs(rows: list[tuple[str, Row]]) -> list[tuple[str, Row]]:
    """Put the two runs' rows of one name together, in the order of the more spread one."""
    found: dict[str, list[tuple[str, Row]]] = {}
    for name, row in rows:
        found.setdefault(name.partition(": ")[2], []).append((name, row))
    return [one for pair in found.values() for one in sorted(pair, reverse=True, key=_name)]


def _name(named: tuple[str, Row]) -> str:
    return named[0]


def _headline(summary: Summary) -> Section:
    lines = headline(summary)
    if not lines:
        text = "The run has rows of serving engines only; their tables follow."
        return Section("headline", "Headline", [text])
    table = headline_table(lines)
    return Section("headline", "Headline", [headline_sentence(lines)], tables=[table])


def _verdicts(run: Run) -> Section | None:
    """Compare the oldest with the newest file of the machine, if there are two with rows shared."""
    in_time = files_in_time(run)
    first, last = in_time[0], in_time[-1]
    names = {row.fullname for row in first.rows}
    if first is last or not any(row.fullname in names for row in last.rows):
        return None
    from pagedattn.report.compare import compare

    found = compare(*(Run((file,), file.rows, 0) for file in (first, last)))
    text = (
        f"The newest file, {last.name}, beside the oldest, {first.name}. "
        "«plot.py compare» says more."
    )
    return Section("verdicts", "Verdicts", [text], verdict_counts(found))


def environment(run_files: tuple[ResultsFile, ...]) -> DataTable:
    """Make a table of the machines: a line for each property, a column for each file.

    The matrix rate is that of the rows' limits, in which the run's own measurement is kept.
    """
    table = machine_table(Run(run_files, (), 0))
    peaks = [roof_of(file.rows).peak for file in run_files]
    lines = [list(line) for line in table.lines]
    if any(peak is not None for peak in peaks):
        texts = [MISSING if peak is None else flops_rate(peak) for peak in peaks]
        place = next(
            (i for i, line in enumerate(lines, 1) if line[0] == "measured copy bandwidth"), 0
        )
        lines.insert(place, ["measured matrix rate", *texts])
    lines = [[clean(cell) for cell in line] for line in lines]
    return DataTable("environment-table", "Machine", table.header, lines, len(table.header))


def _opening(run: Run, summary: Summary) -> list[str]:
    names = ", ".join(file.name for file in run.files)
    texts = [f"{plural(len(run.rows), 'row')} of {names}, by pytest-benchmark."]
    if len({file.machine for file in run.files}) > 1:
        texts.append(
            "The files come from different machines: compare rows of different files with care."
        )
    texts += busy_machines(run.files)
    if run.num_replaced:
        texts.append(
            f"{plural(run.num_replaced, 'row')} of earlier files gave way to a later file's row of "
            f"the same name."
        )
    if run.num_skipped:
        texts.append(f"{plural(run.num_skipped, 'benchmark')} of other suites skipped.")
    if summary.baseline is not None:
        texts.append(f"The baseline is {clean(summary.baseline)}.")
    return texts


def _render(title: str, opening: list[str], sections: list[Section], command: str) -> str:
    assets = files("pagedattn.report.html") / "assets"
    texts = {
        name: (assets / name).read_text(encoding="utf-8")
        for name in ("page.html.jinja", "page.css", "page.js")
    }
    made = Environment(
        autoescape=True,
        finalize=_printable,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = made.from_string(texts["page.html.jinja"])
    return template.render(
        title=title,
        opening=opening,
        sections=sections,
        command=command,
        style=Markup(texts["page.css"]),  # the project's own files
        script=Markup(texts["page.js"]),
    )


def _printable(value: object) -> object:
    """Clean what the template writes: names may turn the direction of the text after them."""
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value
