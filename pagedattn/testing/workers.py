"""Cases of a pytest session run in processes beside one another, and are the session's own.

pytest-xdist alone switches pytest-benchmark off for a whole session. Here the cases that time
nothing go through a pytest of their own with workers, which tells this session what became of each;
what is timed stays with the session and has the machine to itself.
"""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

PIPE = "PAGEDATTN_REPORTS"
"""Environment variable: the number of the file into which the other pytest writes its reports."""

PATIENCE = 20.0  # seconds from asking a process to end to ending it
TOLD_LINES = 15  # of what the other pytest printed, if it ends before its time


class _Writer:
    """Writes each report, pickled."""

    def __init__(self, config: pytest.Config, file: int) -> None:
        self._config = config
        self._pipe = os.fdopen(file, "wb")

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        hook = self._config.hook
        data = hook.pytest_report_to_serializable(config=self._config, report=report)
        data.pop("node", None)  # pytest-xdist's handle of the worker
        pickle.dump(data, self._pipe)
        self._pipe.flush()


def pytest_configure(config: pytest.Config) -> None:
    """In the other pytest, whose plugin this module is: write reports. Its workers write none."""
    if PIPE in os.environ and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Writer(config, int(os.environ.pop(PIPE))))


def run_in_workers(
    session: pytest.Session,
    items: Iterable[pytest.Item],
    count: int,
    arguments: Sequence[str] = (),
    apart: Iterable[pytest.Item] = (),
) -> None:
    """Run items of a session in workers, and report them as if they had run here.

    To be called where the session's loop begins (`pytest_runtestloop`). Needs pytest-xdist, and a
    system that hands open files on to a process it starts. What the session has to end for, such
    as `--maxfail`, ends the workers; what ends the workers ends the session.

    Args:
        session: whose items they are; it goes on without them.
        items: which, one at least; fixtures of a wide scope are made anew by each worker.
        count: of workers.
        arguments: of the command line, for the other pytest besides.
        apart: those of them that take long, and should not all be one worker's.

    Raises:
        pytest.Session.Failed: after too many failures, or the workers ended before their cases.
        pytest.Session.Interrupted: the session is to stop.

    """
    config = session.config
    # a loop that begins with failures takes them for broken modules, and ends
    config.option.continue_on_collection_errors = True
    waiting = {item.nodeid: item for item in items}
    assert waiting, "without names the other pytest would run all there is"
    session.items[:] = [item for item in session.items if item.nodeid not in waiting]
    read, write = os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        cases, printed = Path(folder, "cases"), Path(folder, "printed")
        in_order = _dealt(list(waiting), {item.nodeid for item in apart}, count)
        cases.write_text("\n".join(in_order), encoding="utf-8")
        words = [sys.executable, "-m", "pytest", f"@{cases}", *_options(config), *arguments]
        words += ["-n", str(count), "--dist", "worksteal", "-p", __name__, "--benchmark-disable"]
        # what is asked of this session is not asked of the other one
        own = {key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"}
        with printed.open("w") as output:
            other = subprocess.Popen(
                words,
                pass_fds=[write],
                env={**own, PIPE: str(write)},
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=config.rootpath,
            )
        os.close(write)
        try:
            with os.fdopen(read, "rb") as pipe:
                while (data := _next(pipe)) is not None:
                    _report(session, data, waiting)
                    if session.shouldfail:
                        raise session.Failed(session.shouldfail)
                    if session.shouldstop:
                        raise session.Interrupted(session.shouldstop)
            other.wait()
        finally:
            _end(other)
        if waiting:
            said = printed.read_text(errors="replace").splitlines()[-TOLD_LINES:]
            session.shouldfail = "\n".join(
                [f"the workers ended before {len(waiting)} cases; the last they said:", *said]
            )
            raise session.Failed(session.shouldfail)


def _dealt(names: list[str], apart: set[str], count: int) -> list[str]:
    """Order names so that each of `count` runs of equal length begins with its share of some.

    A worker begins with such a run; neighbours, which may need much memory, stay in one.
    Worked example: of a, b, c, d, e, f with c and e apart, two get c, a, b and e, d, f.
    """
    first = [name for name in names if name in apart]
    rest = iter([name for name in names if name not in apart])
    ordered: list[str] = []
    for worker in range(count):
        ordered += first[worker::count]
        end = len(names) * (worker + 1) // count
        ordered += itertools.islice(rest, max(0, end - len(ordered)))
    return ordered + list(rest)


def _options(config: pytest.Config) -> list[str]:
    given = config.option
    words = ["--rootdir", str(config.rootpath), "-p", "no:cacheprovider", f"--tb={given.tbstyle}"]
    words += ["-c", str(config.inipath)] if config.inipath else []
    flags = {"--showlocals": given.showlocals, "--runxfail": given.runxfail}
    return words + [flag for flag, is_given in flags.items() if is_given]


def _next(pipe: BinaryIO) -> dict[str, object] | None:
    """Return the next report's data, or None after the last."""
    try:
        found: dict[str, object] = pickle.load(pipe)
    except (EOFError, pickle.UnpicklingError):
        return None
    return found


def _report(
    session: pytest.Session, data: dict[str, object], waiting: dict[str, pytest.Item]
) -> None:
    hook = session.config.hook
    report = hook.pytest_report_from_serializable(config=session.config, data=data)
    hook.pytest_runtest_logreport(report=report)
    # a worker that crashes has one report for the case it was at, of no phase
    if report.when not in ("setup", "call"):
        waiting.pop(report.nodeid, None)
        hook.pytest_runtest_logfinish(nodeid=report.nodeid, location=report.location)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs, gently first."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
