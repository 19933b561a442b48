"""The CUDA kernels on the host, instruction by instruction: right or wrong without a GPU.

A kernel's source is compiled by the host's C++ compiler with other instructions than Hopper's:
lanes take turns at random, copies and matrix products are done at some time or other, and shared
memory holds NaN until something is there. A kernel that forgets to wait, or waits for what never
comes, shows by a result that is wrong for some seed, or by a sentence that says who waits for what.
It knows nothing of time, and sees all writes to memory at once and in order.
"""

from pagedattn.testing.emulator.implementation import EmulatedImplementation, emulation
from pagedattn.testing.emulator.kernel import (
    EmulatedKernel,
    EmulationError,
    tensor_map,
    unavailable,
)

__all__ = [
    "EmulatedImplementation",
    "EmulatedKernel",
    "EmulationError",
    "emulation",
    "tensor_map",
    "unavailable",
]
