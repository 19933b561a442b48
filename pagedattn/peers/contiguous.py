"""PyTorch's own operations: attention on contiguous memory, and writing by index."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from pagedattn.attention import Launch
from pagedattn.peers.adapter import HALVES, Adapter

if TYPE_CHECKING:
    from collections.abc import Callable

    from pagedattn.attention import AttentionCall
    from pagedattn.kv_cache import LayerCache


class SdpaContiguous(Adapter):
    """`scaled_dot_product_attention` on K and V gathered beforehand: the control without paging.

    Gathering is preparation, and the result is brought into the order of `out` afterwards; neither
    is part of the launch. PyTorch chooses the back end.
    """

    name = "sdpa_contiguous"
    dtypes: tuple[torch.dtype, ...] = (*HALVES, torch.float32)
    backend: SDPBackend | None = None

    def missing(self, device: torch.device) -> str | None:
        """Nothing: PyTorch is there."""
        return None

    def refuse(self, call: AttentionCall) -> str | None:
        """Say why a batch cannot be a dense tensor, or None if it can."""
        batch = call.batch
        lengths = batch.query_starts.diff()
        if (batch.kv_lengths != batch.max_kv_length).any() or (
            lengths != batch.max_query_length
        ).any():
            return "the sequences differ in length, and a dense tensor has one"
        return None

    def bind(self, call: AttentionCall) -> Launch:
        """Gather K and V."""
        cache, batch = call.cache, call.batch
        num_blocks = -(-batch.max_kv_length // cache.block_size)
        blocks = batch.block_tables[:, :num_blocks].long()
        key, value = (
            part[blocks].transpose(1, 2).flatten(2, 3)[:, :, : batch.max_kv_length].contiguous()
            for part in (cache.key, cache.value)
        )
        per_sequence = (batch.num_sequences, batch.max_query_length, *call.query.shape[1:])
        rows = call.query.view(per_sequence).transpose(1, 2).contiguous()
        square = batch.max_query_length == batch.max_kv_length > 1
        bias = None
        if not square and batch.max_query_length > 1:
            # imports PyTorch's compiler, which takes as long as PyTorch
            from torch.nn.attention.bias import causal_lower_right

            bias = causal_lower_right(batch.max_query_length, batch.max_kv_length)
        results: list[torch.Tensor] = []

        def run() -> None:
            with nullcontext() if self.backend is None else sdpa_kernel(self.backend):
                results[:] = [
                    scaled_dot_product_attention(
                        rows,
                        key,
                        value,
                        attn_mask=bias,
                        is_causal=square,
                        scale=call.scale,
                        enable_gqa=True,
                    )
                ]

        def finish() -> None:  # [num_sequences, num_query_heads, max_query_length, head_size]
            call.out.view(per_sequence).copy_(results[0].transpose(1, 2))

        return Launch(run, call.out, finish=finish)


class CudnnContiguous(SdpaContiguous):
    """The same by cuDNN, whatever PyTorch would choose."""

    name = "cudnn_contiguous"
    dtypes = HALVES
    backend = SDPBackend.CUDNN_ATTENTION

    def missing(self, device: torch.device) -> str | None:
        """Say what the machine lacks, or None."""
        return None if device.type == "cuda" else "cuDNN needs a CUDA GPU"


class IndexPut:
    """`tensor[index] = value`: the plain way to write K and V by slot."""

    name = "index_put"

    def prepare(
        self, key: torch.Tensor, value: torch.Tensor, cache: LayerCache, slots: torch.Tensor
    ) -> Callable[[], None]:
        """Work out blocks and offsets; return a launch that writes both tensors.

        Args:
            key: [num_tokens, num_kv_heads, head_size].
            value: the same shape.
            cache: one layer's views, written by the launch.
            slots: int64 [num_tokens], all inside the cache.

        """
        blocks, offsets = slots // cache.block_size, slots % cache.block_size

        def launch() -> None:
            cache.key[blocks, :, offsets] = key
            cache.value[blocks, :, offsets] = value

        return launch
