"""Launches over cold inputs whose kernel notes when its programs come to named moments."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pagedattn.benchmarking.attention_rows import AttentionCase
from pagedattn.benchmarking.gpu_timing import LaunchGraph, require_cold
from pagedattn.benchmarking.launch_trace import LaunchTrace

if TYPE_CHECKING:
    from pagedattn.attention import AttentionCall
    from pagedattn.attention.cuda.decode import DecodeLaunch
    from pagedattn.attention.cuda.prefill import PrefillLaunch
    from pagedattn.workloads import AttentionShape

REPLAYS = 20
LAUNCHES = 9


@dataclass(frozen=True)
class Tracing:
    """What a traced row shows.

    Attributes:
        traces: of the last launch of each of the last replays.
        seconds: median of a launch that notes moments.
        usual_seconds: median of one that does not.

    """

    traces: tuple[LaunchTrace, ...]
    seconds: float
    usual_seconds: float


def trace_row(shape: AttentionShape) -> Tracing:
    """Replay launches over inputs that are rotated as a benchmark's are, and read the marks.

    Raises:
        ValueError: the row is not one launch of a kernel that can note moments.

    """
    rotation = AttentionCase.of(shape, "cuda").rotation
    require_cold(shape.kv_bytes, len(rotation))
    calls = [inputs.call() for inputs in rotation]
    usual, launch = launch_of(calls[0]), launch_of(calls[0], trace=True)
    graphs = [LaunchGraph([partial(each, call) for call in calls]) for each in (usual, launch)]
    seconds: tuple[list[float], list[float]] = [], []
    traces = []
    for _ in range(REPLAYS):
        for graph, found in zip(graphs, seconds, strict=True):
            found.append(graph.replay())
        traces.append(LaunchTrace.of_marks(launch.marks()))
    usual_seconds, traced_seconds = (statistics.median(found) for found in seconds)
    return Tracing(tuple(traces[-LAUNCHES:]), traced_seconds, usual_seconds)


def launch_of(call: AttentionCall, *, trace: bool = False) -> DecodeLaunch | PrefillLaunch:
    """Return the launch that the implementation `cuda` would choose for a call.

    Raises:
        ValueError: the call goes to Triton's kernels, or to two.

    """
    # here: the kernels' package needs Triton
    from pagedattn.attention.cuda import decode_calls, launcher_of, mixed

    launcher = launcher_of(call)
    if launcher is None:
        raise ValueError(f"the CUDA kernels cannot take {decode_calls.not_taken(call)}")
    if issubclass(launcher, mixed.MixedLaunch):
        raise ValueError("this mixed batch is two launches")
    return launcher(call, trace=trace)
