"""The GPU's clock, measured by a kernel that spins."""

from __future__ import annotations

import torch

SHORT_CYCLES = 20_000
LONG_CYCLES = 120_000
_SPIN = torch.cuda._sleep  # no public name; spins until the SM's cycle counter has moved so far


class ClockProbe:
    """Tells the clock of the SMs in Hz, from two spins of known cycles in CUDA graphs.

    What launching and timing cost is the same for both and falls out of the difference, which is
    50 µs at 2 GHz. A call takes about 0.1 ms of the GPU.
    """

    def __init__(self) -> None:
        self._graphs = [_spin_graph(cycles) for cycles in (SHORT_CYCLES, LONG_CYCLES)]
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]

    def __call__(self) -> float:
        """Clock of the SMs now, in Hz."""
        self._events[0].record()
        for graph, event in zip(self._graphs, self._events[1:], strict=True):
            graph.replay()
            event.record()
        self._events[-1].synchronize()
        short, long = (self._events[i].elapsed_time(self._events[i + 1]) * 1e-3 for i in range(2))
        return (LONG_CYCLES - SHORT_CYCLES) / (long - short)


def _spin_graph(cycles: int) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _SPIN(cycles)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _SPIN(cycles)
    return graph
