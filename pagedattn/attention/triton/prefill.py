"""Prefill, chunks and mixed batches: a program a tile of queries, walking the keys it sees.

Schedule. A tile has ROWS rows: consecutive query tokens times the query heads of one KV head,
so that a loaded K tile serves the whole group. Tiles are numbered so that sequence s begins at
tile `query_starts[s] // tokens_a_tile + s`: a program finds its sequence by bisection on the
device. The keys that all rows see are folded in without a mask, the diagonal and the edge of a
sliding window with one. Keys that have left the window of all rows are not read.

Operations: 4 * head_size a query head and visible key. Limit: the matrix units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from pagedattn.attention.triton.primitives import (
    LOG2_E,
    dot_precision,
    first_key_seen,
    is_visible,
    join_sinks,
    load_kv_tile,
    natural_lse,
    option_arguments,
    softmax_step,
    tile_scores,
)

if TYPE_CHECKING:
    from pagedattn.attention.call import AttentionCall

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _sequence_of_tile(query_starts_ptr, tile, num_sequences, tile_queries):
    """Largest s with `query_starts[s] // tile_queries + s <= tile`."""
    low = 0
    high = num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        first_tile = tl.load(query_starts_ptr + middle) // tile_queries + middle
        if first_tile <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _fold_tile(
    query,
    own,
    key_ptr,
    value_ptr,
    table_ptr,
    tile,
    first_key,
    kv_length,
    block_stride,
    token_stride,
    scale_log2,
    soft_cap,
    slopes,
    window,
    acc,
    peak,
    total,
    MASKED: tl.constexpr,
    IS_FAR_CAP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fold tile number `tile` of a sequence's keys into the running result of all rows."""
    key, value = load_kv_tile(
        key_ptr,
        value_ptr,
        table_ptr,
        tile * TILE_TOKENS,
        first_key,
        kv_length,
        block_stride,
        token_stride,
        query.dtype,
        MASKED and window is not None,
        HEAD_SIZE,
        HEAD_TILE,
        BLOCK_SIZE,
        TILE_TOKENS,
    )
    tokens = tile * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
    scores = tile_scores(
        query, key, tokens, own, scale_log2, soft_cap, slopes, IS_FAR_CAP, PRECISION
    )
    visible = None
    if MASKED:
        visible = is_visible(tokens, own, window)
    return softmax_step(scores, value, visible, acc, peak, total, MASKED, PRECISION)


