"""The time of one launch: many launches in a CUDA graph, replays timed with events."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MIN_GRAPH_SECONDS = 1e-3
MAX_GRAPH_LAUNCHES = 1000
HOST_CALLS = 30
PLACES = 16
PLACES_BYTES = 2 << 30


class DeviceClock:
    """A clock that measured work alone moves, for pytest-benchmark's `timer`.

    The function under test replays a graph and advances the clock by the time the events
    show; pytest-benchmark then reads the GPU's time where it would read the host's.
    Rounds that were timed by turns are told to it in the same way.
    """

    def __init__(self) -> None:
        self._seconds = 0.0

    def __call__(self) -> float:
        """Seconds of measured work so far."""
        return self._seconds

    def advance(self, seconds: float) -> None:
        """Move the clock on."""
        self._seconds += seconds


DEVICE_CLOCK = DeviceClock()


def rotation_size(bytes_each: int, device: torch.device | str = "cuda") -> int:
    """How many inputs of `bytes_each` bytes to launch in turn.

    Together they are larger than twice the L2. Where in memory an input lies is another matter in
    each process, and changes the time of a small launch by some percent, so there are 16 of them
    even where fewer would be cold, as long as they take 2 GiB at most.
    """
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    cold = 2 * l2_bytes // max(1, bytes_each) + 1
    return max(cold, min(PLACES, PLACES_BYTES // max(1, bytes_each)))


def require_cold(bytes_each: int, count: int, device: torch.device | str = "cuda") -> None:
    """Refuse inputs that would stay in the L2 from one launch to the next.

    Args:
        bytes_each: read or written by a launch.
        count: inputs that are launched in turn.
        device: whose L2.

    Raises:
        ValueError: together they are not larger than twice the L2.

    """
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    if bytes_each * count <= 2 * l2_bytes:
        raise ValueError(
            f"{count} inputs of {bytes_each} bytes are not larger than twice the L2 of {l2_bytes} "
            f"bytes, so the row would not be cold"
        )


class LaunchGraph:
    """Launches captured in one CUDA graph, in turn, so often that a replay lasts a millisecond.

    Args:
        launches: one for each input of the rotation; each enqueues the same work on other data.
            They are kept, and with them the memory that a replay reads and writes.

    """

    def __init__(self, launches: Sequence[Callable[[], object]]) -> None:
        self._launches = tuple(launches)
        self.host_seconds = self._warm_up(launches)
        seconds = self._time_eagerly(launches)
        turns = max(1, round(MIN_GRAPH_SECONDS / (seconds * len(launches))))
        turns = max(1, min(turns, MAX_GRAPH_LAUNCHES // len(launches)))
        self.num_launches = turns * len(launches)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for launch in itertools.chain.from_iterable([launches] * turns):
                launch()
        self._begin = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def replay(self) -> float:
        """Replay once and return the seconds of one launch."""
        self._begin.record()
        self._graph.replay()
        self._end.record()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) * 1e-3 / self.num_launches

    @staticmethod
    def _warm_up(launches: Sequence[Callable[[], object]]) -> float:
        """Compile and settle; return the median seconds of host time that a launch costs."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        samples = []
        with torch.cuda.stream(stream):
            for launch in launches:
                launch()
            torch.cuda.synchronize()
            for _ in range(HOST_CALLS):
                begin = time.perf_counter()
                launches[0]()
                samples.append(time.perf_counter() - begin)
                torch.cuda.synchronize()
        torch.cuda.current_stream().wait_stream(stream)
        return statistics.median(samples)

    @staticmethod
    def seconds_to_plan(plan: Callable[[], object]) -> float:
        """Median seconds of host time of a call that plans; the GPU's part of it is awaited."""
        samples = []
        for _ in range(HOST_CALLS):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            plan()
            torch.cuda.synchronize()
            samples.append(time.perf_counter() - begin)
        return statistics.median(samples)

    @staticmethod
    def _time_eagerly(launches: Sequence[Callable[[], object]]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for launch in launches:
            launch()
        end.record()
        end.synchronize()
        return max(1e-6, begin.elapsed_time(end) * 1e-3 / len(launches))
