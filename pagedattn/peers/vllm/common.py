"""What the adapters to vLLM's kernels share: how vLLM is imported, and its KV write."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING

import torch

from pagedattn.attention import UnsupportedError
from pagedattn.peers.adapter import FP8, Adapter

if TYPE_CHECKING:
    from types import ModuleType

    from pagedattn.kv_cache import LayerCache


def imported(module: str) -> ModuleType:
    """Import a module of vLLM's, and leave to PyTorch what vLLM takes from it.

    `vllm.platforms.cuda` switches PyTorch's cuDNN attention off for the whole process, which would
    make every control slower that is timed after it.
    """
    if "vllm.platforms.cuda" not in sys.modules:
        allowed = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
        importlib.import_module("vllm.platforms.cuda")
        torch.backends.cuda.enable_cudnn_sdp(allowed)
    return importlib.import_module(module)


class VllmKernel(Adapter):
    """What the three have in common: they write K and V with vLLM's CUDA kernel."""

    def missing(self, device: torch.device) -> str | None:
        """Say what the machine lacks, or None."""
        if importlib.util.find_spec("vllm") is None:
            return "vLLM is not installed"
        if device.type != "cuda":
            return "vLLM's kernels need a CUDA GPU"
        return None

    def write_kv(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: LayerCache,  # type: ignore[override]
        slots: torch.Tensor,
    ) -> None:
        """Write K and V of tokens into their slots with `reshape_and_cache_flash`.

        Slots below 0 are skipped; those past the cache are not checked.

        Raises:
            UnsupportedError: vLLM or a GPU is missing, or K and V must be cast.

        """
        if missing := self.missing(key.device):
            raise UnsupportedError(missing)
        if cache.dtype not in (key.dtype, FP8):
            raise UnsupportedError(f"its KV write does not cast {key.dtype} to {cache.dtype}")
        if not len(slots):
            return  # vLLM would launch a grid of no blocks, which CUDA refuses
        ops = imported("vllm._custom_ops")
        key_cache, value_cache = by_token(cache)
        dtype = "auto"
        if cache.dtype == FP8:
            key_cache, value_cache = key_cache.view(torch.uint8), value_cache.view(torch.uint8)
            dtype = "fp8_e4m3"
        key_scale, value_scale = scales_of(cache)
        ops.reshape_and_cache_flash(
            key, value, key_cache, value_cache, slots, dtype, key_scale, value_scale
        )


def by_token(cache: LayerCache) -> tuple[torch.Tensor, torch.Tensor]:
    """Views [num_blocks, block_size, num_kv_heads, head_size] of K and V, as vLLM wants them."""
    return cache.key.transpose(1, 2), cache.value.transpose(1, 2)


def scales_of(cache: LayerCache) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales of K and V, float32 [num_kv_heads]; a single 1 for a cache that has none."""
    one = torch.ones(1, device=cache.key.device)
    return (
        one if cache.key_scale is None else cache.key_scale,
        one if cache.value_scale is None else cache.value_scale,
    )
