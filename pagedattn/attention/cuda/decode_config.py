"""How the decode kernel is cut: tiles, stages, programs, and heads that are read side by side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

WARPS = 4  # of a program, that multiply
IN_FLIGHT = 131_072  # bytes of K and V that a multiprocessor has on their way
MORE_IN_FLIGHT = 196_608  # the same over heads of 64, for one program
LESS_IN_FLIGHT = 65_536  # the same over heads of 128 where `shares_paths_unevenly`
MERGE_BYTES = 64 << 20  # see decode_shape.cuh
MIN_TILE, MAX_TILE = 16, 64
MAX_STAGES = 16
MANY_ROWS = 256
VERY_MANY_ROWS = 1024
LONG_SHARE = 1024  # KV tokens of one head that a multiprocessor has
SHORT_ROW_BYTES = 64 << 10  # of K and V
FEW = 16  # one row in so many may be missing
GATHERERS = 4  # warps that copy by threads, over blocks of one token
MAX_BOXES = 16  # blocks of a tile that the TMA brings, an instruction each
SHARED_BYTES = 232_448  # of a multiprocessor, for one program
MOST_PARTS = 20  # of a row, that are merged at once: FAN_IN of decode_shape.cuh
LEAST_OF_PART = 96  # KV tokens that make a part worth merging
FEW_BYTES = 12 << 20  # K and V, of which half as many parts are made
PATH_RATE = 65e9  # bytes a second that come by a path to the L2 to one multiprocessor
READ_RATE = 3.1e12  # bytes a second of the memory
ALONE_RATE = 88e9  # bytes a second that come to one multiprocessor, if others are idle,
HALVED_BY = 80  # and half of it if so many others read, each by a path of its own
PAIRED_RATE = 36e9  # bytes a second to each where paths to the L2 are shared,
CLUSTERED_RATE = 31e9  # and where programs of clusters share them
SPREAD_OUT = 50  # programs of clusters of more than two that all have a path of their own
CLUSTERS = {2: 66, 4: 30, 5: 20, 6: 16, 8: 15}  # programs of a cluster, and how many run at once
ONE_CLUSTER, SEVERAL_CLUSTERS = 0.7e-6, 3.6e-6  # seconds that merging takes
_MERGING = ((1, 0.0), (10, 2.1e-6), (20, 2.6e-6), (40, 3.1e-6), (math.inf, 4.3e-6))
"""Parts of a row, and seconds that merging as many by way of the L2 takes."""
LEAST_GAIN = 0.3e-6  # seconds that clusters are to save
SWITCHES = ("window", "soft_cap", "alibi", "sinks", "lse")
MAX_COLUMNS = 32
MAX_ACCUMULATORS = 4096  # of a row: columns times head size


@dataclass(frozen=True)
class DecodeConfig:
    """How the kernel is cut and compiled.

    Attributes:
        columns: queries times heads of a group, padded to 8, 16 or 32.
        tile: KV tokens that a warp takes at once.
        stages: tiles in shared memory; a multiple of `WARPS`.
        programs: on a multiprocessor, 1 or 2.
        cluster: programs that add up a row in each other's shared memory; 1 for none.

    """

    columns: int
    tile: int
    stages: int
    programs: int = 1
    cluster: int = 1

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a program: as much as there is for it."""
        return SHARED_BYTES // self.programs - (self.programs - 1) * 1024


