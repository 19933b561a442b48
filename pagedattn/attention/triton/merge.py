"""The second half of decode: how rows were cut, and combining the parts of a row that was."""

from __future__ import annotations

import triton
import triton.language as tl

from pagedattn.attention.triton.primitives import LOG2_E, first_key_seen, join_sinks, natural_lse

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def tiles_before(
    kv_lengths_ptr,
    query_starts_ptr,
    num_sequences,
    window,
    SEQUENCES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Tiles that each sequence's queries see, and those of all sequences up to and with it.

    Both int32 [SEQUENCES]. Tiles that have left the window of a sequence's first query are no
    work and are not counted.
    """
    places = tl.arange(0, SEQUENCES)
    mask = places < num_sequences
    lengths = tl.load(kv_lengths_ptr + places, mask=mask, other=0)
    tiles = (lengths + TILE - 1) // TILE
    if window is not None:
        starts = tl.load(query_starts_ptr + places, mask=mask, other=0)
        ends = tl.load(query_starts_ptr + places + 1, mask=mask, other=0)
        tiles -= first_key_seen(lengths, ends - starts, window) // TILE
    return tiles, tl.cumsum(tiles, 0)


@triton.jit(do_not_specialize=["num_sequences", "num_programs", "num_kv_heads", "group", "window"])
def merge_kernel(
    out_ptr,
    part_ptr,
    part_peak_ptr,
    part_total_ptr,
    kv_lengths_ptr,
    query_starts_ptr,
    value_scale_ptr,
    lse_ptr,
    sinks_ptr,
    window,
    num_sequences,
    num_programs,
    num_kv_heads,
    group,
    out_token_stride,
    out_head_stride,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    SEQUENCES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Combine the parts of one query and head. Grid: [num_sequences, num_kv_heads, lanes].

    A row that one program had to itself is left alone. A row without keys gets zeros, and a
    log-sum-exp of its sink. PARTS parts are read at a time.
    """
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    lane = tl.program_id(2)
    tiles, ends = tiles_before(
        kv_lengths_ptr, query_starts_ptr, num_sequences, window, SEQUENCES, TILE_TOKENS
    )
    here = tl.arange(0, SEQUENCES) == sequence
    row_tiles = tl.sum(tl.where(here, tiles, 0), 0)
    sequence_begin = tl.sum(tl.where(here, ends - tiles, 0), 0) * num_kv_heads
    total_tiles = tl.sum(tiles, 0).to(tl.int64) * num_kv_heads
    row_begin = sequence_begin + head * row_tiles
    row_end = row_begin + row_tiles
    # the program of tile t is the largest p with p * total_tiles // busy_programs <= t
    busy_programs = tl.minimum(num_programs, total_tiles)
    first = 0
    last = 0
    if row_tiles > 0:
        first = (((row_begin + 1) * busy_programs - 1) // total_tiles).to(tl.int32)
        last = ((row_end * busy_programs - 1) // total_tiles).to(tl.int32)

    first_query = tl.load(query_starts_ptr + sequence)
    num_queries = tl.load(query_starts_ptr + sequence + 1) - first_query
    step = lane // group
    if ((first != last) | (row_tiles == 0)) & (step < num_queries):
        columns = tl.arange(0, HEAD_TILE)
        acc = tl.zeros([HEAD_TILE], dtype=tl.float32)
        peak = tl.max(tl.full([PARTS], float("-inf"), dtype=tl.float32), 0)
        total = tl.sum(tl.zeros([PARTS], dtype=tl.float32), 0)
        if row_tiles > 0:
            for start in range(first, last + 1, PARTS):
                programs = start + tl.arange(0, PARTS)
                valid = programs <= last
                places = (2 * programs + (programs == first).to(tl.int32)) * ROWS + lane
                part_peak = tl.load(part_peak_ptr + places, mask=valid, other=float("-inf"))
                part_total = tl.load(part_total_ptr + places, mask=valid, other=0.0)
                part = tl.load(
                    part_ptr + places[:, None] * HEAD_TILE + columns[None, :],
                    mask=valid[:, None],
                    other=0.0,
                )
                new_peak = tl.maximum(peak, tl.max(part_peak, 0))
                shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
                decay = tl.exp2(peak - shift)
                gain = tl.exp2(part_peak - shift)
                acc = acc * decay + tl.sum(part * gain[:, None], 0)
                total = total * decay + tl.sum(part_total * gain, 0)
                peak = new_peak
        query_head = head * group + lane % group
        query_token = (first_query + step).to(tl.int64)
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + query_head) * _LOG2_E
            peak, total, decay = join_sinks(peak, total, sink)
            acc = acc * decay
        if value_scale_ptr is not None:
            acc = acc * tl.load(value_scale_ptr + head)
        if lse_ptr is not None:
            num_query_heads = num_kv_heads * group
            tl.store(lse_ptr + query_token * num_query_heads + query_head, natural_lse(peak, total))
        result = acc / tl.where(total == 0, 1.0, total)
        tl.store(
            out_ptr + query_token * out_token_stride + query_head * out_head_stride + columns,
            result.to(out_ptr.dtype.element_ty),
            mask=columns < HEAD_SIZE,
        )
