"""Marks of a launch that never was."""

import numpy as np

from pagedattn.benchmarking.launch_trace import MOMENTS, LaunchTrace

NAMES = list(MOMENTS)
MERGES = [NAMES.index("last_to_come"), NAMES.index("merged")]
START = 1_700_000_000_000_000_000  # ns, as large as a GPU's clock


def marks_of(num_programs=12, warps=5, idle=(), seed=0):
    """Marks in order: warps come to each moment within 32 ns; `idle` programs start and end."""
    rng = np.random.default_rng(seed)
    steps = 32 * rng.integers(2, 100, (num_programs, 1, len(NAMES)))
    marks = np.zeros((num_programs, 16, 16), dtype=np.int64)
    jitter = 32 * rng.integers(0, 2, (num_programs, warps, len(NAMES)))
    marks[:, :warps, : len(NAMES)] = START + steps.cumsum(axis=-1) + jitter
    marks[::3, :, MERGES] = -1  # who was not the last to come
    marks[list(idle), :, 1 : len(NAMES) - 1] = -1
    return marks


def trace_of(**changes):
    return LaunchTrace.of_marks(marks_of(**changes))
