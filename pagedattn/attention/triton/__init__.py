"""Triton kernels: KV write, decode with split KV, prefill and mixed batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pagedattn.attention.triton.decode import launch_decode, rows_of_one_tile
from pagedattn.attention.triton.kv_write import launch_kv_write
from pagedattn.attention.triton.prefill import launch_prefill

if TYPE_CHECKING:
    import torch

    from pagedattn.attention.batch import AttentionBatch
    from pagedattn.kv_cache import LayerCache

MAX_HEAD_SIZE = 256


class TritonImplementation:
    """The project's own GPU kernels. Safe in a CUDA graph: the host reads no tensor."""

    name = "triton"

    def unsupported(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        batch: AttentionBatch,
    ) -> str | None:
        """Say what the kernels cannot take, or None."""
        if cache.head_size > MAX_HEAD_SIZE:
            return f"head_size {cache.head_size} is above {MAX_HEAD_SIZE}"
        if not query.dtype.is_floating_point or query.dtype.itemsize < 2:
            return f"dtype {query.dtype} is none of float16, bfloat16, float32"
        return None

    def attention(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        batch: AttentionBatch,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """Write causal attention into `out`.

        Short queries (decode, verification) go to the kernel that splits the KV over the whole
        GPU, long ones to the kernel that walks query tiles.
        """
        if rows_of_one_tile(query, cache, batch) is not None:
            launch_decode(query, cache, batch, scale, out)
        else:
            launch_prefill(query, cache, batch, scale, out)

    def write_kv(
        self, key: torch.Tensor, value: torch.Tensor, cache: LayerCache, slots: torch.Tensor
    ) -> None:
        """Write K and V of tokens into their slots; slots outside the cache are skipped."""
        launch_kv_write(key, value, cache, slots)