@triton.jit(do_not_specialize=["num_sequences", "group", "tile_queries", "window"])
def _prefill_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    tables_ptr,
    kv_lengths_ptr,
    query_starts_ptr,
    key_scale_ptr,
    value_scale_ptr,
    lse_ptr,
    slopes_ptr,
    sinks_ptr,
    window,
    soft_cap,
    scale_log2,
    num_sequences,
    group,
    tile_queries,
    query_token_stride,
    query_head_stride,
    out_token_stride,
    out_head_stride,
    block_stride,
    kv_head_stride,
    token_stride,
    table_stride,
    IS_FAR_CAP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Attend one tile of queries. Grid: [num_kv_heads, upper bound of the tiles]."""
    head = tl.program_id(0)
    # the last tiles of a sequence see the most keys: they go first
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    sequence = _sequence_of_tile(query_starts_ptr, tile, num_sequences, tile_queries)
    first_query = tl.load(query_starts_ptr + sequence)
    num_queries = tl.load(query_starts_ptr + sequence + 1) - first_query
    first_step = (tile - (first_query // tile_queries + sequence)) * tile_queries
    if first_step < num_queries:
        kv_length = tl.load(kv_lengths_ptr + sequence)
        lanes = tl.arange(0, ROWS)
        columns = tl.arange(0, HEAD_TILE)
        steps = first_step + lanes // group
        heads = head * group + lanes % group
        real = (steps < num_queries) & (lanes < tile_queries * group)
        mask = real[:, None] & (columns < HEAD_SIZE)[None, :]
        query_tokens = (first_query + steps).to(tl.int64)
        query = tl.load(
            query_ptr
            + query_tokens[:, None] * query_token_stride
            + heads[:, None] * query_head_stride
            + columns[None, :],
            mask=mask,
            other=0.0,
        )
        own = kv_length - num_queries + steps
        # every row sees the keys before `seen_by_all`, none those from `seen_by_any` on
        seen_by_all = tl.maximum(kv_length - num_queries + first_step + 1, 0)
        last_step = tl.minimum(first_step + tile_queries, num_queries)
        seen_by_any = tl.where(kv_length > 0, kv_length - num_queries + last_step, 0)
        if not CAUSAL:  # as if each query were the last token's
            own = kv_length - 1 + 0 * steps
            seen_by_all = kv_length
            seen_by_any = kv_length
        full_tiles = seen_by_all // TILE_TOKENS
        all_tiles = (seen_by_any + TILE_TOKENS - 1) // TILE_TOKENS
        # a tile's first query sees the keys from `first_key` on, its last those from later on
        first_key = first_key_seen(kv_length, num_queries - first_step, window)
        first_tile = first_key // TILE_TOKENS
        row_scale = scale_log2
        if key_scale_ptr is not None:
            row_scale *= tl.load(key_scale_ptr + head)
        slopes = None
        if slopes_ptr is not None:
            slopes = tl.load(slopes_ptr + heads, mask=real, other=0.0) * _LOG2_E

        acc = tl.zeros([ROWS, HEAD_TILE], dtype=tl.float32)
        peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
        total = tl.zeros([ROWS], dtype=tl.float32)
        head_offset = head.to(tl.int64) * kv_head_stride
        table_ptr = tables_ptr + sequence.to(tl.int64) * table_stride
        if window is not None:
            last_key = first_key_seen(kv_length, num_queries - last_step + 1, window)
            inner = tl.minimum((last_key + TILE_TOKENS - 1) // TILE_TOKENS, all_tiles)
            full_tiles = tl.maximum(full_tiles, inner)
            for step in tl.range(first_tile, inner, num_stages=1):
                acc, peak, total = _fold_tile(
                    query, own, key_ptr + head_offset, value_ptr + head_offset, table_ptr, step,
                    first_key, kv_length, block_stride, token_stride, row_scale, soft_cap, slopes,
                    window, acc, peak, total, True, IS_FAR_CAP, HEAD_SIZE, HEAD_TILE, BLOCK_SIZE,
                    TILE_TOKENS, PRECISION,
                )  # fmt: skip
            first_tile = inner
        for step in tl.range(first_tile, full_tiles, num_stages=STAGES):
            acc, peak, total = _fold_tile(
                query, own, key_ptr + head_offset, value_ptr + head_offset, table_ptr, step,
                first_key, kv_length, block_stride, token_stride, row_scale, soft_cap, slopes,
                window, acc, peak, total, False, IS_FAR_CAP, HEAD_SIZE, HEAD_TILE, BLOCK_SIZE,
                TILE_TOKENS, PRECISION,
            )  # fmt: skip
        for step in tl.range(full_tiles, all_tiles, num_stages=1):
            acc, peak, total = _fold_tile(
                query, own, key_ptr + head_offset, value_ptr + head_offset, table_ptr, step,
                first_key, kv_length, block_stride, token_stride, row_scale, soft_cap, slopes,
                window, acc, peak, total, True, IS_FAR_CAP, HEAD_SIZE, HEAD_TILE, BLOCK_SIZE,
                TILE_TOKENS, PRECISION,
            )  # fmt: skip
        if sinks_ptr is not None:
            sinks = tl.load(sinks_ptr + heads, mask=real, other=0.0) * _LOG2_E
            peak, total, decay = join_sinks(peak, total, sinks)
            acc = acc * decay[:, None]
        if value_scale_ptr is not None:
            acc = acc * tl.load(value_scale_ptr + head)
        if lse_ptr is not None:
            lse_places = query_tokens * (tl.num_programs(0) * group) + heads
            tl.store(lse_ptr + lse_places, natural_lse(peak, total), mask=real)
        result = acc / tl.where(total == 0, 1.0, total)[:, None]
        tl.store(
            out_ptr
            + query_tokens[:, None] * out_token_stride
            + heads[:, None] * out_head_stride
            + columns[None, :],
            result.to(out_ptr.dtype.element_ty),
            mask=mask,
        )


@dataclass(frozen=True)
class PrefillConfig:
    """How the prefill kernel is cut and compiled.

    Attributes:
        rows: query tokens times heads of a group in a tile.
        tile_tokens: KV tokens a step.
        num_warps: warps a program.
        num_stages: depth of the software pipeline.

    """

    rows: int
    tile_tokens: int
    num_warps: int
    num_stages: int


def choose_config(head_tile: int, itemsize: int) -> PrefillConfig:
    """Pick the tile: large for 16 bits, small for float32.

    Float32 is multiplied without matrix units, in unrolled code that takes long to compile.
    """
    if itemsize >= 4:
        return PrefillConfig(max(16, min(64, 4096 // head_tile)), 16, 4, 2)
    if head_tile <= 128:
        return PrefillConfig(256, 64, 8, 2)
    return PrefillConfig(64, 32, 4, 3)


def launch_prefill(call: AttentionCall, config: PrefillConfig | None = None) -> None:
    """Launch the kernel over the most tiles that the batch can have; surplus programs end.

    Args:
        call: what to compute; the batch's tensors are read on the device only.
        config: how to cut and compile; None chooses.

    """
    query, cache, batch, out = call.query, call.cache, call.batch, call.out
    num_tokens, num_query_heads, head_size = query.shape
    group = num_query_heads // cache.num_kv_heads
    head_tile = max(16, triton.next_power_of_2(head_size))
    config = config or choose_config(head_tile, query.dtype.itemsize)
    rows = max(config.rows, triton.next_power_of_2(group))
    tile_queries = rows // group
    num_tiles = num_tokens // tile_queries + batch.num_sequences
    _prefill_kernel[(cache.num_kv_heads, num_tiles)](
        query,
        cache.key,
        cache.value,
        out,
        batch.block_tables,
        batch.kv_lengths,
        batch.query_starts,
        **option_arguments(call),
        scale_log2=call.scale * LOG2_E,
        num_sequences=batch.num_sequences,
        group=group,
        tile_queries=tile_queries,
        query_token_stride=query.stride(0),
        query_head_stride=query.stride(1),
        out_token_stride=out.stride(0),
        out_head_stride=out.stride(1),
        block_stride=cache.key.stride(0),
        kv_head_stride=cache.key.stride(1),
        token_stride=cache.key.stride(2),
        table_stride=batch.block_tables.stride(0),
        HEAD_SIZE=head_size,
        HEAD_TILE=head_tile,
        BLOCK_SIZE=cache.block_size,
        ROWS=rows,
        TILE_TOKENS=config.tile_tokens,
        STAGES=config.num_stages,
        PRECISION=dot_precision(query.dtype),
        CAUSAL=call.causal,
        num_warps=config.num_warps,
    )
