"""Timing on the GPU and by turns, the machine's roofs, and what machine it was."""

from pagedattn.benchmarking.environment import describe_machine, machine_identity
from pagedattn.benchmarking.gpu_timing import (
    DEVICE_CLOCK,
    DeviceClock,
    LaunchGraph,
    require_cold,
    rotation_size,
)
from pagedattn.benchmarking.interleaved import (
    CaseTiming,
    HostWork,
    Rounds,
    ThrottledError,
    time_interleaved,
)
from pagedattn.benchmarking.roofs import Roofs, measure_roofs
from pagedattn.benchmarking.rounds import StopRule, median_precision
from pagedattn.benchmarking.turns import Contender, time_by_turns

__all__ = [
    "DEVICE_CLOCK",
    "CaseTiming",
    "Contender",
    "DeviceClock",
    "HostWork",
    "LaunchGraph",
    "Roofs",
    "Rounds",
    "StopRule",
    "ThrottledError",
    "describe_machine",
    "machine_identity",
    "measure_roofs",
    "median_precision",
    "require_cold",
    "rotation_size",
    "time_by_turns",
    "time_interleaved",
]
