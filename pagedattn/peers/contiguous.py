"""PyTorch's own operations: attention on contiguous memory, and writing by index."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from pagedattn.attention.batch import AttentionBatch
    from pagedattn.kv_cache import LayerCache


class SdpaContiguous:
    """`scaled_dot_product_attention` on K and V gathered beforehand: the control without paging.

    Gathering is preparation and is not part of the launch.
    """

    name = "sdpa_contiguous"

    def unsupported(self, batch: AttentionBatch) -> str | None:
        """Say why a batch cannot be a dense tensor, or None if it can."""
        lengths = batch.query_starts.diff()
        if (batch.kv_lengths != batch.max_kv_length).any() or (
            lengths != batch.max_query_length
        ).any():
            return "the sequences differ in length, and a dense tensor has one"
        return None

    def prepare(
        self, query: torch.Tensor, cache: LayerCache, batch: AttentionBatch
    ) -> Callable[[], torch.Tensor]:
        """Gather K and V; return a launch that attends.

        Args:
            query: [num_query_tokens, num_query_heads, head_size].
            cache: one layer's views.
            batch: sequences of one length.

        Returns:
            A launch that returns
            [num_sequences, num_query_heads, max_query_length, head_size].

        """
        num_blocks = -(-batch.max_kv_length // cache.block_size)
        blocks = batch.block_tables[:, :num_blocks].long()
        key, value = (
            part[blocks].transpose(1, 2).flatten(2, 3)[:, :, : batch.max_kv_length].contiguous()
            for part in (cache.key, cache.value)
        )
        per_sequence = (batch.num_sequences, batch.max_query_length, *query.shape[1:])
        rows = query.view(per_sequence).transpose(1, 2).contiguous()
        square = batch.max_query_length == batch.max_kv_length > 1
        bias = None
        if not square and batch.max_query_length > 1:
            bias = causal_lower_right(batch.max_query_length, batch.max_kv_length)

        def launch() -> torch.Tensor:
            return scaled_dot_product_attention(
                rows, key, value, attn_mask=bias, is_causal=square, enable_gqa=True
            )

        return launch


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
