"""Under pytest-xdist nothing is timed: that is said, and not saved as if it were."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CASE = "tests/benchmarks/attention/bench_attention_cpu.py"


def run(*arguments):
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", CASE]
    return subprocess.run(
        [*command, "-k", "cpu-prefill-512 and torch", *arguments],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "option", ["--benchmark-autosave", "--benchmark-only", "--benchmark-save=x"]
)
def test_what_would_save_nothing_is_refused_in_one_sentence(option):
    ran = run("-n", "1", option)
    assert ran.returncode == 4
    assert "do not go together" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_tests_run_and_it_is_said_that_nothing_was_timed():
    ran = run("-n", "1")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "were not timed" in ran.stdout
    assert "1 passed" in ran.stdout
