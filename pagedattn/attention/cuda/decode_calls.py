"""Which calls the decode kernel takes, which it had better leave to prefill, and cut how."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from pagedattn.attention.cuda.decode_config import (
    MAX_ACCUMULATORS,
    MAX_COLUMNS,
    Cutting,
    DecodeConfig,
    choose_config,
    padded_columns,
    programs_for,
)
from pagedattn.attention.cuda.decode_division import (
    ALIGN_BYTES,
    MOST_PARTS,
    RowKind,
    clusters_of,
    heads_in_parallel,
    keeps_whole,
    ranges_of,
    shares_paths_unevenly,
)
from pagedattn.attention.cuda.decode_fits import fit_for
from pagedattn.attention.cuda.launching import reads_again
from pagedattn.attention.cuda.prefill_choice import way_of
from pagedattn.attention.cuda.prefill_estimate import Work, read_seconds
from pagedattn.attention.cuda.soft_cap import LARGEST_CAP

if TYPE_CHECKING:
    from pagedattn.attention.call import AttentionCall

HEAD_SIZES = (64, 80, 96, 128, 192, 256)
FEW_COLUMNS = 8
"""Queries times heads of a group, of which prefill is never faster."""
FEW_SUMS = 1024
"""Columns times elements of a head, up to which a row takes little time to end."""
LEAST_RANGES, LEAST_ROWS = 32, 4
"""Of which one is needed for rows with so few sums to begin with a range each."""
LIKELY = 0.75
"""Of what ranges may have more for it: if they had that by estimate, they are likely to fit."""
MOST_ALIGNED = 128
"""Sequences of which the kernel has each row begin with a range, at most: see decode_shape.cuh."""
DRAFTS_SECONDS = 14e-6
"""What drafts of more than `FEW_COLUMNS` take besides reading K and V, if rows of several lengths
are cut; fitted to drafts in heads of 64 and 128 on an H200."""


def not_taken(call: AttentionCall) -> str | None:
    """Say in a phrase why the kernel cannot take a call, or None if it can."""
    cache, query = call.cache, call.query
    head_size, block_size = cache.head_size, cache.block_size
    kv_bytes = cache.key.element_size()
    columns = columns_of(call)
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"queries of {query.dtype}"
    if cache.key.dtype not in (query.dtype, torch.float8_e4m3fn):
        return f"a cache of {cache.key.dtype}"
    if head_size not in HEAD_SIZES or (kv_bytes == 1 and head_size % 32):
        return f"head_size {head_size} over {cache.key.dtype}"
    if block_size & (block_size - 1):
        return f"block_size {block_size}, which is no power of two"
    if min(block_size, 16) * head_size * kv_bytes % 128:
        return f"block_size {block_size} with rows of {head_size * kv_bytes} bytes"
    if call.soft_cap is not None and call.soft_cap > LARGEST_CAP:
        return f"a soft cap of {call.soft_cap:g}"
    if columns > MAX_COLUMNS or columns * head_size > MAX_ACCUMULATORS:
        return f"{columns} queries and heads of a group together"
    strides = (*cache.key.stride()[:3], cache.value.data_ptr(), cache.key.data_ptr())
    if any(stride * kv_bytes % 16 for stride in strides[:3]) or any(at % 16 for at in strides[3:]):
        return "a cache that does not lie at multiples of 16 bytes"
    # 4 elements are read or written at once
    if any(
        t.data_ptr() % (4 * t.element_size()) or t.stride(0) % 4 or t.stride(1) % 4
        for t in (query, call.out)
    ):
        return "queries or outputs that do not lie at multiples of 4 elements"
    return None


def columns_of(call: AttentionCall) -> int:
    """Return queries times heads of a group: columns of a row's scores."""
    return call.query.shape[1] // call.cache.num_kv_heads * max(1, call.batch.max_query_length)


def kind_of(call: AttentionCall) -> RowKind:
    """Return of which kind the call's rows are."""
    cache = call.cache
    kv_bytes = cache.key.element_size()
    return RowKind.of(
        cache.head_size,
        kv_bytes,
        columns_of(call),
        cache.block_size,
        is_shared=reads_again(call),
        fit=fit_for(call.query.device),
    )