def choose_config(
    head_size: int,
    kv_bytes: int,
    columns: int,
    *,
    block_size: int = 16,
    programs: int = 1,
    tokens_a_program: int = 1 << 30,
    max_kv_length: int = 1 << 30,
    shares_paths: bool = False,
) -> DecodeConfig:
    """Pick how to cut, from bounds that the host knows; measured on an H100.

    128 KiB in flight keep the memory busy, and more helps only over heads of 64, with one program
    on a multiprocessor. Where some multiprocessors share a path to the L2 and others do not, half
    of it, over 16-bit heads of 128 in blocks of 16 or more, leaves more of the memory to the first,
    with which a launch ends. Where a program or a row has little, tiles are small enough for each
    warp to have one, and over small blocks for few instructions.

    Args:
        head_size: elements of a head.
        kv_bytes: bytes of an element of the cache.
        columns: queries times heads of a group; at most `MAX_COLUMNS`.
        block_size: tokens a block.
        programs: on a multiprocessor, 1 or 2; see `programs_for`. It is 1 where the registers of
            two would not suffice.
        tokens_a_program: KV tokens of one head that a program has at most, if each has a
            multiprocessor.
        max_kv_length: KV tokens that a sequence has at most.
        shares_paths: whether the batch `shares_paths_unevenly`.

    """
    padded = padded_columns(columns)
    if padded * head_size > MAX_ACCUMULATORS // 2:
        programs = 1
    in_flight, tiles_of_warp = IN_FLIGHT, 1
    if programs == 1 and head_size <= 64:
        in_flight = MORE_IN_FLIGHT
    elif programs == 1 and (head_size, kv_bytes) == (128, 2) and block_size >= 16 and shares_paths:
        in_flight, tiles_of_warp = LESS_IN_FLIGHT, 2
    most = in_flight // programs // WARPS
    tile = MIN_TILE
    while (
        2 * 2 * tile * head_size * kv_bytes * tiles_of_warp <= most
        and tile < (MAX_TILE if block_size == 1 else min(MAX_TILE, MAX_BOXES * block_size))
        and tile * padded < 1024
        and tile * WARPS < min(tokens_a_program, max_kv_length)
    ):
        tile *= 2
    stages = max(1, most // (2 * tile * head_size * kv_bytes)) * WARPS
    return DecodeConfig(padded, tile, min(stages, MAX_STAGES), programs)


def programs_for(
    num_sequences: int,
    num_kv_heads: int,
    num_multiprocessors: int,
    *,
    row_bytes: int,
    tokens_a_program: int,
    is_even: bool,
    ends_fast: bool = True,
) -> int:
    """Return how many programs a multiprocessor is to have, 1 or 2; fitted to batches on an H100.

    Two where rows are many, so that one reads while the other ends a row; one where they are few,
    or where there is little for each, as fewer rows are then cut. Where rows are so short that
    ending them takes most of the time, two pay sooner: if they are of one length, and so not cut,
    as soon as some multiprocessor has two of them. Of longer ones of one length, one takes less
    time if they come out even for one program on each multiprocessor, and not for two.

    Args:
        num_sequences: of the batch.
        num_kv_heads: of each.
        num_multiprocessors: of the GPU.
        row_bytes: K and V of a head of a sequence, at most.
        tokens_a_program: KV tokens of one head that a program has at most, if each has a
            multiprocessor.
        is_even: whether all sequences have as many tokens.
        ends_fast: see `ends_rows_fast`.

    """
    num_rows = num_sequences * num_kv_heads
    if row_bytes <= SHORT_ROW_BYTES and ends_fast:
        return 2 if num_rows > num_multiprocessors and (is_even or num_rows >= MANY_ROWS) else 1
    if num_rows < (MANY_ROWS if tokens_a_program >= LONG_SHARE else VERY_MANY_ROWS):
        return 1

    def come_out_even(programs: int) -> bool:
        heads = heads_in_parallel(num_kv_heads, programs)
        return few_missing(num_rows // heads, programs // heads)

    prefers_one = come_out_even(num_multiprocessors) and not come_out_even(2 * num_multiprocessors)
    return 1 if is_even and prefers_one else 2


def ends_rows_fast(head_size: int, columns: int, block_size: int) -> bool:
    """Return whether two programs on a multiprocessor end short rows sooner than one does.

    They do where registers hold all that both need; measured on an H100.

    Args:
        head_size: elements of a head.
        columns: queries times heads of a group.
        block_size: tokens a block; those of one token take warps that copy.

    """
    return block_size > 1 and padded_columns(columns) * head_size < MAX_ACCUMULATORS // 2


def padded_columns(columns: int) -> int:
    """Return columns of the score tile: queries times heads of a group, padded to 8, 16 or 32."""
    return 8 if columns <= 8 else 16 if columns <= 16 else 32


def ranges_of(num_rows: int, heads: int, num_programs: int, kv_length: int, row_bytes: int) -> int:
    """Return into how many ranges the work is cut, each for `heads` programs, one a multiprocessor.

    As many as there are programs for, where rows are many. Few rows would be cut into more parts
    than are merged at once, or than are loaded at two places at a time, or into parts of few
    tokens. Then fewer programs work, unless reading takes longer for it than merging would: each
    has a path to the L2 alone, and less than half of the programs take all that the memory gives.
    Measured on an H100.

    Args:
        num_rows: sequences times groups of `heads` KV heads.
        heads: that are read side by side.
        num_programs: of the launch, one on each multiprocessor.
        kv_length: tokens that a sequence has at most, or that its window has.
        row_bytes: K and V of a head of them.

    """
    ranges = num_programs // heads
    num_bytes = num_rows * heads * row_bytes
    # parts of a row, the most bytes for that, and the seconds that merging so few saves
    for parts, most_bytes, saved in (
        (MOST_PARTS // 2, FEW_BYTES, 0.5e-6),
        (MOST_PARTS, math.inf, 1e-6),
    ):
        fewer = num_rows * min(parts, max(1, kv_length // LEAST_OF_PART))
        if fewer >= ranges:
            break
        rate = min(fewer * heads * PATH_RATE, READ_RATE)
        if num_bytes <= most_bytes and num_bytes / rate - num_bytes / READ_RATE < saved:
            return fewer
    return ranges


def clusters_of(
    num_rows: int, heads: int, num_programs: int, kv_length: int, row_bytes: int
) -> tuple[int, int]:
    """Return how many programs of a cluster add up a row of one length, and the row's parts.

    Programs of a cluster send each other what they have, which takes less time than merging by way
    of the L2, but not as many of them run at once, and they share paths to it. So what each way
    takes is estimated: reading by the rate that so many programs get together, and merging. A row
    has one cluster; or, where its parts are very many, several, and one step by the L2 is left.
    Rates and times were fitted to batches on an H100.

    Args:
        num_rows: sequences times groups of `heads` KV heads.
        heads: that are read side by side.
        num_programs: of the launch, one on each multiprocessor.
        kv_length: tokens that each sequence has, or that its window has.
        row_bytes: K and V of a head of them.

    Returns:
        Programs of a cluster, and how many parts each row then has; or 1 and 0 for none.

    """
    num_bytes = num_rows * heads * row_bytes
    most = num_programs // heads
    ranges = ranges_of(num_rows, heads, num_programs, kv_length, row_bytes)
    if has_whole_rows(num_rows, heads, most, row_bytes):
        ranges = num_rows
    parts = ranges / num_rows
    merging = next(seconds for limit, seconds in _MERGING if parts <= limit)
    programs = min(ranges * heads, num_programs)
    best = num_bytes / _rate_of(programs, num_programs) + merging - LEAST_GAIN
    found = 1, 0
    for cluster, at_once in CLUSTERS.items():
        several = min(most // num_rows // cluster, at_once // (num_rows * heads), MOST_PARTS)
        for count in (1, several) if cluster == max(CLUSTERS) else (1,):
            if not 0 < count <= several or count * cluster * MIN_TILE > kv_length:
                continue
            programs = count * cluster * num_rows * heads
            reading = num_bytes / _rate_of(programs, num_programs, cluster)
            seconds = reading + (ONE_CLUSTER if count == 1 else SEVERAL_CLUSTERS)
            if seconds < best:
                best, found = seconds, (cluster, count * cluster)
    return found


def _rate_of(programs: int, num_programs: int, cluster: int = 1) -> float:
    """Estimate what so many programs read, in bytes a second: see `clusters_of`."""
    if programs <= (num_programs // 2 if cluster <= 2 else SPREAD_OUT):
        rate = programs * ALONE_RATE / (1 + programs / HALVED_BY)
    else:
        rate = programs * (PAIRED_RATE if cluster == 1 else CLUSTERED_RATE)
    return min(rate, READ_RATE)


def has_whole_rows(num_rows: int, heads: int, ranges: int, row_bytes: int) -> bool:
    """Return whether rows of one length are not cut, as few programs then have less or little.

    As `Division` of decode_work.cuh does it.

    Args:
        num_rows: sequences times groups of `heads` KV heads.
        heads: that are read side by side.
        ranges: there are so many.
        row_bytes: K and V of a head of a sequence.

    """
    missing = -num_rows % ranges
    little = missing <= num_rows and missing * heads * row_bytes <= MERGE_BYTES
    return little or few_missing(num_rows, ranges)


def few_missing(num_rows: int, ranges: int) -> bool:
    """Return whether few rows are missing for all ranges to have as many, if none is cut."""
    return FEW * (-num_rows % ranges) <= num_rows


def producers_of(config: DecodeConfig, *, head_size: int, kv_bytes: int, block_size: int) -> int:
    """Return how many warps of a program bring tiles: one asks the TMA, others copy by threads.

    Two programs on a multiprocessor have half as many of the latter each, unless their registers
    suffice for all.

    Args:
        config: how the kernel is cut.
        head_size: elements of a head.
        kv_bytes: bytes of an element of the cache.
        block_size: tokens a block.

    """
    if block_size > 1:
        return 1
    few_sums = config.columns == 8 and head_size <= 128 and kv_bytes == 2
    return GATHERERS if config.programs == 1 or few_sums else GATHERERS // 2


def macros_of(
    config: DecodeConfig,
    *,
    head_size: int,
    kv_bytes: int,
    group: int,
    bf16: bool,
    block_size: int,
    features: Collection[str] = (),
    out_f32: bool = False,
    among_longer: bool = False,
) -> tuple[tuple[str, int], ...]:
    """Return what decode.cu is specialised for; `features` as in `pagedattn.attention.call`."""
    producers = producers_of(config, head_size=head_size, kv_bytes=kv_bytes, block_size=block_size)
    return (
        ("HEAD_SIZE", head_size),
        ("GROUP", group),
        ("KV_BYTES", kv_bytes),
        ("BF16", int(bf16)),
        ("COLUMNS", config.columns),
        ("BLOCK_SIZE", block_size),
        ("TILE", config.tile),
        ("STAGES", config.stages),
        ("WARPS", WARPS),
        ("PRODUCERS", producers),
        ("PROGRAMS", config.programs),
        ("CLUSTER", config.cluster),
        ("SHARED_BYTES", config.shared_bytes),
        ("CAUSAL", int("not_causal" not in features)),
        ("OUT_F32", int(out_f32)),
        ("AMONG_LONGER", int(among_longer)),
        *((name.upper(), int(name in features)) for name in SWITCHES),
    )


def shares_paths_unevenly(
    num_sequences: int, num_kv_heads: int, num_programs: int, row_bytes: int
) -> bool:
    """Return whether 2 to 4 of 5 pairs of multiprocessors have work for both, the others for one.

    Of sequences of one length, each program that has work a whole row of a head then, and one
    program a multiprocessor; see `Division` of decode_work.cuh, which may do otherwise over heads
    of 64.

    Args:
        num_sequences: of one length.
        num_kv_heads: of each.
        num_programs: of the launch.
        row_bytes: K and V of a head of a sequence.

    """
    heads = heads_in_parallel(num_kv_heads, num_programs)
    ranges, rows = num_programs // heads, num_sequences * num_kv_heads // heads
    both = 2 * rows * heads - num_programs  # multiprocessors of pairs that both have work
    return (
        has_whole_rows(rows, heads, ranges, row_bytes)
        and 2 * num_programs <= 5 * both <= 4 * num_programs
    )


def heads_in_parallel(num_kv_heads: int, num_programs: int) -> int:
    """Return how many programs read the same blocks, each for a KV head.

    As many as divide the heads and leave no more than one program in twenty without work: of 40
    heads 10 where there are 132 programs, 2 of which then have nothing to do.
    """
    return max(
        heads
        for heads in range(1, num_kv_heads + 1)
        if num_kv_heads % heads == 0 and 20 * (num_programs % heads) <= num_programs
    )
