"""Ten thousand rows and the first word of help come soon, and time grows with the rows alone."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pagedattn.report import cli
from pagedattn.report.compare import compare, comparison_tables
from pagedattn.report.data import write_tables
from pagedattn.report.document import make_document
from pagedattn.report.results import load_run
from pagedattn.report.summary import summarise

TOOL = Path(__file__).parents[3] / "tools" / "plot.py"
STATS = {"min": 9e-5, "q1": 9.5e-5, "median": 1e-4, "q3": 1.1e-4, "max": 1.2e-4, "rounds": 30}
DATA = [9e-5, *[9.5e-5] * 7, *[1e-4] * 14, *[1.1e-4] * 7, 1.2e-4]


def results_file(path, count, same=""):
    """A file of `count` rows, two implementations a case; `same` names what all rows share."""
    extra = {"area": "attention", "device": "cuda", "bytes": 10**6, "kind": "decode"}
    rows = [
        {
            "fullname": "rows.py::row" if same == "name" else f"rows.py::row{number}",
            "extra_info": extra
            | {
                "workload": "w" if same == "case" else f"w{number // 2}",
                "implementation": "ab"[number % 2],
            },
            "stats": STATS | {"data": DATA},
        }
        for number in range(count)
    ]
    path.write_text(json.dumps({"machine_info": {}, "benchmarks": rows}), encoding="utf-8")
    return path


@pytest.mark.undisturbed
def test_ten_thousand_rows_are_compared_in_ten_seconds(tmp_path, capsys):
    paths = [str(results_file(tmp_path / f"{name}.json", 10_000)) for name in "ab"]
    begin = time.process_time()
    assert cli.main(["compare", *paths, "--markdown", str(tmp_path / "c.md")]) == 0
    assert time.process_time() - begin < 10
    assert "10000 rows: 0 slower, 0 faster, 0 unclear, 10000 same" in capsys.readouterr().out


@pytest.mark.undisturbed
@pytest.mark.parametrize("same", ["", "name", "case"])
def test_time_grows_with_the_rows_and_not_with_their_square(tmp_path, same):
    def seconds(count):
        path = results_file(tmp_path / f"{count}.json", count, same)
        best = float("inf")
        for _ in range(2):
            begin = time.process_time()
            run = load_run([path])
            write_tables(run, tmp_path)
            make_document([(path, run, summarise(run.rows))], tmp_path / "x.md", blank=False)
            comparison_tables(compare(run, run), every=True)[0].as_markdown()
            best = min(best, time.process_time() - begin)
        return best

    seconds(10)
    # eight times the rows: 8 times the time, 64 times if something grew with the square
    assert seconds(4000) < 20 * seconds(500)


@pytest.mark.undisturbed
@pytest.mark.parametrize("words", [["--help"], ["compare", "--help"]], ids=" ".join)
def test_help_comes_in_half_a_second_and_loads_little(words):
    best = float("inf")
    for _ in range(8):
        before = os.times()
        done = subprocess.run(
            [sys.executable, TOOL, *words], capture_output=True, text=True, check=True
        )
        after = os.times()  # of children: what a busy machine made them wait does not count
        best = min(best, sum(after[2:4]) - sum(before[2:4]))
    assert "usage: plot.py" in done.stdout
    assert best < 0.5
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['plot.py', *{words!r}]\n"
        "try:\n"
        f"    runpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
        "except SystemExit:\n"
        "    pass\n"
        "heavy = {'torch', 'pandas', 'matplotlib', 'pyarrow', 'triton', 'scipy'}\n"
        "print('loaded', sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("loaded []\n")
