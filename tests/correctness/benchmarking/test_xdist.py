"""Under pytest-xdist nothing is timed: that is said, and not saved as if it were."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CASE = "tests/benchmarks/attention/bench_attention_cpu.py"
CHOSEN = "test_other or test_undisturbed or (cpu-prefill-512 and torch)"


def run(*arguments):
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.parametrize("word", ["autosave", "only", "save", "json", "compare"])
def test_what_would_save_nothing_is_refused(request, word):
    root = request.config.pluginmanager.get_plugin(str(ROOT / "conftest.py"))
    root.refuse_to_save_what_is_not_timed(argparse.Namespace(numprocesses=2))
    root.refuse_to_save_what_is_not_timed(argparse.Namespace(**{f"benchmark_{word}": "x"}))
    both = argparse.Namespace(**{f"benchmark_{word}": "x", "numprocesses": 2})
    with pytest.raises(pytest.UsageError, match=f"--benchmark-{word} and -n 2 do not go together"):
        root.refuse_to_save_what_is_not_timed(both)


def test_the_refusal_is_one_sentence():
    ran = run(CASE, "-n", "1", "--benchmark-autosave")
    assert ran.returncode == 4
    assert "do not go together" in ran.stderr
    assert "Traceback" not in ran.stderr


WAITING = """
import time
from pathlib import Path

import pytest

LOG = Path(__file__).parent / "log"


def write(word):
    with LOG.open("a") as file:
        file.write(word + "\\n")


@pytest.mark.parametrize("number", range(6))
def test_other(number):
    write("begin")
    time.sleep(0.05)
    write("end")


@pytest.mark.undisturbed
@pytest.mark.parametrize("number", range(3))
def test_undisturbed(number):
    write("alone")
    time.sleep(0.1)
    write("done")
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A session of two workers, over rows and over the tests above, and what these wrote."""
    pytest.importorskip("fcntl", reason="the system has no file locks of this kind")
    path = tmp_path_factory.mktemp("session") / "test_waiting.py"
    path.write_text(WAITING)
    found = run(CASE, path, "-c", ROOT / "pytest.ini", "--rootdir", ROOT, "-n", "2", "-k", CHOSEN)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout, (path.parent / "log").read_text().split()


def test_rows_run_and_it_is_said_that_nothing_was_timed(ran):
    assert "were not timed" in ran[0]
    assert "10 passed" in ran[0]


def test_nothing_is_said_of_rows_where_none_ran():
    found = run("tests/correctness/test_sequence.py", "-n", "1")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "were not timed" not in found.stdout


def test_nothing_runs_beside_what_is_marked_undisturbed(ran):
    words = ran[1]
    assert words.count("alone") == 3
    running = 0
    for place, word in enumerate(words):
        running += {"begin": 1, "end": -1}.get(word, 0)
        if word == "alone":
            assert running == 0
            assert words[place + 1] == "done"
