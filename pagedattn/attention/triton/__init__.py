"""Triton kernels: KV write, alone or with rotary embedding; decode; prefill; parts of both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pagedattn.attention.triton.decode import launch_decode, rows_of_one_tile
from pagedattn.attention.triton.kv_write import launch_kv_write
from pagedattn.attention.triton.parts import gather_rows, merge_parts
from pagedattn.attention.triton.prefill import launch_prefill
from pagedattn.attention.triton.rotary_write import launch_rotary_write
from pagedattn.kv_cache import FP8

if TYPE_CHECKING:
    from pagedattn.attention.call import AttentionCall
    from pagedattn.attention.rotary import Rotary
    from pagedattn.kv_cache import LayerCache

MAX_HEAD_SIZE = 256
FP8_CAPABILITY = (8, 9)


class TritonImplementation:
    """The project's own GPU kernels. Safe in a CUDA graph: the host reads no tensor."""

    name = "triton"

    def unsupported(self, call: AttentionCall) -> str | None:
        """Say what the kernels cannot take, or None."""
        if call.cache.head_size > MAX_HEAD_SIZE:
            return f"head_size {call.cache.head_size} is above {MAX_HEAD_SIZE}"
        device = call.query.device
        if call.cache.dtype == FP8 and device.type == "cuda":
            capability = torch.cuda.get_device_capability(device)
            if capability < FP8_CAPABILITY:
                return "GPUs have fp8 from compute capability 8.9 on, this one has {}.{}".format(
                    *capability
                )
        return None

    def attention(self, call: AttentionCall) -> None:
        """Write causal attention into the call's `out`.

        Short queries (decode, verification) go to the kernel that splits the KV over the whole
        GPU, long ones to the kernel that walks query tiles.
        """
        if rows_of_one_tile(call) is not None:
            launch_decode(call)
        else:
            launch_prefill(call)

    def write_kv(
        self, key: torch.Tensor, value: torch.Tensor, cache: LayerCache, slots: torch.Tensor
    ) -> None:
        """Write K and V of tokens into their slots; slots outside the cache are skipped."""
        launch_kv_write(key, value, cache, slots)

    def gather_rows(self, query: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Collect the queries of parts; see `pagedattn.attention.cascade`."""
        return gather_rows(query, rows)

    def merge_parts(
        self,
        call: AttentionCall,
        own: tuple[torch.Tensor, torch.Tensor],
        parts: tuple[torch.Tensor, torch.Tensor],
        parts_of_token: torch.Tensor,
    ) -> None:
        """Merge the results of parts; see `pagedattn.attention.cascade`."""
        merge_parts(call, own, parts, parts_of_token)

    def rotary_write_kv(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: LayerCache,
        slots: torch.Tensor,
        positions: torch.Tensor,
        rotary: Rotary,
        out: torch.Tensor,
    ) -> None:
        """Turn Q and K by their positions, and write K and V, in one launch."""
        launch_rotary_write(query, key, value, cache, slots, positions, rotary, out)