def is_crowded(call: AttentionCall) -> bool:
    """Whether queries are so many that prefill, where it takes the call, is faster.

    Of rows of one length, and of decodes, it is only where not all sums stay in a warp's registers.
    Parts of shared blocks, whose keys prefill does not share out, are not meant.
    """
    if not call.causal:
        return False
    columns, head_size = columns_of(call), call.cache.head_size
    if has_even_rows(call) or call.batch.max_query_length <= 1:
        return columns > MAX_COLUMNS // 2 and MAX_COLUMNS * head_size >= MAX_ACCUMULATORS
    if columns > MAX_COLUMNS // 2 or columns * head_size > MAX_ACCUMULATORS // 2:
        return True
    if columns <= FEW_COLUMNS or call.batch.known_lengths is None:
        return False
    if keeps_whole(*longest_row(call)):  # so that most of them are not cut
        return False
    work = Work.of(call)
    reading = sum(read_seconds(work, each, widened=False) for each in work.sequences)
    return way_of(work).seconds < reading + DRAFTS_SECONDS


def longest_row(call: AttentionCall) -> tuple[int, int]:
    """Return how many KV tokens of a sequence its queries see, at most, and K and V of a head.

    The latter in bytes.
    """
    batch, cache = call.batch, call.cache
    length = batch.expected_kv_length
    if call.window is not None:
        length = min(length, call.window - 1 + batch.max_query_length)
    return length, 2 * length * cache.head_size * cache.key.element_size()


def has_even_rows(call: AttentionCall) -> bool:
    """Return whether rows are of one length, as far as the host knows; one sequence's are."""
    return call.batch.is_full or call.batch.num_sequences == 1


def mean_tokens(call: AttentionCall) -> float:
    """Return how many KV tokens of a sequence its queries see on average.

    If the host does not know, a quarter of those of the longest; or if it made a batch that is less
    than half as long as its bound: a graph that is captured of it is for other lengths.
    """
    known, bound = call.batch.known_lengths, call.batch.expected_kv_length
    longest, _ = longest_row(call)
    if known is None or known.short is None or 2 * known.longest < bound:
        return longest / 4
    return min(longest, known.short.mean_kv * bound)


