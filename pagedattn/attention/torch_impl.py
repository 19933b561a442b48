"""Paged attention in plain PyTorch, vectorised: the default without a GPU.

Gathers each sequence's blocks into a padded tensor and calls PyTorch's fused attention, or works
out the softmax in plain operations where that one has no such option. The gather moves the K and V
twice more than a paged kernel does, which is why this is the baseline and not the record.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

from pagedattn.attention.cascade import torch_steps
from pagedattn.attention.rotary import rotate
from pagedattn.kv_cache import dequantised, write_slots

if TYPE_CHECKING:
    from pagedattn.attention.call import AttentionCall
    from pagedattn.attention.rotary import Rotary
    from pagedattn.kv_cache import LayerCache


@dataclass(frozen=True)
class _Gathered:
    """Keys and values of a batch, padded to one length.

    Attributes:
        key: [num_sequences, num_kv_heads, width, head_size], zeros where no token is.
        value: the same shape.
        positions: int64 [num_sequences, width], the token of each place.
        held: bool [num_sequences, width], whether some query may see it.

    """

    key: torch.Tensor
    value: torch.Tensor
    positions: torch.Tensor
    held: torch.Tensor


class TorchImplementation:
    """Gather by page table, then attend over the padded batch."""

    name = "torch"

    def unsupported(self, call: AttentionCall) -> str | None:
        """Everything is supported."""
        return None

    def attention(self, call: AttentionCall) -> None:
        """Write the result and the log-sum-exp.

        Memory: K and V of [num_sequences, width] tokens, once more than the cache, and a mask of
        [num_sequences, max_query_length, width] bytes; width is the longest sequence, or what
        the longest window touches. An fp8 cache is gathered in float32. With a soft cap, ALiBi,
        sinks or the log-sum-exp also several tensors of the scores, in float32.
        """
        batch = call.batch
        if batch.max_kv_length == 0:
            call.out.zero_()
            if call.lse is not None:
                call.lse[:] = float("-inf") if call.sinks is None else call.sinks
            return
        starts = batch.query_starts.long()
        lengths = starts[1:] - starts[:-1]
        steps = torch.arange(batch.max_query_length, device=starts.device)
        first_query = batch.kv_lengths - lengths
        # each query's own position; where all keys are seen, as if it were the last token's
        own = first_query[:, None] + steps if call.causal else batch.kv_lengths[:, None] - 1
        gathered = _gather(call, first_query)
        # padding rows repeat some token; their results are dropped below
        rows = (starts[:-1, None] + steps).clamp_(max=batch.num_query_tokens - 1)
        query = call.query[rows].transpose(1, 2)
        # distance[s, i, j]: position of key j less that of query i
        distance = gathered.positions[:, None] - own[..., None]  # one i if all keys are seen
        visible = (distance <= 0) & gathered.held[:, None]
        if call.window is not None:
            visible &= distance > -call.window

        # back from padded rows to the query tokens; nothing here waits for the GPU
        tokens = torch.arange(batch.num_query_tokens, device=starts.device)
        sequences = torch.searchsorted(starts[1:], tokens, right=True)
        sequences.clamp_(max=batch.num_sequences - 1)
        offsets = (tokens - starts[sequences]).clamp_(max=batch.max_query_length - 1)
        if call.features <= {"window", "fp8", "not_causal"}:
            result = scaled_dot_product_attention(
                query.to(gathered.key.dtype),
                gathered.key,
                gathered.value,
                attn_mask=visible[:, None],
                scale=call.scale,
                enable_gqa=True,
            )
            empty = (batch.kv_lengths == 0)[sequences, None, None]
            call.out.copy_(result[sequences, :, offsets].masked_fill(empty, 0))
            return
        result, lse = _attend(call, query, gathered, visible, distance)
        call.out.copy_(result[sequences, :, offsets])
        if call.lse is not None:
            call.lse.copy_(lse[sequences, :, offsets])

    def write_kv(
        self, key: torch.Tensor, value: torch.Tensor, cache: LayerCache, slots: torch.Tensor
    ) -> None:
        """Write K and V of tokens into their slots; slots outside the cache are skipped."""
        write_slots(cache, key, value, slots)

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
        """Turn Q and K, and write K and V; see `pagedattn.attention.rotary_write_kv`."""
        turned = rotate(key, positions, rotary)
        out.copy_(rotate(query, positions, rotary))
        self.write_kv(turned, value, cache, slots)  # in float32, so that it rounds K once

    def gather_rows(self, query: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Collect the queries of parts; see `pagedattn.attention.cascade`."""
        return torch_steps.gather_rows(query, rows)

    def merge_parts(
        self,
        call: AttentionCall,
        own: tuple[torch.Tensor, torch.Tensor],
        parts: tuple[torch.Tensor, torch.Tensor],
        parts_of_token: torch.Tensor,
    ) -> None:
        """Merge the results of parts; see `pagedattn.attention.cascade`."""
        torch_steps.merge_parts(call, own, parts, parts_of_token)


