"""What a session of this suite adds to pytest's: findings, rooms for one, and how many workers."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    import argparse
    from collections.abc import Generator

try:
    import fcntl
except ImportError:  # Windows has none: there, pytest-xdist disturbs what measures time
    fcntl = None  # type: ignore[assignment]

LEAST_CASES_FOR_WORKERS = 200
MOST_WORKERS = 15  # as many have room on a GPU of 80 GB
KEPT_BYTES = 1 << 30  # of a GPU's memory, by a worker between its cases


class Findings:
    """A plugin that collects what cases kept, wherever and whenever they ran.

    A case keeps a finding as an item of its `user_properties` named ``finding``.
    """

    def __init__(self) -> None:
        self._found: dict[str, list[Any]] = {}
        self._nodeids: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Note the order of the cases."""
        self._nodeids = [item.nodeid for item in session.items]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take what a case kept."""
        if report.when == "call":
            found = [value for name, value in report.user_properties if name == "finding"]
            self._found[report.nodeid] = found

    @property
    def found(self) -> list[Any]:
        """Findings in the order of the session's cases."""
        return [one for nodeid in self._nodeids for one in self._found.get(nodeid, ())]


class Room:
    """A plugin of pytest-xdist's workers: a test marked ``undisturbed`` has the room to itself.

    Others share it. Who waits holds the gate, so that nobody enters before.

    Args:
        name: the same for all workers of a session, and for no other session.

    """

    def __init__(self, name: str) -> None:
        folder = Path(tempfile.gettempdir())
        self._gate, self._room = (
            (folder / f"{name}-{what}").open("w") for what in ("gate", "room")
        )

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Enter, run, and leave; give the GPU's memory back to the other workers."""
        alone = item.get_closest_marker("undisturbed") is not None
        fcntl.flock(self._gate, fcntl.LOCK_EX)
        fcntl.flock(self._room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(self._gate, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            if torch.cuda.is_available() and torch.cuda.memory_reserved() > KEPT_BYTES:
                torch.cuda.empty_cache()
            fcntl.flock(self._room, fcntl.LOCK_UN)

    def pytest_unconfigure(self) -> None:
        """Remove the files; whoever is first does."""
        for lock in (self._gate, self._room):
            lock.close()
            Path(lock.name).unlink(missing_ok=True)


def room_of(config: pytest.Config) -> Room | None:
    """Return the room that this worker shares with others; None if it is no worker."""
    worker = getattr(config, "workerinput", None)
    return None if worker is None or fcntl is None else Room(f"pagedattn-{worker['testrunuid']}")


def is_row(item: pytest.Item) -> bool:
    """Whether a case is a row of a benchmark."""
    return item.path.name.startswith("bench_")


def may_run_in_a_worker(item: pytest.Item) -> bool:
    """Whether a case needs the GPU and times nothing."""
    is_timed = is_row(item) or item.get_closest_marker("undisturbed")
    return item.get_closest_marker("gpu") is not None and not is_timed


def workers_for(config: pytest.Config, num_cases: int) -> int:
    """Return how many workers a session's cases are run in; 0 where they stay in its process.

    They stay where somebody watches, where pytest-xdist was told how many, and where they are few.
    """
    option = config.option
    watched = option.usepdb or option.trace or option.capture == "no" or option.collectonly
    shown = option.setupshow or option.setuponly or option.setupplan
    # pytest-xdist's own -n, even 0, says what to do; without pytest-xdist there is no such option,
    # and in its workers there is, but not what was given
    told = getattr(option, "numprocesses", 0) is not None or hasattr(config, "workerinput")
    few = option.benchmark_only or num_cases < LEAST_CASES_FOR_WORKERS
    if watched or shown or told or few or fcntl is None:
        return 0
    spare = len(os.sched_getaffinity(0)) - 1
    return min(spare, MOST_WORKERS) if spare > 1 else 0


def words_for_workers(option: argparse.Namespace) -> list[str]:
    """Words of the command line without which workers would not have a session's cases.

    Worked example: ``-m gpu --nightly --shape prefill-8k`` gives ``--nightly --shape prefill-8k``.

    Args:
        option: of this suite's session: `nightly`, `impl` and `shape`.

    """
    words = ["--nightly"] if option.nightly else []
    if option.impl is not None:
        words += ["--impl", ",".join(option.impl)]
    for name in option.shape:
        words += ["--shape", name]
    return words
