"""CUDA C++ kernels for Hopper, compiled at first use, with Triton's for what they cannot take."""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING

import torch

from pagedattn.attention.cuda.decode import launch_decode, not_taken
from pagedattn.attention.triton import TritonImplementation

if TYPE_CHECKING:
    from pagedattn.attention.call import AttentionCall

HOPPER = 9


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """Say in a phrase why the kernels cannot run on a device, or None if they can."""
    if device.type != "cuda":
        return f"its kernels need a GPU, not {device}"
    if torch.cuda.get_device_capability(device)[0] != HOPPER:
        return "its kernels need a GPU of the Hopper generation"
    if (
        importlib.util.find_spec("cuda") is None
        or importlib.util.find_spec("cuda.bindings") is None
    ):
        return "its kernels need the package cuda-bindings"
    return None


class CudaImplementation(TritonImplementation):
    """The project's kernels for Hopper. Safe in a CUDA graph: the host reads no tensor.

    Calls that the CUDA kernels cannot take, see `pagedattn.attention.cuda.decode`, and writes of
    K and V are Triton's.
    """

    name = "cuda"

    def unsupported(self, call: AttentionCall) -> str | None:
        """Say in a phrase why this call cannot be taken, or None if it can."""
        return unavailable(call.query.device) or super().unsupported(call)

    def attention(self, call: AttentionCall) -> None:
        """Write causal attention into the call's `out`, and `lse` if given."""
        if not_taken(call) is None:
            launch_decode(call)
        else:
            super().attention(call)
