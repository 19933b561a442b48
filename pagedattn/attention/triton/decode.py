"""Decode and short queries: the KV of all sequences divided evenly over the whole GPU.

Schedule. A *row* is one sequence and one KV head; its work is the tiles of KV that its queries see:
all of the sequence's, or those in a sliding window. All rows' tiles, laid end to end, are cut into
equal ranges, one a program, so a batch of ragged lengths takes as long as an even one with the same
tokens (Stream-K, Osama et al. 2023, applied to attention). A program finds its range from the
lengths by itself, on the device: nothing is planned on the host, and a captured graph follows new
lengths. A row that lies within one program is written to the output at once; a row that is cut
leaves unnormalised parts in a workspace, which the merge kernel combines.

Bytes: K and V once (2 * keys seen * head_size * itemsize a row), plus at most two parts a
program, written and read (8 * rows * head_size bytes each). Limit: the read bandwidth.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from pagedattn.attention.triton.merge import merge_kernel, tiles_before
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
MAX_ROWS_OF_ONE_TILE = 64
MIN_DOT_ROWS = 16
INTERPRETER_PROCESSORS = 3


@dataclass(frozen=True)
class DecodeConfig:
    """How the decode kernel is cut and compiled.

    Attributes:
        tile_tokens: KV tokens a step.
        num_warps: warps a program.
        num_stages: depth of the software pipeline.
        programs_per_sm: programs for each multiprocessor.

    """

    tile_tokens: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


def rows_of_one_tile(call: AttentionCall) -> int | None:
    """Rows of the query tile if every sequence's queries of one KV head fit one; else None."""
    group = call.query.shape[1] // call.cache.num_kv_heads
    longest = call.batch.max_query_length
    rows = max(MIN_DOT_ROWS, triton.next_power_of_2(group * longest))
    return rows if rows <= MAX_ROWS_OF_ONE_TILE or longest <= 1 else None


