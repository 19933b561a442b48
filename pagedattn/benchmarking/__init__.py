"""Timing on the GPU, the machine's roofs, and what machine it was."""

from pagedattn.benchmarking.environment import describe_machine, machine_identity
from pagedattn.benchmarking.gpu_timing import DEVICE_CLOCK, DeviceClock, LaunchGraph, rotation_size
from pagedattn.benchmarking.roofs import Roofs, measure_roofs

__all__ = [
    "DEVICE_CLOCK",
    "DeviceClock",
    "LaunchGraph",
    "Roofs",
    "describe_machine",
    "machine_identity",
    "measure_roofs",
    "rotation_size",
]
