"""A run that is ended early saves the rows that it has timed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ROWS = """
import os
import signal


def bench_done(benchmark):
    benchmark.pedantic(sum, args=([1, 2],), rounds=3)


def bench_ended(benchmark):
    os.kill(os.getpid(), signal.{name})
    benchmark(sum, [1, 2])
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_rows_before_the_end_are_saved(tmp_path, name):
    rows, results = tmp_path / "bench_rows.py", tmp_path / "results.json"
    rows.write_text(ROWS.format(name=name))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(rows)]
    command += ["-c", str(ROOT / "pytest.ini"), "--rootdir", str(ROOT), "-p", "conftest"]
    ran = subprocess.run(
        [*command, f"--benchmark-json={results}"],
        env={name: text for name, text in os.environ.items() if not name.startswith("PYTEST_")},
        capture_output=True, text=True, cwd=ROOT, check=False,
        # a shell's background jobs are deaf to it, and what they start
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert ran.returncode == 2, ran.stdout + ran.stderr
    assert [row["name"] for row in json.loads(results.read_text())["benchmarks"]] == ["bench_done"]