def aligns(call: AttentionCall, heads: int, ranges: int) -> bool:
    """Return whether it may pay that each of rows of several lengths begins with a range.

    The kernel decides, by the lengths of now, which takes it some time. That is spared where rows
    are as many as ranges; where they are two or three, soon ended, and ranges are few, each of them
    much of the whole; and where ranges are likely to become too large: they become larger than for
    half a range of each row.

    Args:
        call: its bounds tell.
        heads: that are read side by side.
        ranges: that there are programs for.

    """
    batch = call.batch
    rows = batch.num_sequences * call.cache.num_kv_heads // heads
    sums = padded_columns(columns_of(call)) * call.cache.head_size
    if has_even_rows(call) or rows >= ranges or batch.num_sequences > MOST_ALIGNED:
        return False
    if sums <= FEW_SUMS and ranges < LEAST_RANGES and rows < LEAST_ROWS:
        return False
    length, row_bytes = longest_row(call)
    mean_bytes = mean_tokens(call) / max(1, length) * row_bytes
    more = rows * mean_bytes * (1 / (ranges - rows // 2) - 1 / ranges)
    return more <= LIKELY * next(most for limit, most in ALIGN_BYTES if sums <= limit)


def stays_whole(call: AttentionCall, config: DecodeConfig, num_programs: int) -> bool:
    """Return whether rows of several lengths are not cut, if they are as long as the host knows.

    That is what the kernel does with the lengths of now, but that it searches for ranges which rows
    could begin with, and here they are taken to be found.

    Args:
        call: its bounds tell.
        config: how the kernel is cut; never whole unless it `keeps_whole`.
        num_programs: one on each multiprocessor.

    """
    if not config.keeps_whole:
        return False
    batch, num_kv_heads = call.batch, call.cache.num_kv_heads
    length, row_bytes = longest_row(call)
    heads = heads_in_parallel(num_kv_heads, num_programs * config.programs)
    rows, multiprocessors = batch.num_sequences * num_kv_heads // heads, num_programs // heads
    if rows > multiprocessors and not keeps_whole(length, row_bytes):
        return False
    tokens = rows * mean_tokens(call)
    cutting = Cutting.of(
        config,
        head_size=call.cache.head_size,
        kv_bytes=call.cache.key.element_size(),
        block_size=call.cache.block_size,
    )
    most = tokens / multiprocessors + cutting.of_rows(rows)
    if config.aligns:
        begun = num_programs * config.programs // heads - rows // 2
        most = min(most, config.programs * tokens / begun + cutting.aligned)
    return config.never_cuts or length <= most


def divide(
    call: AttentionCall,
    num_programs: int,
    cluster: int | None,
    clusters_of_row: int | None = None,
) -> tuple[int, int, int]:
    """Return heads that are read side by side, ranges, and programs of a cluster.

    Args:
        call: its bounds tell.
        num_programs: one on each multiprocessor.
        cluster: programs of one; None chooses.
        clusters_of_row: of this size, that a row has; None is as many as there are programs for.

    Raises:
        ValueError: there are too many rows for clusters of this size.

    """
    cache, batch = call.cache, call.batch
    heads = heads_in_parallel(cache.num_kv_heads, num_programs)
    rows, most = batch.num_sequences * cache.num_kv_heads // heads, num_programs // heads
    length, row_bytes = longest_row(call)
    kind, parts = kind_of(call), 0
    if cluster is None:
        cluster = 1
        if rows > 0 and has_even_rows(call):
            sizes = rows, heads, num_programs, length, row_bytes
            cluster, parts = clusters_of(*sizes, kind)
    elif cluster > 1:
        fitting = min(most // rows // cluster, MOST_PARTS)
        parts = min(fitting, clusters_of_row or fitting) * cluster
        if not parts:
            raise ValueError(f"{rows} rows leave no {cluster} of {most} ranges for each")
    if cluster > 1:
        return heads, parts * rows, cluster
    return heads, ranges_of(rows, heads, num_programs, length, row_bytes, kind.fit), 1


def config_for(
    call: AttentionCall,
    num_programs: int,
    heads: int,
    ranges: int,
    *,
    programs: int | None = None,
    keeps: bool | None = None,
) -> DecodeConfig:
    """Choose how to cut and compile for a call, but for clusters.

    Rows that are expected to stay whole are not looked at for beginning with a range each, which
    would take some time; those that are short enough may stay so though it is not expected.

    Args:
        call: its bounds tell.
        num_programs: one on each multiprocessor.
        heads: that are read side by side.
        ranges: into which the work is cut.
        programs: on a multiprocessor, 1, or 2 where registers suffice; None chooses.
        keeps: have rows of several lengths stay whole, however much longer one is, or cut them;
            None chooses.

    """
    cache, batch = call.cache, call.batch
    kv_length, row_bytes = longest_row(call)
    kind, columns = kind_of(call), columns_of(call)
    sizes = batch.num_sequences, cache.num_kv_heads, num_programs
    of_cache = {"head_size": cache.head_size, "kv_bytes": cache.key.element_size()}
    if programs is None:
        programs = programs_for(
            *sizes,
            row_bytes=row_bytes,
            is_even=batch.is_full,
            columns=columns,
            block_size=cache.block_size,
            is_shared=reads_again(call),
            fit=kind.fit,
            **of_cache,
        )

    def cut_for(tokens_a_program: int) -> DecodeConfig:
        return choose_config(
            columns=columns,
            block_size=cache.block_size,
            programs=programs,
            tokens_a_program=tokens_a_program,
            max_kv_length=kv_length,
            shares_paths=batch.is_full
            and shares_paths_unevenly(*sizes, row_bytes, kv_length, kind),
            fit=kind.fit,
            **of_cache,
        )

    is_aligned = aligns(call, heads, num_programs // heads)
    tokens = batch.num_sequences * kv_length * cache.num_kv_heads
    share = tokens // (num_programs // heads * heads)
    if is_aligned:
        config = cut_for(max(share, kv_length // MOST_PARTS))
    else:
        config = cut_for(tokens // max(1, ranges * heads))
    if config.programs > 1:
        heads = heads_in_parallel(cache.num_kv_heads, num_programs * config.programs)
        is_aligned = aligns(call, heads, num_programs * config.programs // heads)
    if keeps is False or has_even_rows(call):
        return replace(config, aligns=is_aligned)
    whole = replace(cut_for(max(share, kv_length)), aligns=is_aligned, keeps_whole=True)
    if keeps or stays_whole(call, whole, num_programs):
        return replace(whole, aligns=False, never_cuts=bool(keeps))
    return replace(config, aligns=is_aligned, keeps_whole=keeps_whole(kv_length, row_bytes))
