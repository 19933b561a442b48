#!/usr/bin/env python3
"""See what a comparison is worth on this machine: the same code twice, and once a slower kernel.

``python tools/check_comparison.py --out figures/h100-repeat -- -m gpu -k "not torch"`` runs the
rows that pytest's options after ``--`` choose three times, the last time with one row made 5 %
slower, and compares. It exits with 1 if fewer than 95 % of the rows of the first two runs are the
same, or if anything else than the slowed row is found.
"""

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("pagedattn") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pagedattn.report import cli
from pagedattn.report.arguments import Parser
from pagedattn.report.compare import Comparison, compare
from pagedattn.report.output import require_folder
from pagedattn.report.results import load_run
from pagedattn.report.text import clean
from pagedattn.report.values import ResultsError

ROOT = Path(__file__).resolve().parents[1]
ENOUGH = 0.95


def main(arguments: list[str] | None = None) -> int:
    """Run and compare; return 0, 1 if the comparison fails the check, or 2 if a run does.

    It is 2 too, after one sentence on stderr, if an argument is wrong.
    """
    parser = Parser(prog="check_comparison.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for all files")
    parser.add_argument(
        "--row",
        default="decode-B64-4k-triton",
        help="row that is slowed (default: %(default)s; on a CPU cpu-prefill-512-torch is one)",
    )
    parser.add_argument("options", nargs="*", help="pytest's, after --")
    try:
        asked = parser.parse_args(arguments)
        require_folder(asked.out)
        asked.out.mkdir(parents=True, exist_ok=True)
        return check(asked)
    except ResultsError as error:
        print(clean(str(error)), file=sys.stderr)
        return 2


def check(asked: argparse.Namespace) -> int:
    """Run and compare; return the exit code."""
    files = {name: asked.out / f"{name}.json" for name in ("first", "second", "slowed")}
    for name, path in files.items():
        slow_down = ["--slow-down", asked.row] if name == "slowed" else []
        words = [sys.executable, "-m", "pytest", "-q", str(ROOT / "tests" / "benchmarks")]
        words += ["--benchmark-only", f"--benchmark-json={path.resolve()}", *slow_down]
        print(f"{name} run", flush=True)
        if subprocess.run([*words, *asked.options], cwd=ROOT, check=False).returncode:
            print(f"The {name} run failed.", file=sys.stderr)
            return 2
    for name, one, other in (("comparison", "first", "second"), ("slowed", "second", "slowed")):
        print(f"\n{one} and {other} run")
        pages = [asked.out / f"{name}.{suffix}" for suffix in ("md", "html")]
        words = ["compare", str(files[one]), str(files[other])]
        if cli.main([*words, "--markdown", str(pages[0]), "--html", str(pages[1])]):
            return 2
    same, slowed = (
        compare(load_run([files[one]]), load_run([files[other]]))
        for one, other in (("first", "second"), ("second", "slowed"))
    )
    problems = [*too_few_same(same), *wrongly_found(slowed, asked.row)]
    print("\n" + ("\n".join(problems) or "The same code is the same, and the slow-down is found."))
    return 1 if problems else 0


def too_few_same(comparison: Comparison) -> list[str]:
    """Say so if less than 95 % of the rows are the same."""
    count, rows = comparison.counts["same"], len(comparison.changes)
    return [] if count >= ENOUGH * rows else [f"Only {count} of {rows} rows are the same."]


def wrongly_found(comparison: Comparison, row: str) -> list[str]:
    """Say so if the row is not slower, and which others are said to have changed."""
    named = f"[{row}]"
    verdicts = {change.name: change.verdict for change in comparison.changes}
    own = [verdict for name, verdict in verdicts.items() if name.endswith(named)]
    others = [
        f"{name} is {verdict}, and was not touched."
        for name, verdict in verdicts.items()
        if verdict in ("slower", "faster") and not name.endswith(named)
    ]
    return [*([] if own == ["slower"] else [f"{row} is {own[0] if own else 'absent'}."]), *others]


if __name__ == "__main__":
    sys.exit(main())
