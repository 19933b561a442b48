"""The command line of ``tools/plot.py compare``."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pagedattn.report.arguments import Parser
from pagedattn.report.output import require_no_source, write_file
from pagedattn.report.results import load_run, require_one_machine
from pagedattn.report.text import clean, plural
from pagedattn.report.values import ResultsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pagedattn.report.compare import Change, Comparison
    from pagedattn.report.results import Run

MARGIN = 0.03
"""The default of `compare.compare`, which needs numpy: a difference that matters in practice."""

_EXAMPLES = """\
examples:
  python tools/plot.py compare before.json after.json
      rows that became faster or slower, and those that cannot be told
  python tools/plot.py compare main.json mine.json --fail-on-regression 5%
      the same, and exit code 1 if a row is slower by more than 5 %
  python tools/plot.py compare before.json after.json --html comparison.html
      the same as one page for a browser, without a network
"""


def main(arguments: Sequence[str]) -> int:
    """Run the command; return 0, 1 on a regression, or raise ResultsError."""
    options = _parser().parse_args(arguments)
    from pagedattn.report.compare import compare, comparison_tables, summary_sentence
    from pagedattn.report.doubts import doubts_of_comparison

    require_no_source((options.html, options.markdown), (options.before, options.after))
    before, after = (load_run([path]) for path in (options.before, options.after))
    if not options.allow_different_machines:
        require_one_machine(replace(before, files=before.files + after.files))
    margin = min(options.margin, options.limit or options.margin)
    comparison = compare(before, after, margin=margin)
    found = [] if options.limit is None else comparison.regressions(options.limit)
    tables = comparison_tables(comparison, every=options.all)
    warnings = doubts_of_comparison(before, after, comparison)
    if options.html is not None:
        write_file(options.html, _page(options, before, after, comparison, found, warnings))
    if options.markdown is not None:
        write_file(options.markdown, _markdown(options, comparison, found, warnings))
    for sentence in (summary_sentence(comparison), *warnings):
        _say(sentence)
    for table in tables:
        _say(f"\n{table.as_text()}")
    for path in (options.html, options.markdown):
        if path is not None:
            _say(f"\nWritten: {clean(str(path))}")
    if options.limit is not None:
        _say(f"\n{_verdict_on(found, options.limit, comparison)}")
    return 1 if found else 0


def _page(
    options: argparse.Namespace,
    before: Run,
    after: Run,
    comparison: Comparison,
    found: list[Change],
    warnings: list[str],
) -> str:
    try:
        from pagedattn.report.html.page import make_comparison_page
    except ImportError as error:
        raise ResultsError(
            f"The page needs matplotlib and jinja2 ({error}): pip install 'pagedattn[plot]'."
        ) from None
    words = ["python", "tools/plot.py", "compare", before.files[0].name, after.files[0].name]
    if options.limit is not None:
        words += ["--fail-on-regression", f"{100 * options.limit:g}%"]
    if options.margin != MARGIN:
        words += ["--margin", f"{100 * options.margin:g}%"]
    if options.allow_different_machines:
        words.append("--allow-different-machines")
    words += ["--html", clean(options.html.name)]
    says = [] if options.limit is None else [_verdict_on(found, options.limit, comparison)]
    verdict = " ".join([*says, *warnings])
    return make_comparison_page(before, after, comparison, verdict, shlex.join(words))


def _verdict_on(found: list[Change], limit: float, comparison: Comparison) -> str:
    if not found:
        unclear = comparison.counts["unclear"]
        but = f"; {plural(unclear, 'row')} cannot be told" if unclear else ""
        return f"No row is slower by more than {100 * limit:g} %{but}."
    names = ", ".join(change.name for change in found)
    return f"Slower by more than {100 * limit:g} %: {names}."


def _markdown(
    options: argparse.Namespace, comparison: Comparison, found: list[Change], warnings: list[str]
) -> str:
    from pagedattn.report.compare import comparison_tables, summary_sentence
    from pagedattn.report.text import escape

    parts = ["# Comparison", f"{escape(summary_sentence(comparison))}."]
    parts += map(escape, warnings)
    if options.limit is not None:
        parts.append(escape(_verdict_on(found, options.limit, comparison)))
    parts.append(
        f"Medians with 95 % bootstrap intervals. A row is slower or faster if the interval of the "
        f"ratio is on one side of 1 and the difference is {100 * comparison.margin:g} % at least; "
        f"unclear if the interval is too wide to tell."
    )
    for table in comparison_tables(comparison, every=True):
        parts += [f"## {escape(table.title)}", table.as_markdown()]
    return "\n\n".join(parts) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="plot.py compare",
        description="Compare two runs row by row: medians with 95 % bootstrap intervals, and a "
        "verdict that needs both a sure difference and one that matters.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("before", type=Path, metavar="A", help="results file of the first run")
    parser.add_argument("after", type=Path, metavar="B", help="results file of the second run")
    parser.add_argument(
        "--fail-on-regression",
        dest="limit",
        type=_share,
        metavar="PERCENT",
        help="exit with 1 if a row is slower by more than this, as 5%%",
    )
    parser.add_argument(
        "--margin",
        type=_share,
        default=MARGIN,
        metavar="PERCENT",
        help="difference that matters in practice (default: 3%%, or that of --fail-on-regression "
        "if it is less)",
    )
    parser.add_argument("--all", action="store_true", help="list rows that are the same too")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write the comparison as one page there"
    )
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the comparison of all rows there"
    )
    parser.add_argument(
        "--allow-different-machines",
        action="store_true",
        help="compare even if the runs come from different machines",
    )
    return parser


def _share(text: str) -> float:
    number = text.strip().removesuffix("%")
    try:
        value = float(number) / 100
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and 0 < value < 10):
        raise argparse.ArgumentTypeError(
            f"must be a percentage above 0 and below 1000, as 5%, not {text!r}"
        )
    return value


def _say(text: str) -> None:
    """Print, replacing letters that the terminal's encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding))
