"""Paged attention in plain PyTorch, vectorised: the default without a GPU.

Gathers each sequence's blocks into a padded tensor and calls PyTorch's fused attention. The
gather moves the K and V twice more than a paged kernel does, which is why this is the baseline
and not the record.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

from pagedattn.kv_cache import write_slots

if TYPE_CHECKING:
    from pagedattn.attention.batch import AttentionBatch
    from pagedattn.attention.call import AttentionCall
    from pagedattn.kv_cache import LayerCache


class TorchImplementation:
    """Gather by page table, then `scaled_dot_product_attention` over the padded batch."""

    name = "torch"

    def unsupported(self, call: AttentionCall) -> str | None:
        """Say what it cannot take, or None."""
        return call.beyond(())

    def attention(self, call: AttentionCall) -> None:
        """Write causal attention into `out`.

        Memory: K and V of [num_sequences, max_kv_length] tokens, once more than the cache, and
        a mask of [num_sequences, max_query_length, max_kv_length] bytes.
        """
        query, cache, batch, out = call.query, call.cache, call.batch, call.out
        if batch.max_kv_length == 0:
            out.zero_()
            return
        positions = torch.arange(batch.max_kv_length, device=query.device)
        held = positions < batch.kv_lengths[:, None]  # [num_sequences, max_kv_length]
        key, value = self._gather(cache, batch, held)

        starts = batch.query_starts.long()
        lengths = starts[1:] - starts[:-1]
        steps = torch.arange(batch.max_query_length, device=query.device)
        # padding rows repeat some token; their results are dropped below
        rows = (starts[:-1, None] + steps).clamp_(max=batch.num_query_tokens - 1)
        own = (batch.kv_lengths - lengths)[:, None] + steps  # each query's own position
        mask = (positions <= own[..., None]) & held[:, None]
        result = scaled_dot_product_attention(
            query[rows].transpose(1, 2),
            key,
            value,
            attn_mask=mask[:, None],
            scale=call.scale,
            enable_gqa=True,
        )
        # back from padded rows to the query tokens; nothing here waits for the GPU
        tokens = torch.arange(batch.num_query_tokens, device=query.device)
        sequences = torch.searchsorted(starts[1:], tokens, right=True)
        sequences.clamp_(max=batch.num_sequences - 1)
        offsets = (tokens - starts[sequences]).clamp_(max=batch.max_query_length - 1)
        empty = (batch.kv_lengths == 0)[sequences, None, None]
        out.copy_(result[sequences, :, offsets].masked_fill(empty, 0))

    def write_kv(
        self, key: torch.Tensor, value: torch.Tensor, cache: LayerCache, slots: torch.Tensor
    ) -> None:
        """Write K and V of tokens into their slots; slots outside the cache are skipped."""
        write_slots(cache, key, value, slots)

    @staticmethod
    def _gather(
        cache: LayerCache, batch: AttentionBatch, held: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V as [num_sequences, num_kv_heads, max_kv_length, head_size], padding zeroed.

        What lies in unused slots may be anything, NaN too, and 0 * NaN is NaN: a mask on the
        scores alone would not keep it out.
        """
        num_blocks = -(-batch.max_kv_length // cache.block_size)
        first_tokens = torch.arange(num_blocks, device=held.device) * cache.block_size
        used = first_tokens < batch.kv_lengths[:, None]
        blocks = batch.block_tables[:, :num_blocks].long().masked_fill(~used, 0)
        heads = torch.arange(cache.num_kv_heads, device=held.device)
        # one gather straight into [num_sequences, num_kv_heads, num_blocks, block_size, ...]
        places = (blocks[:, None], heads[:, None])
        padding = ~held[:, None, :, None]
        key, value = (
            part[places].flatten(2, 3)[:, :, : batch.max_kv_length].masked_fill_(padding, 0)
            for part in (cache.key, cache.value)
        )
        return key, value
