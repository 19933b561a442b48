"""The time of one launch: many launches in a CUDA graph, replays timed with events."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MIN_GRAPH_SECONDS = 2e-3
MAX_GRAPH_LAUNCHES = 1000
HOST_CALLS = 30
FEWEST_HOST_CALLS = 5
HOST_SECONDS = 0.1  # of calls and waits for them, after which the fewest will do
COVER_CYCLES = 400_000  # 0.2 ms at 2 GHz; the host enqueues a graph in 10 to 100 µs
MOST_USUAL_COVER = 16 * COVER_CYCLES
MAX_COVERS = 8
PLACES = 16
PLACES_BYTES = 2 << 30
LONG_SECONDS = 1e-4
NEVER_WARM_SECONDS = 5e-3  # to read as much as its L2 holds takes an H100 0.3 % of it


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


def rotation_size(
    bytes_each: int, device: torch.device | str = "cuda", *, least_seconds: float = 0.0
) -> int:
    """How many inputs of `bytes_each` bytes to launch in turn.

    Together they are larger than twice the L2. Where in memory an input lies is another matter in
    each process, and changes the time of a small launch by some percent, so there are 16 of them
    even where fewer would be cold, as long as they take 2 GiB at most.

    Args:
        bytes_each: read or written by a launch.
        device: whose L2.
        least_seconds: that a launch takes; one of 0.1 ms and more does not depend on the places.

    """
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    cold = 2 * l2_bytes // max(1, bytes_each) + 1
    if least_seconds >= LONG_SECONDS:
        return cold
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
    """Launches captured in one CUDA graph, in turn, so often that a replay lasts 2 ms.

    Of launches of 5 ms or more, the first alone is captured: whatever the L2 held of its input
    would not show in its time, and a replay of a whole rotation could last for a second.

    A kernel spins while the host enqueues a replay and the events around it: on an idle GPU the
    first event would be reached before the graph is there, and a round would contain some of the
    host's time.

    Args:
        launches: one for each input of the rotation; each enqueues the same work on other data.
            What is captured of them is kept, and with it the memory that a replay reads and
            writes.

    Attributes:
        host_seconds: median that a launch costs the host.
        num_inputs: launches of the rotation that are captured, all or one.
        num_launches: in a replay.

    """

    def __init__(self, launches: Sequence[Callable[[], object]]) -> None:
        self.host_seconds, awaited = self._warm_up(launches)
        self._begin = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)
        self._cover_cycles = COVER_CYCLES
        # the GPU's time is part of what was awaited, and it alone counts
        if awaited >= NEVER_WARM_SECONDS and self._seconds_of(launches[:1]) >= NEVER_WARM_SECONDS:
            return
        one_turn = self._seconds_of(launches) * len(launches)
        turns = math.ceil(MIN_GRAPH_SECONDS / one_turn)
        turns = max(1, min(turns, MAX_GRAPH_LAUNCHES // len(launches)))
        if turns > 1:
            self._capture(launches, turns)

    def replay(self) -> float:
        """Replay once and return the seconds of one launch.

        Raises:
            RuntimeError: the host could not enqueue a replay while the GPU spun.

        """
        cycles = self._cover_cycles
        for _ in range(MAX_COVERS):
            torch.cuda._sleep(cycles)
            self._begin.record()
            self._graph.replay()
            self._end.record()
            covered = not self._begin.query()
            self._end.synchronize()
            if covered:
                return self._begin.elapsed_time(self._end) * 1e-3 / self.num_launches
            cycles *= 2
            self._cover_cycles = min(cycles, MOST_USUAL_COVER)
        raise RuntimeError(
            "the host is too slow or too busy to enqueue a CUDA graph while the GPU waits for it, "
            "so its time cannot be told from the GPU's"
        )

    def _seconds_of(self, launches: Sequence[Callable[[], object]]) -> float:
        """Capture one turn of them; return the seconds of one launch."""
        self._capture(launches, 1)
        return min(self.replay() for _ in range(2))

    def _capture(self, launches: Sequence[Callable[[], object]], turns: int) -> None:
        self._launches, self.num_inputs = tuple(launches), len(launches)
        self.num_launches = turns * self.num_inputs
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for launch in itertools.chain.from_iterable([self._launches] * turns):
                launch()

    @staticmethod
    def _warm_up(launches: Sequence[Callable[[], object]]) -> tuple[float, float]:
        """Compile and settle; return the median seconds of a launch's call, and to its end."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        called: list[float] = []
        awaited: list[float] = []
        with torch.cuda.stream(stream):
            for launch in launches:
                launch()
            torch.cuda.synchronize()
            while len(called) < HOST_CALLS and (
                len(called) < FEWEST_HOST_CALLS or math.fsum(awaited) < HOST_SECONDS
            ):
                begin = time.perf_counter()
                launches[0]()
                called.append(time.perf_counter() - begin)
                torch.cuda.synchronize()
                awaited.append(time.perf_counter() - begin)
        torch.cuda.current_stream().wait_stream(stream)
        return statistics.median(called), statistics.median(awaited)

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
