"""Cases that run in workers are the session's own, whatever becomes of them."""

import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import pytest

from pagedattn.testing import workers
from pagedattn.testing.session import words_for_workers, workers_for
from pagedattn.testing.workers import _dealt

pytest.importorskip("xdist", reason="pytest-xdist is not installed")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="it hands no open files on")

CONFTEST = """
import os

import pytest

from workers import run_in_workers

KEPT = []


def pytest_addoption(parser):
    parser.addoption("--word", default="unsaid")


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    if not hasattr(session.config, "workerinput") and session.config.option.numprocesses is None:
        cases = [item for item in session.items if "alone" not in item.name]
        run_in_workers(session, cases, 2, ["--word", "said"])
    return (yield)


@pytest.fixture
def word(request):
    return request.config.option.word


def pytest_runtest_logreport(report):
    KEPT.extend(report.user_properties if report.when == "call" else ())


def pytest_sessionfinish(session):
    if not hasattr(session.config, "workerinput"):
        print(f"kept {sorted(map(tuple, KEPT))}")
"""

CASES = """
import os
import time

import pytest


@pytest.mark.parametrize("number", range(8))
def test_passes(number, word, request):
    assert word == "said"
    assert "PYTEST_XDIST_WORKER" in os.environ
    request.node.user_properties.append(("number", number))
    time.sleep(0.02)


def test_fails():
    assert 1 + 1 == 3, "arithmetic"


def test_is_skipped():
    pytest.skip("no reason")


@pytest.mark.xfail(reason="expected")
def test_is_expected_to_fail():
    raise AssertionError


@pytest.fixture
def broken():
    raise OSError("broken")


def test_has_a_broken_fixture(broken):
    pass


def test_alone(word):
    assert word == "unsaid"
    assert "PYTEST_XDIST_WORKER" not in os.environ


def test_crashes():
    os._exit(1)


@pytest.mark.parametrize("text", ["a b", "x[1]", "ü::y", "@z"])
def test_names_are_taken_as_they_are(text):
    pass
"""


