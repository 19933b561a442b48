"""The results document: a section for each reference machine, or a blank one for a reader's own."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from pagedattn.report.comparison import comparison_tables, hit_rate_tables
from pagedattn.report.markdown import machine_table
from pagedattn.report.serving import serving_tables
from pagedattn.report.tables import bookkeeping_tables, headline_tables
from pagedattn.report.text import escape, plural

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pagedattn.report.results import Run
    from pagedattn.report.summary import Summary
    from pagedattn.report.tables import Table

_INTRODUCTION = """\
# Benchmark results

Every number here was read from a results file by the command at the end; none was typed in. A row
of a kernel was timed only after its result had been compared with float64. Times compare within one
run."""

_BLANK = """\
# Benchmark results of your own

For a GPU of yours, for one a V100 of 32 GB. On it, from a clone:

```sh
pip install -e '.[test,plot,gpu]'
pytest -m gpu --benchmark-autosave
python tools/plot.py
```

`figures/local/report.md` then has these tables with your numbers. To fill in by hand, or to see
what is measured:"""


def make_document(runs: Sequence[tuple[Path, Run, Summary]], target: Path, *, blank: bool) -> str:
    """Return the document that lies at `target`.

    Args:
        runs: a results file, what it holds, and its summary, in the order of the sections.
        target: where it will lie; links to the folders of the results are relative to it.
        blank: leave all numbers out, and the machines.

    """
    parts = [_BLANK if blank else _INTRODUCTION]
    for path, run, summary in runs:
        tables = [*headline_tables(summary), *bookkeeping_tables(summary)]
        tables += [*comparison_tables(summary), *hit_rate_tables(summary)]
        tables += serving_tables(summary)
        if not blank:
            parts += _opening(path, run, target)
        for table in tables:
            shown = _emptied(table) if blank else table
            parts += [f"### {escape(table.title)}", shown.as_markdown()]
        if not blank:
            parts += ["### Machine", machine_table(run).as_markdown()]
    words = ["python", "tools/plot.py", *(path.as_posix() for path, _, _ in runs)]
    words += ["--document", target.as_posix(), *(["--blank"] if blank else [])]
    parts += ["## Command", f"```sh\n{shlex.join(words)}\n```"]
    return "\n\n".join(parts) + "\n"


def _opening(path: Path, run: Run, target: Path) -> list[str]:
    folder = quote(Path(os.path.relpath(path.parent, target.parent)).as_posix())
    links = [f"[results]({folder}/{quote(path.name)})"]
    links += [
        f"[{name}]({folder}/{file})"
        for name, file in (("report", "report.md"), ("table", "rows.csv"))
        if (path.parent / file).exists()
    ]
    parts = [
        f"## {escape(path.parent.name)}",
        f"{plural(len(run.rows), 'row')}: {', '.join(links)}.",
    ]
    plots = [
        plot
        for plot in ("bandwidth", "bookkeeping", "hit_rate", "serving", "serving_memory")
        if (path.parent / f"{plot}.png").exists()
    ]
    parts += [f"![{plot.replace('_', ' ').capitalize()}]({folder}/{plot}.png)" for plot in plots]
    return parts


def _emptied(table: Table) -> Table:
    """Keep the names of rows and columns, and nothing that was measured."""
    kept = {"workload", "operation", "sequences", "pool blocks", "implementation"}
    lines = [
        [cell if name in kept else "" for name, cell in zip(table.header, line, strict=True)]
        for line in table.lines
    ]
    return replace(table, lines=lines)