@triton.jit(do_not_specialize=["num_sequences", "num_kv_heads", "group", "window"])
def _decode_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    part_ptr,
    part_peak_ptr,
    part_total_ptr,
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
    num_kv_heads,
    group,
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
    SEQUENCES: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Work off one program's range of KV tiles. Grid: [num_programs].

    Parts: program p has two places, 2p for a row that began in an earlier program, 2p + 1 for
    one that begins here and goes on; part [2 * num_programs, ROWS, HEAD_TILE], peak and total
    [2 * num_programs, ROWS], float32.
    """
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    tiles, ends = tiles_before(
        kv_lengths_ptr, query_starts_ptr, num_sequences, window, SEQUENCES, TILE_TOKENS
    )
    total_tiles = tl.sum(tiles, 0).to(tl.int64) * num_kv_heads
    # no program without a tile between two with one: the merge counts on it
    busy_programs = tl.minimum(num_programs, total_tiles)
    begin = 0
    end = 0
    if program < busy_programs:
        begin = (program * total_tiles // busy_programs).to(tl.int32)
        end = ((program + 1) * total_tiles // busy_programs).to(tl.int32)

    lanes = tl.arange(0, ROWS)
    columns = tl.arange(0, HEAD_TILE)
    column_mask = columns < HEAD_SIZE
    places = tl.arange(0, SEQUENCES)

    tile = begin
    while tile < end:
        sequence = tl.sum((ends * num_kv_heads <= tile).to(tl.int32), 0)
        here = places == sequence
        row_tiles = tl.sum(tl.where(here, tiles, 0), 0)
        sequence_begin = tl.sum(tl.where(here, ends - tiles, 0), 0) * num_kv_heads
        head = (tile - sequence_begin) // row_tiles
        row_begin = sequence_begin + head * row_tiles
        row_end = row_begin + row_tiles
        segment_end = tl.minimum(end, row_end)

        kv_length = tl.load(kv_lengths_ptr + sequence)
        first_query = tl.load(query_starts_ptr + sequence)
        num_queries = tl.load(query_starts_ptr + sequence + 1) - first_query
        steps = lanes // group
        heads = head * group + lanes % group
        real = steps < num_queries
        query_tokens = (first_query + steps).to(tl.int64)
        query = tl.load(
            query_ptr
            + query_tokens[:, None] * query_token_stride
            + heads[:, None] * query_head_stride
            + columns[None, :],
            mask=real[:, None] & column_mask[None, :],
            other=0.0,
        )
        # position of each lane's query; where all keys are seen, as if it were the last token's
        own = kv_length - num_queries + steps
        if not CAUSAL:
            own = kv_length - 1 + 0 * steps
        first_key = first_key_seen(kv_length, num_queries, window)
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
        row_offset = first_tile - row_begin
        for step in tl.range(tile + row_offset, segment_end + row_offset, num_stages=STAGES):
            start = step * TILE_TOKENS
            key, value = load_kv_tile(
                key_ptr + head_offset,
                value_ptr + head_offset,
                table_ptr,
                start,
                first_key,
                kv_length,
                block_stride,
                token_stride,
                query.dtype,
                window is not None,
                HEAD_SIZE,
                HEAD_TILE,
                BLOCK_SIZE,
                TILE_TOKENS,
            )
            tokens = start + tl.arange(0, TILE_TOKENS)
            scores = tile_scores(
                query, key, tokens, own, row_scale, soft_cap, slopes, IS_FAR_CAP, PRECISION
            )
            visible = is_visible(tokens, own, window)
            acc, peak, total = softmax_step(
                scores, value, visible, acc, peak, total, True, PRECISION
            )

        if (tile == row_begin) & (segment_end == row_end):
            if sinks_ptr is not None:
                sinks = tl.load(sinks_ptr + heads, mask=real, other=0.0) * _LOG2_E
                peak, total, decay = join_sinks(peak, total, sinks)
                acc = acc * decay[:, None]
            if value_scale_ptr is not None:
                acc = acc * tl.load(value_scale_ptr + head)
            if lse_ptr is not None:
                lse_places = query_tokens * (num_kv_heads * group) + heads
                tl.store(lse_ptr + lse_places, natural_lse(peak, total), mask=real)
            result = acc / tl.where(total == 0, 1.0, total)[:, None]
            tl.store(
                out_ptr
                + query_tokens[:, None] * out_token_stride
                + heads[:, None] * out_head_stride
                + columns[None, :],
                result.to(out_ptr.dtype.element_ty),
                mask=real[:, None] & column_mask[None, :],
            )
        else:
            part = 2 * program + (tile == row_begin).to(tl.int32)
            lane_places = part * ROWS + lanes
            tl.store(part_ptr + lane_places[:, None] * HEAD_TILE + columns[None, :], acc)
            tl.store(part_peak_ptr + lane_places, peak)
            tl.store(part_total_ptr + lane_places, total)
        tile = segment_end


def choose_config(head_tile: int, itemsize: int, rows: int) -> DecodeConfig:
    """Pick tile and pipeline: K and V of 32 KiB a stage, three programs a processor."""
    tile_tokens = max(16, min(128, 16384 // (head_tile * itemsize)))
    return DecodeConfig(
        tile_tokens=tile_tokens,
        num_warps=4,
        num_stages=2,
        programs_per_sm=3 if rows <= 16 else 2,
    )


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few for the interpreter, so that rows are cut there too."""
    if device.type != "cuda":
        return INTERPRETER_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch_decode(call: AttentionCall, config: DecodeConfig | None = None) -> None:
    """Launch decode and merge; `rows_of_one_tile` must not be None. Allocates the workspace.

    Args:
        call: what to compute; the batch's tensors are read on the device only.
        config: how to cut and compile; None chooses.

    """
    query, cache, batch, out = call.query, call.cache, call.batch, call.out
    rows = rows_of_one_tile(call)
    assert rows is not None
    num_kv_heads, head_size = cache.num_kv_heads, cache.head_size
    head_tile = max(16, triton.next_power_of_2(head_size))
    config = config or choose_config(head_tile, cache.dtype.itemsize, rows)
    num_programs = num_multiprocessors(query.device) * config.programs_per_sm
    parts = torch.empty(
        2 * num_programs * rows * (head_tile + 2), dtype=torch.float32, device=query.device
    )
    part, peak, total = parts.split([2 * num_programs * rows * size for size in (head_tile, 1, 1)])
    sequences = triton.next_power_of_2(batch.num_sequences)
    group = query.shape[1] // num_kv_heads
    shape = {
        "HEAD_SIZE": head_size,
        "HEAD_TILE": head_tile,
        "ROWS": rows,
        "TILE_TOKENS": config.tile_tokens,
        "SEQUENCES": sequences,
    }
    options = option_arguments(call)
    _decode_kernel[(num_programs,)](
        query,
        cache.key,
        cache.value,
        out,
        part,
        peak,
        total,
        batch.block_tables,
        batch.kv_lengths,
        batch.query_starts,
        **options,
        scale_log2=call.scale * LOG2_E,
        num_sequences=batch.num_sequences,
        num_kv_heads=num_kv_heads,
        group=group,
        query_token_stride=query.stride(0),
        query_head_stride=query.stride(1),
        out_token_stride=out.stride(0),
        out_head_stride=out.stride(1),
        block_stride=cache.key.stride(0),
        kv_head_stride=cache.key.stride(1),
        token_stride=cache.key.stride(2),
        table_stride=batch.block_tables.stride(0),
        BLOCK_SIZE=cache.block_size,
        STAGES=config.num_stages,
        PRECISION=dot_precision(query.dtype),
        CAUSAL=call.causal,
        num_warps=config.num_warps,
        **shape,
    )
    lanes = group * max(1, batch.max_query_length)
    merge_kernel[(batch.num_sequences, num_kv_heads, lanes)](
        out,
        part,
        peak,
        total,
        batch.kv_lengths,
        batch.query_starts,
        options["value_scale_ptr"],
        options["lse_ptr"],
        options["sinks_ptr"],
        options["window"],
        batch.num_sequences,
        num_programs,
        num_kv_heads,
        group,
        out.stride(0),
        out.stride(1),
        PARTS=max(1, 4096 // head_tile),
        num_warps=4,
        **shape,
    )