def session(folder, cases, *arguments, **environment):
    # the module by itself, without the package's torch, which five processes would import
    shutil.copy(workers.__file__, folder / "workers.py")
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_cases.py").write_text(cases)
    (folder / "pytest.ini").write_text("[pytest]\n")
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    own = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    own["PYTHONPATH"] = str(folder)
    return subprocess.run(
        words, capture_output=True, text=True, cwd=folder, check=False, env=own | environment
    )


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A session with cases of every outcome: what it printed, and its results as XML."""
    folder = tmp_path_factory.mktemp("session")
    # what is asked of the session is not asked of its workers
    asked = {"PYTEST_ADDOPTS": "-k 'not everyone' --durations=3"}
    found = session(folder, CASES, "--junitxml=results.xml", **asked)
    return found, ElementTree.parse(folder / "results.xml").getroot().find("testsuite")


def test_every_outcome_is_counted_as_if_the_case_had_run_here(ran):
    found, suite = ran
    summary = "2 failed, 13 passed, 1 skipped, 1 xfailed, 1 error"
    assert summary in found.stdout, found.stdout + found.stderr
    assert found.returncode == 1
    names = [case.get("name") for case in suite.iter("testcase")]
    assert len(names) == len(set(names)) == 18


def test_a_name_may_hold_anything(ran):
    names = [case.get("name") for case in ran[1].iter("testcase")]
    assert sum("names_are_taken" in name for name in names) == 4
    assert "test_names_are_taken_as_they_are[x[1]]" in names


def test_a_worker_that_crashes_fails_its_case(ran):
    assert "crashed while running 'test_cases.py::test_crashes'" in ran[0].stdout


def test_a_failure_is_told_where_it_happened(ran):
    assert "arithmetic" in ran[0].stdout
    assert "test_cases.py:17: AssertionError" in ran[0].stdout
    assert "OSError: broken" in ran[0].stdout


def test_what_a_case_keeps_of_itself_comes_along(ran):
    assert f"kept {[('number', number) for number in range(8)]}" in ran[0].stdout


def test_what_is_timed_and_how_long_it_took_comes_along(ran):
    assert "slowest 3 durations" in ran[0].stdout
    times = [float(case.get("time")) for case in ran[1].iter("testcase")]
    assert sum(time >= 0.02 for time in times) >= 8


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("num_apart", [0, 1, 5, 20])
def test_every_case_is_dealt_once_and_neighbours_stay_together(count, num_apart):
    names = [f"{number:02}" for number in range(20)]
    apart = set(names[3 : 3 + num_apart])
    dealt = _dealt(names, apart, count)
    assert sorted(dealt) == names
    assert [name for name in dealt if name not in apart] == sorted(set(names) - apart)
    for worker in range(count):
        own = dealt[20 * worker // count : 20 * (worker + 1) // count]
        assert len(apart & set(own)) <= -(-num_apart // count)
        assert all(name in apart for name in own[: len(apart & set(own))])


def test_an_example_of_dealing():
    assert _dealt(list("abcdef"), {"c", "e"}, 2) == list("cabedf")


def test_a_session_that_ends_early_ends_its_workers(tmp_path):
    many = "import time, pytest\n@pytest.mark.parametrize('n', range(200))\ndef test_it(n):\n"
    found = session(tmp_path, many + "    time.sleep(0.05)\n    assert n != 3\n", "--maxfail=1")
    assert "stopping after 1 failures" in found.stdout, found.stdout + found.stderr
    passed = int(re.search(r"(\d+) passed", found.stdout)[1])
    assert passed < 190
    assert found.returncode == 1


def test_workers_that_end_before_their_cases_end_the_session_with_what_they_said(tmp_path):
    cases = """
    import os
    if "PYTEST_XDIST_WORKER" in os.environ:
        raise OSError("not in a worker")
    def test_it():
        pass
    def test_alone():
        pass
    """
    lines = "\n".join(line[4:] for line in cases.splitlines())
    found = session(tmp_path, lines)
    assert "the workers ended before 1 cases" in found.stdout, found.stdout + found.stderr
    assert "not in a worker" in found.stdout
    assert "passed" not in found.stdout
    assert found.returncode == 1


@pytest.fixture
def policy(monkeypatch):
    """How many workers the suite takes for options and a number of cases, on 16 processors."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    usual = dict.fromkeys(
        ("usepdb", "trace", "collectonly", "setupshow", "setuponly", "setupplan", "benchmark_only")
    )

    def count(num_cases=1000, of_config=(), **given):
        options = {**usual, "capture": "fd", "numprocesses": None, **given}
        config = SimpleNamespace(option=SimpleNamespace(**options), **dict(of_config))
        return workers_for(config, num_cases)

    return count


def test_many_cases_take_a_worker_for_each_processor_but_one(policy, monkeypatch):
    assert policy() == 15
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert policy() == 3


@pytest.mark.parametrize(
    "given",
    [
        {"numprocesses": 0},
        {"numprocesses": 4},
        {"usepdb": True},
        {"capture": "no"},
        {"benchmark_only": True},
        {"setupplan": True},
        {"num_cases": 199},
        {"of_config": {"workerinput": {}}},
    ],
    ids=json.dumps,
)
def test_who_watches_or_says_so_has_the_cases_in_one_process(policy, given):
    assert policy(**given) == 0


def test_workers_are_told_what_a_session_was_given_of_implementations_and_shapes():
    option = SimpleNamespace(nightly=False, impl=None, shape=[])
    assert words_for_workers(option) == []
    option = SimpleNamespace(
        nightly=True, impl=["cuda", "triton"], shape=["prefill-8k", "decode-B1-300"]
    )
    shapes = ["--shape", "prefill-8k", "--shape", "decode-B1-300"]
    assert words_for_workers(option) == ["--nightly", "--impl", "cuda,triton", *shapes]


def test_a_case_of_attention_has_one_name_whatever_the_session_is_given(pytestconfig):
    # the folder's conftest is loaded late, beside other tests
    whole = ["tests/correctness", "--ignore-glob=*/correctness/[!a]*"]
    whole += ["--ignore-glob=*/attention/test_[!w]*"]
    words = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    names = []
    for given in (whole, ["tests/correctness/attention/test_write_kv.py"]):
        found = subprocess.run(
            [*words, *given, "-k", "test_what_is_nan_stays_nan_in_fp8"],
            capture_output=True,
            text=True,
            cwd=pytestconfig.rootpath,
            check=False,
        )
        names.append(sorted(line for line in found.stdout.splitlines() if "::" in line))
    assert names[0]
    assert names[0] == names[1]
