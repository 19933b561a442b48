"""The oracle: attention as the formula says it, a sequence at a time, in high precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pagedattn.kv_cache import write_slots

if TYPE_CHECKING:
    from pagedattn.attention.batch import AttentionBatch
    from pagedattn.kv_cache import LayerCache

QUERY_CHUNK = 1024


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    weights_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Causal attention of one sequence over contiguous keys, in the inputs' precision.

    Args:
        query: [num_queries, num_query_heads, head_size], the sequence's last tokens.
        key: [num_tokens, num_kv_heads, head_size], num_tokens >= num_queries.
        value: the same shape.
        scale: factor of the scores.
        weights_dtype: precision that the softmax weights are rounded to; None leaves them.

    Returns:
        [num_queries, num_query_heads, head_size].

    """
    group = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(group, dim=1)
    value = value.repeat_interleave(group, dim=1)
    positions = torch.arange(key.shape[0], device=key.device)
    out = torch.empty_like(query)
    for begin in range(0, query.shape[0], QUERY_CHUNK):
        rows = query[begin : begin + QUERY_CHUNK]
        own = positions[key.shape[0] - query.shape[0] + begin :][: rows.shape[0]]
        scores = torch.einsum("qhd,khd->hqk", rows, key) * scale
        scores = scores.masked_fill(positions > own[:, None], float("-inf"))
        weights = torch.softmax(scores, dim=-1)
        if weights_dtype is not None:
            weights = weights.to(weights_dtype).to(value.dtype)
        out[begin : begin + QUERY_CHUNK] = torch.einsum("hqk,khd->qhd", weights, value)
    return out


def reference_attention(
    query: torch.Tensor,
    cache: LayerCache,
    batch: AttentionBatch,
    scale: float | None = None,
    dtype: torch.dtype = torch.float32,
    weights_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Paged attention, computed a sequence at a time in `dtype`; touches no input.

    Args:
        query: [num_query_tokens, num_query_heads, head_size].
        cache: one layer's views.
        batch: lengths, block tables and query rows.
        scale: factor of the scores; None is `1 / sqrt(head_size)`.
        dtype: precision of the computation.
        weights_dtype: precision that the softmax weights are rounded to; None leaves them.

    Returns:
        [num_query_tokens, num_query_heads, head_size] in `dtype`.

    """
    scale = cache.head_size**-0.5 if scale is None else scale
    out = torch.zeros(query.shape, dtype=dtype, device=query.device)
    starts = batch.query_starts.tolist()
    for sequence, num_tokens in enumerate(batch.kv_lengths.tolist()):
        begin, end = starts[sequence], starts[sequence + 1]
        if begin == end or num_tokens == 0:
            continue
        num_blocks = -(-num_tokens // cache.block_size)
        blocks = batch.block_tables[sequence, :num_blocks].long()
        key, value = (
            part[blocks].transpose(1, 2).flatten(0, 1)[:num_tokens].to(dtype)
            for part in (cache.key, cache.value)
        )
        out[begin:end] = dense_attention(
            query[begin:end].to(dtype), key, value, scale, weights_dtype
        )
    return out


class ReferenceImplementation:
    """The oracle behind the common protocol: right, and slow."""

    name = "reference"

    def unsupported(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        batch: AttentionBatch,
    ) -> str | None:
        """Everything is supported."""
        return None

    def attention(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        batch: AttentionBatch,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """Write causal attention into `out`."""
        out.copy_(reference_attention(query, cache, batch, scale))

    def write_kv(
        self, key: torch.Tensor, value: torch.Tensor, cache: LayerCache, slots: torch.Tensor
    ) -> None:
        """Write K and V of tokens into their slots; slots outside the cache are skipped."""
        write_slots(cache, key, value, slots)
