"""The check of a machine: the same code twice, and a kernel that really became slower."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[3]
TOOL = ROOT / "tools" / "check_comparison.py"
REPEATED = ROOT / "figures" / "h100-repeat"
SLOWED = "decode-B64-4k-triton"


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def fake_runs(monkeypatch, tool, factors):
    """Write results where pytest would: 20 rows, times `factors(run, row)` of a millisecond."""
    rng = np.random.default_rng(0)
    asked = []

    def run(words, **_):
        target = Path(next(w for w in words if w.startswith("--benchmark-json=")).split("=")[1])
        asked.append([word for word in words if word.startswith(("--slow-down", "decode"))])
        rows = []
        for number in range(20):
            name = "decode-B64-4k-triton" if number == 7 else f"row{number}"
            times = 1e-3 * factors(target.stem, number) * (1 + 0.002 * rng.normal(size=30))
            low, q1, median, q3, high = np.percentile(times, (0, 25, 50, 75, 100)).tolist()
            stats = {"min": low, "q1": q1, "median": median, "q3": q3, "max": high, "rounds": 30}
            extra = {"area": "attention", "implementation": "triton", "workload": name}
            rows.append(
                {
                    "fullname": f"x.py::bench_attention[{name}]",
                    "extra_info": extra,
                    "stats": stats | {"data": times.tolist()},
                }
            )
        target.write_text(json.dumps({"machine_info": {}, "benchmarks": rows}))
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(tool.subprocess, "run", run)
    return asked


@pytest.mark.parametrize(
    ("factors", "code", "sentence"),
    [
        (lambda run, row: 1.05 if (run, row) == ("slowed", 7) else 1, 0, "slow-down is found"),
        (lambda *_: 1, 1, "decode-B64-4k-triton is same"),
        (
            lambda run, row: 1.05 if run == "slowed" and row in (7, 9) else 1,
            1,
            "bench_attention[row9] is slower, and was not touched.",
        ),
        (
            lambda run, row: (
                1.2 if (run == "second" and row < 2) or (run, row) == ("slowed", 7) else 1
            ),
            1,
            "Only 18 of 20 rows are the same.",
        ),
    ],
    ids=["found", "missed", "another", "not the same"],
)
def test_it_passes_if_the_slowed_row_and_nothing_else_is_found(
    tmp_path, monkeypatch, capsys, factors, code, sentence
):
    tool = module(TOOL)
    asked = fake_runs(monkeypatch, tool, factors)
    assert tool.main(["--out", str(tmp_path)]) == code
    assert sentence in capsys.readouterr().out
    assert asked == [[], [], ["--slow-down", "decode-B64-4k-triton"]]
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".html"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "the following arguments are required: --out; --help shows what is allowed.\n"),
        (["--out", "file"], "The output folder file is a file.\n"),
        (["--out", "file/below"], "The output folder file/below cannot be written: Not a dir"),
        (["--out", "/proc/x"], "The output folder /proc/x cannot be written: No such file"),
        (["--out", "/proc"], "The output folder /proc cannot be written: No such file"),
    ],
    ids=["no folder", "a file", "below a file", "below /proc", "/proc"],
)
def test_a_wrong_argument_is_told_in_one_sentence_before_a_run(
    tmp_path, monkeypatch, capsys, words, sentence
):
    tool = module(TOOL)
    asked = fake_runs(monkeypatch, tool, lambda *_: 1)
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    assert tool.main(words) == 2
    out, told = capsys.readouterr()
    assert told.startswith(sentence)
    assert (out, told.count("\n"), asked) == ("", 1, [])
    assert Path("file").read_text() == "mine"


def test_three_real_runs_pass_the_check_for_the_row_that_was_slowed():
    tool = module(TOOL)
    paths = [REPEATED / f"{name}.json" for name in ("first", "second", "slowed")]
    slowed = [
        row["name"]
        for row in json.loads(paths[2].read_text())["benchmarks"]
        if "slowed_by" in row["extra_info"]
    ]
    assert slowed == [f"bench_attention[{SLOWED}]"]
    runs = [tool.load_run([path]) for path in paths]
    same, found = (tool.compare(*pair) for pair in itertools.pairwise(runs))
    assert tool.too_few_same(same) == []
    assert tool.wrongly_found(found, SLOWED) == []
    assert tool.wrongly_found(same, SLOWED) == [f"{SLOWED} is same."]


@pytest.mark.undisturbed
def test_a_slowed_launch_takes_five_percent_longer_and_gives_the_same():
    slower_on_host = module(ROOT / "tests/benchmarks/attention/conftest.py").slower_on_host

    def spin():
        end = time.perf_counter() + 2e-3
        while time.perf_counter() < end:
            pass
        return "result"

    seconds = []
    for _ in range(30):
        begin = time.perf_counter()
        assert slower_on_host(spin)() == "result"
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) == pytest.approx(2.1e-3, rel=0.01)


def test_a_row_that_is_slowed_says_so_and_another_name_is_refused(tmp_path):
    target = tmp_path / "run.json"
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-only"]
    words += ["tests/benchmarks/attention/bench_attention_cpu.py", f"--benchmark-json={target}"]

    def run(*more):
        # a session of its own, also where pytest-xdist runs this one
        own = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST_")}
        return subprocess.run(
            [*words, *more], cwd=ROOT, env=own, capture_output=True, text=True, check=False
        )

    ran = run("-k", "cpu-prefill-4x128 and not reference", "--slow-down", "cpu-prefill-4x128-torch")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = {row["name"]: row["extra_info"] for row in json.loads(target.read_text())["benchmarks"]}
    assert {name: row.get("slowed_by") for name, row in rows.items()} == {
        "bench_attention[cpu-prefill-4x128-torch]": 0.05,
        "bench_attention[cpu-prefill-4x128-sdpa_contiguous]": None,
    }
    refused = run("--slow-down", "cpu-prefill-4x128-nobody")
    assert refused.returncode == 4
    assert "is no row of attention" in refused.stderr
