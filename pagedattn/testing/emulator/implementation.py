"""The CUDA kernels as an implementation for the host's tensors."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING
from unittest import mock

import torch

from pagedattn.attention.cuda import (
    CudaImplementation,
    decode,
    decode_calls,
    decode_map,
    prefill,
    prefill_map,
    prefill_merge,
    ways,
)
from pagedattn.attention.triton import TritonImplementation
from pagedattn.testing.emulator.kernel import EmulatedKernel, tensor_map, unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pagedattn.attention.call import AttentionCall


@contextlib.contextmanager
def emulation(num_multiprocessors: int = 6, seed: int = 0) -> Iterator[None]:
    """Have launches of the CUDA kernels that are made within run on the host.

    What `torch.empty` gives within is NaN, so that a workspace shows who reads it too early.

    Args:
        num_multiprocessors: of the emulated GPU.
        seed: decides who runs when.

    """

    def load(
        source: str, name: str, macros: tuple[tuple[str, int | str], ...], device: int
    ) -> EmulatedKernel:
        del device
        return EmulatedKernel(source, name, macros, seed)

    def count(device: torch.device) -> int:
        del device
        return num_multiprocessors

    with contextlib.ExitStack() as replaced:
        for module in (decode, prefill, prefill_merge):
            replaced.enter_context(mock.patch.object(module, "load_kernel", load))
        for module in (decode, prefill, ways):
            replaced.enter_context(mock.patch.object(module, "num_multiprocessors", count))
        for module in (decode_map, prefill_map):
            replaced.enter_context(mock.patch.object(module, "tensor_map", tensor_map))
        was_deterministic = torch.are_deterministic_algorithms_enabled()
        replaced.callback(torch.use_deterministic_algorithms, was_deterministic)
        torch.use_deterministic_algorithms(True)  # which fills what is not initialised
        yield


class EmulatedImplementation(CudaImplementation):
    """The kernels for Hopper, on the host; K and V are written by Triton's.

    Args:
        num_multiprocessors: of the emulated GPU.
        seed: decides who runs when.

    """

    name = "cuda-emulated"

    def __init__(self, num_multiprocessors: int = 6, seed: int = 0) -> None:
        super().__init__()
        self._num_multiprocessors, self._seed = num_multiprocessors, seed

    def unsupported(self, call: AttentionCall) -> str | None:
        """Say in a phrase why this call cannot be taken, or None if it can."""
        if call.query.device.type != "cpu":
            return "it emulates its kernels on a CPU"
        why_not = unavailable()
        if why_not is not None:
            return why_not
        by_decode, by_prefill = decode_calls.not_taken(call), prefill.not_taken(call)
        if by_decode is not None and by_prefill is not None:
            told = dict.fromkeys((by_decode, by_prefill))
            return f"neither kernel takes {'; '.join(told)}"
        return TritonImplementation.unsupported(self, call)

    def attention(self, call: AttentionCall) -> None:
        """Write attention into the call's `out`, and `lse` if given."""
        with emulation(self._num_multiprocessors, self._seed):
            super().attention(call)
