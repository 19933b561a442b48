"""CUDA C++ kernels for Hopper, compiled at first use, with Triton's for what they cannot take."""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING

import torch

from pagedattn.attention.cuda import decode, decode_calls, mixed, prefill
from pagedattn.attention.cuda.launching import signature_of
from pagedattn.attention.triton import TritonImplementation
from pagedattn.attention.triton.decode import rows_of_one_tile
from pagedattn.kv_cache import FP8

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from pagedattn.attention.call import AttentionCall
    from pagedattn.attention.cuda.decode import DecodeLaunch
    from pagedattn.attention.cuda.mixed import MixedLaunch
    from pagedattn.attention.cuda.prefill import PrefillLaunch

HOPPER = 9
MOST_LAUNCHES = 1024
"""Kinds of calls that are kept ready."""


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


def launcher_of(
    call: AttentionCall,
) -> type[DecodeLaunch] | type[PrefillLaunch] | type[MixedLaunch] | None:
    """Return the kernel that takes a call, or the faster one, or both; None if neither does."""
    by_decode = decode_calls.not_taken(call) is None
    if by_decode and not decode_calls.is_crowded(call):
        return decode.DecodeLaunch
    if prefill.not_taken(call) is None:
        return mixed.MixedLaunch if mixed.pays(call) else prefill.PrefillLaunch
    return decode.DecodeLaunch if by_decode else None


class CudaImplementation(TritonImplementation):
    """The project's kernels for Hopper. Safe in a CUDA graph: the host reads no tensor.

    Short queries (decode, verification) go to the kernel that splits the KV over the whole GPU,
    long ones to the one that walks query tiles, for which the longest keys are shared out; a batch
    of both goes to the second, or each to its own where that takes less time. What neither can
    take, float32 and odd block sizes among it, and writes of K and V are Triton's.
    """

    name = "cuda"

    def __init__(self) -> None:
        self._launches: dict[Hashable, Callable[[AttentionCall], None]] = {}

    def unsupported(self, call: AttentionCall) -> str | None:
        """Say in a phrase why this call cannot be taken, or None if it can."""
        return unavailable(call.query.device) or super().unsupported(call)

    def attention(self, call: AttentionCall) -> None:
        """Write attention into the call's `out`, and `lse` if given."""
        signature = signature_of(call)
        launch = self._launches.get(signature)
        if launch is None:
            if len(self._launches) >= MOST_LAUNCHES:
                self._launches.clear()
            launch = self._launches[signature] = self._choose(call)
        launch(call)

    def _choose(self, call: AttentionCall) -> Callable[[AttentionCall], None]:
        launcher = launcher_of(call)
        return super().attention if launcher is None else launcher(call)


class CudaFp8Implementation(CudaImplementation):
    """Prompts and chunks over an fp8 cache, multiplied in fp8, for who asks for it.

    Queries, each row times a power of two, and softmax weights, times 256, are rounded to e4m3,
    which has 3 binary places: results err some twenty times as much as those of `cuda`, whose
    products over such a cache are of float16. Other calls are refused; ask `cuda` for them.
    """

    name = "cuda_fp8"

    def unsupported(self, call: AttentionCall) -> str | None:
        """Say in a phrase why this call cannot be taken, or None if it can."""
        if call.cache.dtype != FP8:
            return f"a cache of {call.cache.dtype}, which is not multiplied in fp8"
        if decode_calls.not_taken(call) is None or rows_of_one_tile(call) is not None:
            return "short queries, which wait for memory and not for products"
        return super().unsupported(call) or prefill.not_taken(call)

    def rounds_to(self, call: AttentionCall) -> torch.dtype:
        """The type in which it multiplies."""
        del call
        return FP8

    def _choose(self, call: AttentionCall) -> Callable[[AttentionCall], None]:
        return prefill.PrefillLaunch(call, fp8_products=True)
