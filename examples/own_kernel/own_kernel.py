"""Paged attention a block at a time, in PyTorch: an implementation to begin one's own from.

All sequences go through their blocks in step: a block's keys and values are read where they lie,
and a running maximum, sum and result are kept for each query (Milakov and Gimelshein 2018, online
softmax), as a fused kernel does. Memory beyond the result is one block of each query's sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pagedattn.attention import UnsupportedError
from pagedattn.kv_cache import write_slots

if TYPE_CHECKING:
    from pagedattn.attention import AttentionCall
    from pagedattn.kv_cache import LayerCache


class BlockByBlock:
    """Any batch, any block size, any floating dtype; with a window, a soft cap and the LSE."""

    name = "block_by_block"
    features = frozenset({"window", "soft_cap", "lse"})

    def unsupported(self, call: AttentionCall) -> str | None:
        """Say in a phrase what it cannot take, or None."""
        return call.beyond(self.features)

    def attention(self, call: AttentionCall) -> None:
        """Write every row of `call.out`, and of `call.lse` if it is given.

        Raises:
            UnsupportedError: a CUDA graph is being captured.

        """
        _refuse_capture(call.query, "it asks on the host which blocks are seen")
        cache, batch = call.cache, call.batch
        heads = call.query.shape[1]
        # each query token's sequence, and its place in it
        tokens = torch.arange(batch.num_query_tokens, device=call.query.device)
        sequences = torch.searchsorted(batch.query_starts[1:].long(), tokens, right=True)
        lengths = batch.kv_lengths[sequences].long()
        places = lengths - (batch.query_starts[1:][sequences] - tokens)
        # [num_query_tokens, num_kv_heads, group, head_size]
        query = call.query.float().view(len(tokens), cache.num_kv_heads, -1, cache.head_size)
        peak = torch.full(query.shape[:3], float("-inf"), device=query.device)
        total = torch.zeros_like(peak)
        result = torch.zeros_like(query)
        for column in range(-(-batch.max_kv_length // cache.block_size)):
            positions = column * cache.block_size + torch.arange(
                cache.block_size, device=query.device
            )
            seen = (positions <= places[:, None]) & (lengths > 0)[:, None]
            if call.window is not None:
                seen &= positions > places[:, None] - call.window
            rows = seen.any(1)  # a block that a query does not see may not even be in the table
            if not rows.any():
                continue
            mask = seen[rows]
            blocks = batch.block_tables[sequences[rows], column].long()
            key, value = (
                part[blocks].float().masked_fill(~mask[:, None, :, None], 0)
                for part in (cache.key, cache.value)  # [rows, num_kv_heads, block_size, head_size]
            )
            scores = torch.einsum("thgd,thkd->thgk", query[rows], key) * call.scale
            if call.soft_cap is not None:
                scores = call.soft_cap * torch.tanh(scores / call.soft_cap)
            scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
            higher = torch.maximum(peak[rows], scores.amax(-1))
            weights = torch.exp(scores - higher[..., None])
            shrink = torch.exp(peak[rows] - higher)
            total[rows] = total[rows] * shrink + weights.sum(-1)
            result[rows] = result[rows] * shrink[..., None] + torch.einsum(
                "thgk,thkd->thgd", weights, value
            )
            peak[rows] = higher
        empty = total == 0
        result = result / total.masked_fill(empty, 1)[..., None]
        call.out.copy_(result.view(call.out.shape))
        if call.lse is not None:
            call.lse.copy_((peak + total.log()).view(len(tokens), heads))

    def write_kv(
        self, key: torch.Tensor, value: torch.Tensor, cache: LayerCache, slots: torch.Tensor
    ) -> None:
        """Write K and V of tokens into their slots; slots outside the cache are skipped.

        Raises:
            UnsupportedError: a CUDA graph is being captured.

        """
        _refuse_capture(slots, "it asks on the host which slots are in the cache")
        write_slots(cache, key, value, slots)


def _refuse_capture(tensor: torch.Tensor, reason: str) -> None:
    """Raise `UnsupportedError` if a CUDA graph is being captured, which cannot follow the host."""
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(reason)
