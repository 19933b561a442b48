"""The command line of ``tools/plot.py``."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pagedattn.report.arguments import Parser
from pagedattn.report.concepts import CONCEPTS
from pagedattn.report.data import CSV_NAME, PARQUET_NAME
from pagedattn.report.output import (
    FORMATS,
    plot_files,
    require_no_source,
    write_file,
    write_into,
)
from pagedattn.report.results import Run, load_run, newest_file, require_one_machine
from pagedattn.report.summary import Summary, summarise
from pagedattn.report.text import clean, plural
from pagedattn.report.values import ResultsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pagedattn.report.plots import Plot

STORAGE = Path(".benchmarks")
DEFAULT_OUT = Path("figures") / "local"
CONCEPTS_OUT = Path("figures")
_PLOT_NAMES = (
    *("latency", "bandwidth", "speedup", "bookkeeping", "hit_rate"),
    *("serving", "serving_memory"),
)
_REPORT, _PAGE = "report.md", "report.html"

_EXAMPLES = """\
examples:
  python tools/plot.py
      the newest run under .benchmarks/, drawn into figures/local/
  python tools/plot.py run.json --out figures/h100 --baseline flashinfer
  python tools/plot.py attention.json bookkeeping.json --formats png
      both files joined; a later file's row replaces an earlier one's of the same name
  python tools/plot.py figures/h100/results.json --document results.md
      one document about these runs; with --blank, a form for a machine of your own
  python tools/plot.py monday.json tuesday.json wednesday.json
      joined as well; report.html also has the trend, and what changed from first to last
  python tools/plot.py compare before.json after.json --fail-on-regression 5%
      what became faster or slower; plot.py compare --help says more
  python tools/plot.py --concepts
      the seven figures of the tutorial, drawn into figures/ (about a minute)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, 2 after one sentence on stderr, or 130 after Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:1] == ["compare"]:
            from pagedattn.report import compare_cli

            with _without_collections():
                code = compare_cli.main(words[1:])
            sys.stdout.flush()
            return code
        options = _parser().parse_args(words)
        with _without_collections():
            _draw(options)
        sys.stdout.flush()
    except ResultsError as error:
        print(clean(str(error)), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # the reader of our output left; nothing more can be said to it
        _leave_stdout()
    except OSError as error:
        _leave_stdout()
        print(f"The output cannot be written: {error.strerror or error}.", file=sys.stderr)
        return 2
    return 0


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Look for no cycles: the rows live until the end, and to look through them takes a while."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _leave_stdout() -> None:
    """Let what Python still holds for a stdout that takes nothing go nowhere when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="plot.py",
        description="Turn results of pytest-benchmark into plots, report.md, report.html, rows.csv "
        "and rows.parquet.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "files",
        nargs="*",
        type=Path,
        metavar="FILES",
        help="results files (default: the newest run under .benchmarks/)",
    )
    parser.add_argument(
        "--concepts",
        action="store_true",
        help="draw the tutorial's figures instead; they take no results",
    )
    parser.add_argument(
        "--document",
        type=Path,
        metavar="FILE",
        help="write one markdown document with a section for each of FILES instead",
    )
    parser.add_argument(
        "--blank", action="store_true", help="with --document: leave all numbers out, to fill in"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"default: {DEFAULT_OUT}, with --concepts {CONCEPTS_OUT}",
    )
    parser.add_argument(
        "--baseline",
        metavar="NAME",
        help="the implementation that speedups are over (default: sdpa_contiguous if most "
        "workloads have it, else torch likewise, else the one that most have)",
    )
    parser.add_argument(
        "--formats",
        type=_formats,
        default=FORMATS,
        metavar="LIST",
        help="png, svg or png,svg (default: both)",
    )
    parser.add_argument(
        "--allow-different-machines",
        action="store_true",
        help="join files even if they come from different machines",
    )
    return parser


def _formats(text: str) -> tuple[str, ...]:
    asked = [name.strip().lower() for name in text.split(",")]
    if not set(asked) <= set(FORMATS):
        raise argparse.ArgumentTypeError(f"must be png, svg or png,svg, not {text!r}")
    return tuple(name for name in FORMATS if name in asked)


def _draw(options: argparse.Namespace) -> None:
    if options.concepts:
        _draw_concepts(options)
        return
    if options.document is not None or options.blank:
        _write_document(options)
        return
    files, out = options.files or [_newest()], options.out or DEFAULT_OUT
    others = [out / name for name in (_REPORT, _PAGE, CSV_NAME, PARQUET_NAME)]
    require_no_source([*plot_files(out, _PLOT_NAMES), *others], files)
    run = load_run(files)
    if not options.allow_different_machines:
        require_one_machine(run)
    summary = summarise(run.rows, options.baseline)
    plots, written, removed = _write(run, summary, options)
    _print_outcome(run, summary, plots)
    _say("")
    _say_written(out, written, removed)


def _write_document(options: argparse.Namespace) -> None:
    """Write one document about all results files, each by itself."""
    for name, value in (
        ("--out", options.out is not None),
        ("--allow-different-machines", options.allow_different_machines),
    ):
        if value:
            raise ResultsError(f"--document writes one file and takes no {name}.")
    if options.document is None:
        raise ResultsError("--blank needs --document FILE.")
    if not options.files:
        raise ResultsError("--document needs the results files that it is about.")
    from pagedattn.report.document import make_document

    require_no_source([options.document], options.files)
    runs = []
    for path in options.files:
        run = load_run([path])
        runs.append((path, run, summarise(run.rows, options.baseline)))
    text = make_document(runs, options.document, blank=options.blank)
    write_file(options.document, text)
    _say(f"Written: {clean(str(options.document))}")


def _say_written(out: Path, written: list[str], removed: list[str]) -> None:
    _say(f"Written to {clean(str(out))}: {', '.join(written)}")
    if removed:
        _say(f"Removed, left from an earlier run: {', '.join(removed)}")


def _newest() -> Path:
    newest = newest_file(STORAGE)
    if newest is None:
        raise ResultsError(
            f"There is no saved run under {STORAGE}/: `tox -e bench` makes one, "
            f"or name a results file."
        )
    return newest


def _write(
    run: Run, summary: Summary, options: argparse.Namespace
) -> tuple[list[Plot], list[str], list[str]]:
    """Write plots, report and table; return the plots, and the names of files written and removed.

    Raises ResultsError, having changed nothing, if a folder cannot be used.
    """
    with _plotting():
        import pyarrow.parquet  # noqa: F401  # a missing package is told before work begins

        from pagedattn.report.data import write_tables
        from pagedattn.report.html.page import make_page
        from pagedattn.report.markdown import make_report
        from pagedattn.report.plots import write_plots
    plots: list[Plot] = []

    def make(folder: Path) -> None:
        plots.extend(write_plots(summary, folder, options.formats))
        command = _command(run, options)
        text = make_report(run, summary, plots, command)
        (folder / _REPORT).write_text(text, encoding="utf-8", newline="\n")
        write_tables(run, folder)
        page = make_page(run, summary, command)
        (folder / _PAGE).write_text(page, encoding="utf-8", newline="\n")

    written, removed = write_into(options.out or DEFAULT_OUT, _PLOT_NAMES, make)
    return plots, written, removed


@contextlib.contextmanager
def _plotting() -> Iterator[None]:
    """Raise ResultsError where a package that draws is missing."""
    try:
        yield
    except ImportError as error:
        raise ResultsError(
            f"Reports need pandas, matplotlib, pyarrow and jinja2 ({error}): "
            f"pip install 'pagedattn[plot]'."
        ) from None


def _draw_concepts(options: argparse.Namespace) -> None:
    """Draw the tutorial's figures, which need no results."""
    for name, value in (
        ("results files", options.files),
        ("--baseline", options.baseline is not None),
        ("--allow-different-machines", options.allow_different_machines),
    ):
        if value:
            raise ResultsError(f"--concepts draws the tutorial's figures and takes no {name}.")
    with _plotting():
        from pagedattn.report.concepts.drawing import write_concepts
    out = options.out or CONCEPTS_OUT

    def make(folder: Path) -> None:
        for number, name in enumerate(CONCEPTS, 1):
            if sys.stderr.isatty():
                print(f"{number} of {len(CONCEPTS)}: {name}", file=sys.stderr)
            write_concepts((name,), folder, options.formats)

    _say_written(out, *write_into(out, CONCEPTS, make))


def _command(run: Run, options: argparse.Namespace) -> str:
    """Return the command that draws the same report again, for the report."""
    words = ["python", "tools/plot.py", *(file.name for file in run.files)]
    if options.baseline is not None:
        words += ["--baseline", clean(options.baseline)]
    if options.formats != FORMATS:
        words += ["--formats", ",".join(options.formats)]
    if options.allow_different_machines:
        words.append("--allow-different-machines")
    return shlex.join(words)


def _print_outcome(run: Run, summary: Summary, plots: list[Plot]) -> None:
    from pagedattn.report.comparison import comparison_tables, hit_rate_tables
    from pagedattn.report.doubts import WHAT_IS_DOUBTED, busy_machines, doubts_of_row
    from pagedattn.report.serving import serving_tables
    from pagedattn.report.tables import DOUBT, bookkeeping_tables, headline_tables

    names = ", ".join(file.name for file in run.files)
    _say(f"{plural(len(run.rows), 'row')} of {names}")
    if run.num_replaced:
        _say(f"{plural(run.num_replaced, 'row')} of earlier files replaced by a later file's")
    if run.num_skipped:
        _say(f"{plural(run.num_skipped, 'benchmark')} of other suites skipped")
    for sentence in busy_machines(run.files):
        _say(sentence)
    if any(doubts_of_row(row) for row in run.rows):
        _say(f"{DOUBT} marks a median with a doubt: {WHAT_IS_DOUBTED}")
    makers = (
        *(headline_tables, bookkeeping_tables, comparison_tables, hit_rate_tables),
        serving_tables,
    )
    for table in (table for make in makers for table in make(summary)):
        _say(f"\n{table.as_text()}")
    for plot in plots:
        if plot.reason is not None:
            _say(f"\nLeft out {plot.name}: {plot.reason}.")


def _say(text: str) -> None:
    """Print, replacing letters that the terminal's encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding))
