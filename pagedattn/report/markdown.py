"""The report: headline, plots, all rows and the machine, as one markdown page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pagedattn.report.comparison import comparison_tables, hit_rate_tables
from pagedattn.report.doubts import WHAT_IS_DOUBTED, busy_machines, doubts_of_row
from pagedattn.report.serving import serving_tables
from pagedattn.report.support import SUPPORT_ABOUT, support_tables
from pagedattn.report.tables import DOUBT, Table, bookkeeping_tables, full_tables, headline_tables
from pagedattn.report.text import MISSING, escape, plural

if TYPE_CHECKING:
    from pagedattn.report.plots import Plot
    from pagedattn.report.results import Run
    from pagedattn.report.summary import Summary


def make_report(run: Run, summary: Summary, plots: list[Plot], command: str) -> str:
    """Return the page; the same run, plots and command give the same text.

    Plots are embedded by their file names, beside which the page must lie.
    """
    parts = ["# Benchmark report", _opening(run, summary)]
    headline = headline_tables(summary)
    if headline:
        parts.append("## Headline")
        parts.append(
            "A line per workload. Medians are microseconds of one launch. The share is the best "
            "implementation's, of the measured read bandwidth; work of 100 operations a byte or "
            f"more has its TFLOP/s instead. {_doubted(summary)}"
        )
        parts += _with_titles(headline)
    bookkeeping = bookkeeping_tables(summary)
    if bookkeeping:
        parts.append("## Bookkeeping")
        parts += _with_titles(bookkeeping)
    compared = comparison_tables(summary)
    if compared:
        parts.append("## Bookkeeping beside other systems")
        parts.append(
            "A line per call, at its median. The last columns say how many times faster each is "
            "than the other system, asked for the same in the same run."
        )
        parts += _with_titles(compared)
    hits = hit_rate_tables(summary)
    if hits:
        parts.append("## Prefix caches")
        parts.append(
            "The share of the blocks looked up that the cache had; the ideal is that of a cache "
            "that forgets nothing. Then the blocks that it evicted."
        )
        parts += _with_titles(hits)
    serving = serving_tables(summary)
    if serving:
        parts.append("## Serving engines")
        parts.append(
            "Real inference. The knee is the fewest users with 90 % of the most output tokens a "
            "second. Of memory, the engine says the one column and this project calculates the "
            "other."
        )
        parts += _with_titles(serving)
    support = support_tables(run)
    if support:
        parts += ["## Support", SUPPORT_ABOUT, *_with_titles(support)]
    parts.append("## Plots")
    parts += [_plot(plot) for plot in plots]
    parts.append("## Machine")
    parts.append(machine_table(run).as_markdown())
    full = full_tables(summary)
    parts += _all_rows(full) if full else []
    parts.append("## Command")
    parts.append(f"```sh\n{command}\n```")
    parts.append("Add `--out FOLDER` for another folder than `figures/local`.")
    return "\n\n".join(parts) + "\n"


def _all_rows(tables: list[Table]) -> list[str]:
    about = (
        "Times are microseconds: the median, the lower and the upper quartile over the rounds. "
        "GB/s count 1e9 bytes, TFLOP/s 1e12 operations. The share is of the measured read "
        "bandwidth. The error may reach its budget. Host time is what an eager launch costs its "
        "caller. `rows.csv` and `rows.parquet` have these and every other column."
    )
    return ["## All rows", about, *_with_titles(tables)]


def _opening(run: Run, summary: Summary) -> str:
    files = ", ".join(escape(file.name) for file in run.files)
    lines = [f"{plural(len(run.rows), 'row')} of {files}, by pytest-benchmark."]
    if len({file.machine for file in run.files}) > 1:
        lines.append(
            "**The files come from different machines: compare rows of different files with care.**"
        )
    lines += [f"**{escape(sentence)}**" for sentence in busy_machines(run.files)]
    if run.num_replaced:
        lines.append(
            f"{plural(run.num_replaced, 'row')} of earlier files gave way to a later file's row "
            f"of the same name."
        )
    if run.num_skipped:
        lines.append(
            f"{plural(run.num_skipped, 'benchmark')} without this suite's area, implementation "
            f"and workload were skipped."
        )
    if summary.baseline is not None:
        lines.append(f"The baseline is {escape(summary.baseline)}.")
    return " ".join(lines)


def _doubted(summary: Summary) -> str:
    """Say how many rows have a doubt, and what that is."""
    rows = [row for group in summary.data for case in group.cases for row in case.rows.values()]
    found = sum(bool(doubts_of_row(row)) for row in rows)
    marked = f", marked with {DOUBT}" if found else ""
    verb = "has" if found == 1 else "have"
    return f"{found} of {plural(len(rows), 'row')} {verb} a doubt{marked}. {WHAT_IS_DOUBTED}"


def _with_titles(tables: list[Table]) -> list[str]:
    return [
        text for table in tables for text in (f"### {escape(table.title)}", table.as_markdown())
    ]


def _plot(plot: Plot) -> str:
    title = f"### {plot.name.replace('_', ' ').capitalize()}"
    if plot.reason is not None:
        return f"{title}\n\nLeft out: {escape(plot.reason)}."
    embedded = plot.files[0]
    others = ", ".join(f"[{file}]({file})" for file in plot.files[1:])
    also = f"\n\nAlso as {others}." if others else ""
    return f"{title}\n\n![{escape(plot.alt)}]({embedded}){also}"


def machine_table(run: Run) -> Table:
    """Make a table with a line for each property and a column for each file."""
    about = [dict(file.about) for file in run.files]
    names = list(dict.fromkeys(name for properties in about for name in properties))
    lines = [[name, *(properties.get(name, MISSING) for properties in about)] for name in names]
    return Table("Machine", ["property", *(file.name for file in run.files)], lines, 1 + len(about))
