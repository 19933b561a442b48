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
    from pagedattn.kv_cache import LayerCache

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


class CudaImplementation:
    """The project's kernels for Hopper. Safe in a CUDA graph: the host reads no tensor.

    Calls that the CUDA kernels cannot take go to Triton's, see `pagedattn.attention.cuda.decode`.
    """

    name = "cuda"

    def __init__(self) -> None:
        self._triton = TritonImplementation()

    def unsupported(self, call: AttentionCall) -> str | None:
        """Say in a phrase why this call cannot be taken, or None if it can."""
        return unavailable(call.query.device) or self._triton.unsupported(call)

    def attention(self, call: AttentionCall) -> None:
        """Write causal attention into the call's `out`, and `lse` if given."""
        if not_taken(call) is None:
            launch_decode(call)
        else:
            self._triton.attention(call)

    def write_kv(
        self, key: torch.Tensor, value: torch.Tensor, cache: LayerCache, slots: torch.Tensor
    ) -> None:
        """Write K and V of tokens into their slots; slots outside the cache are skipped."""
        self._triton.write_kv(key, value, cache, slots)
