"""The oracle: attention as the formula says it, a sequence at a time, in high precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pagedattn.attention.registry import UnsupportedError
from pagedattn.kv_cache import dequantised, write_slots

if TYPE_CHECKING:
    from pagedattn.attention.call import AttentionCall
    from pagedattn.kv_cache import LayerCache

QUERY_CHUNK = 1024
FP8_LARGEST_WEIGHT = 256.0  # of a row, to round to e4m3, whose smallest number is 2^-9


def reference_attention(
    call: AttentionCall,
    dtype: torch.dtype = torch.float32,
    weights_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Paged attention, computed a sequence at a time in `dtype`; touches no tensor of the call.

    Args:
        call: inputs and options; `out` and `lse` are not written.
        dtype: precision of the computation; stored keys and values are dequantised in it.
        weights_dtype: precision that the softmax weights are rounded to, the largest of a row
            being 1, or 256 in a type of one byte; None leaves them.

    Returns:
        The result, [num_query_tokens, num_query_heads, head_size], and the log-sum-exp,
        [num_query_tokens, num_query_heads], both in `dtype`.

    """
    cache, batch = call.cache, call.batch
    out = torch.zeros(call.query.shape, dtype=dtype, device=call.query.device)
    lse = torch.full(out.shape[:2], float("-inf"), dtype=dtype, device=out.device)
    if call.sinks is not None:
        lse[:] = call.sinks
    starts = batch.query_starts.tolist()
    for sequence, num_tokens in enumerate(batch.kv_lengths.tolist()):
        begin, end = starts[sequence], starts[sequence + 1]
        if begin == end or num_tokens == 0:
            continue
        # blocks that have left the window of the first query may be gone
        first = num_tokens - (end - begin)
        first_seen = 0 if call.window is None else max(0, first - call.window + 1)
        first_block = first_seen // cache.block_size
        num_blocks = -(-num_tokens // cache.block_size)
        blocks = batch.block_tables[sequence, first_block:num_blocks].long()
        in_blocks = slice(
            first_seen - first_block * cache.block_size, num_tokens - first_block * cache.block_size
        )
        key, value = (
            dequantised(part[blocks].transpose(1, 2).flatten(0, 1)[in_blocks], scale, dtype)
            for part, scale in ((cache.key, cache.key_scale), (cache.value, cache.value_scale))
        )
        for row in range(begin, end, QUERY_CHUNK):
            rows = slice(row, min(row + QUERY_CHUNK, end))
            positions = torch.arange(rows.start, rows.stop, device=out.device) - begin + first
            if not call.causal:  # as if each were the last token
                positions[:] = num_tokens - 1
            out[rows], lse[rows] = _attend(
                call, call.query[rows].to(dtype), positions, key, value, first_seen, weights_dtype
            )
    return out, lse


def _attend(
    call: AttentionCall,
    query: torch.Tensor,
    positions: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    first_key: int,
    weights_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of some queries of one sequence; see `AttentionCall` for the formula.

    Args:
        call: the options.
        query: [num_queries, num_query_heads, head_size].
        positions: int64 [num_queries], each query's token.
        key: [num_keys, num_kv_heads, head_size], the tokens from `first_key` on.
        value: the same shape.
        first_key: position of the first key.
        weights_dtype: see `reference_attention`.

    Returns:
        [num_queries, num_query_heads, head_size] and [num_queries, num_query_heads].

    """
    group = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(group, dim=1)
    value = value.repeat_interleave(group, dim=1)
    # distance[i, j]: position of key j less that of query i; 0 is the query's own token
    distance = first_key + torch.arange(key.shape[0], device=key.device) - positions[:, None]
    scores = torch.einsum("qhd,khd->hqk", query, key) * call.scale
    if call.soft_cap is not None:
        scores = call.soft_cap * torch.tanh(scores / call.soft_cap)
    if call.alibi_slopes is not None:
        scores = scores + call.alibi_slopes.to(scores.dtype)[:, None, None] * distance
    hidden = distance > 0
    if call.window is not None:
        hidden |= distance <= -call.window
    scores = scores.masked_fill(hidden, float("-inf"))
    sinks = torch.full((len(scores), 1), float("-inf"), dtype=scores.dtype, device=scores.device)
    if call.sinks is not None:
        sinks[:, 0] = call.sinks
    peak = torch.maximum(scores.amax(dim=-1), sinks)  # [num_query_heads, num_queries]
    peak = peak.masked_fill(peak == float("-inf"), 0)  # where nothing is seen
    weights = torch.exp(scores - peak[..., None])
    total = weights.sum(dim=-1) + torch.exp(sinks - peak)
    if weights_dtype is not None:
        # before they are divided by the sum: of many keys no weight may be left in few bits
        largest = FP8_LARGEST_WEIGHT if weights_dtype.itemsize == 1 else 1.0
        weights = (weights * largest).to(weights_dtype).to(value.dtype) / largest
    out = torch.einsum("hqk,khd->qhd", weights, value)
    return out / total.masked_fill(total == 0, 1).T[..., None], (peak + total.log()).T


class ReferenceImplementation:
    """The oracle behind the common protocol: right, and slow."""

    name = "reference"

    def unsupported(self, call: AttentionCall) -> str | None:
        """Everything is supported."""
        return None

    def attention(self, call: AttentionCall) -> None:
        """Write the result and the log-sum-exp, computed in float32.

        Raises:
            UnsupportedError: a CUDA graph is being captured.

        """
        if call.query.is_cuda and torch.cuda.is_current_stream_capturing():
            raise UnsupportedError("it reads lengths on the host, which a graph cannot follow")
        out, lse = reference_attention(call)
        call.out.copy_(out)
        if call.lse is not None:
            call.lse.copy_(lse)

    def write_kv(
        self, key: torch.Tensor, value: torch.Tensor, cache: LayerCache, slots: torch.Tensor
    ) -> None:
        """Write K and V of tokens into their slots; slots outside the cache are skipped."""
        write_slots(cache, key, value, slots)
