"""Ten thousand rows of a real run are reported in time, and a picture of many cases says so."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pagedattn.report.plots import FIRST_CASES, MOST_CASES, limited
from pagedattn.report.results import load_run
from pagedattn.report.summary import summarise

ROOT = Path(__file__).parents[3]
TOOL, FIGURES = ROOT / "tools" / "plot.py", ROOT / "figures"


def many_rows(count):
    """Rows of `count` workloads, two implementations each."""
    stats = {"min": 9e-5, "q1": 9.5e-5, "median": 1e-4, "q3": 1.1e-4, "max": 1.2e-4, "rounds": 30}
    stats["data"] = [9e-5, *[1e-4] * 28, 1.2e-4]
    extra = {"area": "attention", "device": "cuda", "bytes": 10**6, "kind": "decode"}
    return [
        {
            "fullname": f"rows.py::row{number}[{implementation}]",
            "extra_info": {**extra, "workload": f"w{number}", "implementation": implementation},
            "stats": stats,
        }
        for number in range(count)
        for implementation in ("torch", "triton")
    ]


def copies_of_an_h100(count):
    """The rows of a real run, with all columns and rounds, under as many names as are needed."""
    content = json.loads((FIGURES / "h100" / "results.json").read_text())
    real, rows = content["benchmarks"], []
    for number in range(count):
        row = real[number % len(real)]
        extra = dict(row["extra_info"])
        extra["workload"] += f"-{number // len(real)}"
        rows.append(row | {"fullname": f"{row['fullname']}-{number}", "extra_info": extra})
    return content | {"benchmarks": rows}


def seconds_to_parse(text):
    begin = time.process_time()
    json.loads(text)
    return time.process_time() - begin


@pytest.mark.undisturbed
def test_ten_thousand_real_rows_are_reported_in_ten_seconds_by_the_whole_command(tmp_path):
    path, text = tmp_path / "results.json", json.dumps(copies_of_an_h100(10_000))
    path.write_text(text)
    parsing = [seconds_to_parse(text) for _ in range(2)]
    before = os.times()
    done = subprocess.run(
        [sys.executable, TOOL, path, "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=True,
    )
    after = os.times()
    parsing += [seconds_to_parse(text) for _ in range(2)]
    assert "10000 rows" in done.stdout
    used = sum(after[2:4]) - sum(before[2:4])  # by children: a busy machine's waits do not count
    # a third of a second where nothing else runs; a machine may get slower on the way
    assert used < max(10.0, 40 * max(parsing))


def test_a_picture_of_many_cases_draws_the_first_and_says_so(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"machine_info": {}, "benchmarks": many_rows(MOST_CASES + 1)}))
    (group,) = summarise(load_run([path]).rows).data
    drawn = limited(group)
    assert drawn.cases == group.cases[:FIRST_CASES]
    assert drawn.title.endswith(f"the first {FIRST_CASES} of {MOST_CASES + 1}")
    few = replace(group, cases=group.cases[:MOST_CASES])
    assert limited(few) is few
