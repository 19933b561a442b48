"""Timing on the GPU and by turns, the machine's roofs, and what machine it was."""

from pagedattn.benchmarking.environment import describe_machine, machine_identity
from pagedattn.benchmarking.gpu_timing import DEVICE_CLOCK, DeviceClock, LaunchGraph, rotation_size
from pagedattn.benchmarking.roofs import Roofs, measure_roofs
from pagedattn.benchmarking.turns import Contender, time_by_turns

__all__ = [
    "DEVICE_CLOCK",
    "Contender",
    "DeviceClock",
    "LaunchGraph",
    "Roofs",
    "describe_machine",
    "machine_identity",
    "measure_roofs",
    "rotation_size",
    "time_by_turns",
]
