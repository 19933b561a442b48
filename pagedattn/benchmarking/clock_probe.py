"""The GPU's clock, measured by a kernel that spins."""

from __future__ import annotations

import torch

FIRST_CYCLES = 240_000
SHORT_CYCLES = 20_000
LONG_CYCLES = 120_000
_SPIN = torch.cuda._sleep  # no public name; spins until the SM's cycle counter has moved so far


class ClockProbe:
    """Tells the clock of the SMs in Hz, from two spins of known cycles.

    What launching and timing cost is the same for both and falls out of the difference, which is
    50 µs at 2 GHz. A third spin goes before them, so that the GPU does not wait for either to be
    launched. A call takes about 0.2 ms of the GPU.
    """

    def __init__(self) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]

    def __call__(self) -> float:
        """Clock of the SMs now, in Hz."""
        _SPIN(FIRST_CYCLES)
        self._events[0].record()
        for cycles, event in zip((SHORT_CYCLES, LONG_CYCLES), self._events[1:], strict=True):
            _SPIN(cycles)
            event.record()
        self._events[-1].synchronize()
        short, long = (self._events[i].elapsed_time(self._events[i + 1]) * 1e-3 for i in range(2))
        return (LONG_CYCLES - SHORT_CYCLES) / (long - short)