def _gather(call: AttentionCall, first_query: torch.Tensor) -> _Gathered:
    """Collect the keys and values that some query sees.

    What lies in unused slots may be anything, NaN too, and 0 * NaN is NaN: a mask on the scores
    alone would not keep it out. Nor is a block table's entry used that no query sees.

    Args:
        call: the batch and the window.
        first_query: int64 [num_sequences], position of each sequence's first query.

    """
    cache, batch = call.cache, call.batch
    size, width = cache.block_size, batch.max_kv_length
    first_seen = torch.zeros_like(first_query)
    if call.window is not None:
        first_seen = (first_query - call.window + 1).clamp_(min=0)
        # a window begins anywhere in its first block
        width = min(width, call.window - 1 + batch.max_query_length + size - 1)
    first_block = first_seen // size
    places = torch.arange(width, device=first_query.device)
    positions = first_block[:, None] * size + places
    lengths = batch.kv_lengths[:, None]
    held = (positions < lengths) & (positions >= first_seen[:, None])

    columns = first_block[:, None] + torch.arange(-(-width // size), device=places.device)
    used = columns * size < lengths
    columns = columns.clamp_(max=batch.block_tables.shape[1] - 1)
    blocks = batch.block_tables.gather(1, columns).long().masked_fill(~used, 0)
    heads = torch.arange(cache.num_kv_heads, device=places.device)
    padding = ~held[:, None, :, None]
    dtype = torch.float32 if "fp8" in call.features else cache.dtype

    def collect(part: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        # one gather straight into [num_sequences, num_kv_heads, num_blocks, block_size, ...]
        stored = part[blocks[:, None], heads[:, None]].flatten(2, 3)[:, :, :width]
        numbers = dequantised(stored.transpose(1, 2), scale, dtype).transpose(1, 2)
        return numbers.masked_fill_(padding, 0)

    key = collect(cache.key, cache.key_scale)
    return _Gathered(key, collect(cache.value, cache.value_scale), positions, held)


def _attend(
    call: AttentionCall,
    query: torch.Tensor,
    gathered: _Gathered,
    visible: torch.Tensor,
    distance: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with every option, in float32; see `AttentionCall` for the formula.

    Args:
        call: the options.
        query: [num_sequences, num_query_heads, max_query_length, head_size].
        gathered: keys and values.
        visible: bool [num_sequences, max_query_length, width].
        distance: int64, the same shape; position of the key less that of the query.

    `visible` and `distance` may have one row for all queries.

    Returns:
        The result in the shape of `query`, zeros where nothing is seen, and the log-sum-exp,
        [num_sequences, num_query_heads, max_query_length].

    """
    num_sequences, num_query_heads, num_queries, head_size = query.shape
    key, value = gathered.key.float(), gathered.value.float()
    # the query heads of one KV head stand below each other
    grouped = query.float().reshape(num_sequences, key.shape[1], -1, head_size)
    scores = (grouped @ key.transpose(2, 3)).mul_(call.scale)
    scores = scores.view(num_sequences, num_query_heads, num_queries, -1)
    if call.soft_cap is not None:
        scores = scores.div_(call.soft_cap).tanh_().mul_(call.soft_cap)
    if call.alibi_slopes is not None:
        scores += call.alibi_slopes[:, None, None] * distance[:, None]
    scores.masked_fill_(~visible[:, None], float("-inf"))
    peak = scores.amax(dim=-1, keepdim=True)
    if call.sinks is not None:
        peak = torch.maximum(peak, call.sinks[:, None, None])
    peak = peak.masked_fill(peak == float("-inf"), 0)  # where nothing is seen
    weights = scores.sub_(peak).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    if call.sinks is not None:
        total += torch.exp(call.sinks[:, None, None] - peak)
    grouped = weights.view(num_sequences, key.shape[1], -1, weights.shape[-1]) @ value
    result = grouped.view(query.shape) / total.masked_fill(total == 0, 1)
    return result, (peak + total.log()).squeeze(-1)
