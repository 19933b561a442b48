"""How the decode kernel is cut: tiles, stages, and programs on a multiprocessor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from pagedattn.attention.cuda.decode_division import (
    MIN_TILE,
    WholeRows,
    few_missing,
    heads_in_parallel,
)

if TYPE_CHECKING:
    from collections.abc import Collection

    from pagedattn.attention.cuda.decode_fits import Fit

WARPS = 4  # of a program, that multiply
IN_FLIGHT = 131_072  # bytes of K and V that a multiprocessor has on their way
MORE_IN_FLIGHT = 196_608  # the same over small heads, for one program
LESS_IN_FLIGHT = 65_536  # the same over heads of 128 where `shares_paths_unevenly`
MAX_TILE = 64  # tokens
MAX_STAGES = 16
MANY_ROWS = 3  # for each multiprocessor
SHORT_ROW_BYTES = 64 << 10  # K and V of a head, where all sequences have as many tokens,
SHORT_RAGGED_BYTES = 256 << 10  # and of the longest, where they have not
LONG_RAGGED_BYTES = 1 << 20  # of the longest, from which on all multiprocessors are needed
MUCH_SHARED_BYTES = 64 << 20  # K and V of all sequences, of which most come from the L2
FEW_SHARED_ROWS = 6  # there are, if not one row for so many multiprocessors
GATHERERS = 4  # warps that copy by threads, over blocks of one token
MAX_BOXES = 16  # blocks of a tile that the TMA brings, an instruction each
SHARED_BYTES = 232_448  # of a multiprocessor, for one program
SWITCHES = ("window", "soft_cap", "alibi", "sinks", "lse")
MAX_COLUMNS = 32
MAX_ACCUMULATORS = 4096  # of a row: columns times head size
ROW_RATE = 70e9  # bytes a second of K and V that a program takes, at most
TOKEN_SECONDS = 2e-9  # that it takes for a KV token of a head, at least,
TILE_SECONDS = 190e-9  # besides these for each tile,
FP8_TOKEN_SECONDS = 0.7e-9  # and these over fp8,
WIDE_COST = 1.45  # times as many for more than 16 columns,
GATHERED_SECONDS = 13.4e-9  # or these over blocks of one token
CUT_SECONDS = 2.4e-6  # that cutting rows takes, at least,
CUT_SUM_SECONDS = 3.6e-9  # and for each element of a row's result;
ALIGNED_SECONDS = 1.8e-6  # where each row begins with a range, at least,
ALIGNED_SUM_SECONDS = 1.6e-9  # and for each element,
FP8_ALIGNED_LESS = 1e-6  # less over fp8
FEW_CUT = 3  # rows, of which at most so many are few: LEAST_CUT of decode_shape.cuh


@dataclass(frozen=True)
class DecodeConfig:
    """How the kernel is cut and compiled.

    Attributes:
        columns: queries times heads of a group, padded to 8, 16 or 32.
        tile: KV tokens that a warp takes at once.
        stages: tiles in shared memory; a multiple of `WARPS`.
        programs: on a multiprocessor, 1 or 2.
        cluster: programs that add up a row in each other's shared memory; 1 for none.
        keeps_whole: cut no row of several lengths, if by those of now that takes less time; see
            `Cutting`.
        never_cuts: none, however much longer one is.
        clusters_of_row: clusters that a row has; None is as many as there are programs for.
        whole: up to which size rows of one length are not cut, and how they are divided; None
            estimates.
        aligns: have each of few rows of several lengths begin with a range, if by the lengths of
            now ranges are not much larger for it; see `decode_calls.aligns`.

    """

    columns: int
    tile: int
    stages: int
    programs: int = 1
    cluster: int = 1
    keeps_whole: bool = False
    never_cuts: bool = False
    clusters_of_row: int | None = None
    whole: WholeRows | None = None
    aligns: bool = False

    @cached_property
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
    fit: Fit,
) -> DecodeConfig:
    """Pick how to cut, from bounds that the host knows; measured on an H100 and an H200.

    128 KiB in flight keep the memory busy, and more helps only over small heads, with one program
    on a multiprocessor. Where some multiprocessors share a path to the L2 and others do not, half
    of it, over 16-bit heads of 128 in blocks of 16 or more, leaves more of the memory to the first,
    with which a launch ends, if the fit says so. Where a program or a row has little, tiles are
    small enough for each warp to have one, and over small blocks for few instructions.

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
        fit: of the GPU.

    """
    padded = padded_columns(columns)
    if padded * head_size > MAX_ACCUMULATORS // 2:
        programs = 1
    in_flight, tiles_of_warp, most_tokens = IN_FLIGHT, 1, MAX_TILE
    if programs == 1 and head_size <= fit.more_in_flight_to:
        in_flight = MORE_IN_FLIGHT
    elif programs == 1 and (head_size, kv_bytes) == (128, 2) and block_size >= 16:
        if shares_paths and fit.spares_paths:
            in_flight, tiles_of_warp = LESS_IN_FLIGHT, 2
        if padded == 8:
            most_tokens = fit.tile_of_128
    most = in_flight // programs // WARPS
    tile = MIN_TILE
    while (
        2 * 2 * tile * head_size * kv_bytes * tiles_of_warp <= most
        and tile < (most_tokens if block_size == 1 else min(most_tokens, MAX_BOXES * block_size))
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
    is_even: bool,
    head_size: int,
    kv_bytes: int,
    columns: int,
    block_size: int,
    is_shared: bool = False,
    fit: Fit,
) -> int:
    """Return how many programs a multiprocessor is to have, 1 or 2; fitted to batches on an H100.

    Two where rows are many or short, so that one reads while the other ends a row; one where they
    are few, as fewer rows are then cut, or where registers would not hold what both need. Two pay
    over short rows as soon as some multiprocessors have two of them; over other rows of heads of 64
    where they are many, whatever the registers; over those of fp8 too, if lengths differ; over
    other rows of one length where each program has two or more, and rows come out even for them.
    Two were fitted to batches on an H200 where much comes from the L2, which is read faster by them
    if rows are more than multiprocessors, or not few and much together; and for many long rows of
    several lengths, if they leave less of the multiprocessors without work: of 132, one program
    each leaves four where eight heads are read side by side, and two leave none.

    Args:
        num_sequences: of the batch.
        num_kv_heads: of each.
        num_multiprocessors: of the GPU.
        row_bytes: K and V of a head of a sequence, at most.
        is_even: whether all sequences have as many tokens.
        head_size: elements of a head.
        kv_bytes: bytes of an element of the cache.
        columns: queries times heads of a group.
        block_size: tokens a block; those of one token take warps that copy.
        is_shared: whether half of K and V or more come from the L2.
        fit: of the GPU.

    """
    num_rows = num_sequences * num_kv_heads
    is_narrow = head_size <= 64
    have_registers = padded_columns(columns) * head_size < MAX_ACCUMULATORS // 2
    end_fast = have_registers and block_size > 1
    are_many = num_rows >= MANY_ROWS * num_multiprocessors
    if is_even and row_bytes <= SHORT_ROW_BYTES and end_fast:
        return 2 if num_rows > num_multiprocessors else 1
    if is_shared and end_fast:
        is_much = num_rows * row_bytes >= MUCH_SHARED_BYTES
        are_few = FEW_SHARED_ROWS * num_rows < num_multiprocessors
        return 2 if num_rows > num_multiprocessors or (is_much and not are_few) else 1
    if is_even:
        if is_narrow:
            return 2 if are_many else 1
        heads = heads_in_parallel(num_kv_heads, 2 * num_multiprocessors)
        rows, ranges = num_rows // heads, 2 * num_multiprocessors // heads
        return 2 if have_registers and rows > ranges and few_missing(rows, ranges) else 1
    if is_narrow:
        return 2 if are_many else 1
    if row_bytes <= SHORT_RAGGED_BYTES:
        return 2 if end_fast and 3 * num_rows >= 4 * num_multiprocessors else 1
    idle, idle_of_two = (
        programs % heads_in_parallel(num_kv_heads, programs)
        for programs in (num_multiprocessors, 2 * num_multiprocessors)
    )
    fills = fit.needs_all and idle_of_two < 2 * idle and row_bytes >= LONG_RAGGED_BYTES
    return 2 if end_fast and are_many and (kv_bytes == 1 or fills) else 1


@dataclass(frozen=True)
class Cutting:
    """What cutting rows of several lengths takes, in KV tokens that a program reads meanwhile.

    If rows stay whole, the program of the longest reads on when the others, of which each has a
    multiprocessor's share, would have ended. If each begins with a range, ranges are larger than
    that share. So whichever way is done first can be told in tokens. What cutting takes was fitted
    to batches of up to as many rows as ranges on an H200.

    Attributes:
        anywhere: rows are cut where ranges end: some programs have two to end and to merge.
        aligned: each row begins with a range, so that none has.

    """

    anywhere: int
    aligned: int

    @classmethod
    def of(cls, config: DecodeConfig, *, head_size: int, kv_bytes: int, block_size: int) -> Cutting:
        """Estimate it.

        Args:
            config: how the kernel is cut.
            head_size: elements of a head.
            kv_bytes: bytes of an element of the cache.
            block_size: tokens a block; those of one token take longer to ask for.

        """
        is_fp8 = kv_bytes == 1
        by_products = TOKEN_SECONDS + TILE_SECONDS / config.tile + is_fp8 * FP8_TOKEN_SECONDS
        token = max(2 * head_size * kv_bytes / ROW_RATE, by_products)
        if config.columns > MAX_COLUMNS // 2:
            token *= WIDE_COST
        if block_size == 1:
            token = GATHERED_SECONDS
        sums = config.columns * head_size
        anywhere = CUT_SECONDS + sums * CUT_SUM_SECONDS
        aligned = ALIGNED_SECONDS + sums * ALIGNED_SUM_SECONDS - is_fp8 * FP8_ALIGNED_LESS
        return cls(int(anywhere / token), int(aligned / token))

    def of_rows(self, rows: int) -> float:
        """Return what cutting so many rows anywhere takes, in tokens.

        Less than `anywhere` for few, as a program or two at most have two of them to end.
        """
        return (self.anywhere + self.aligned) / 2 if rows <= FEW_CUT else self.anywhere


def padded_columns(columns: int) -> int:
    """Return columns of the score tile: queries times heads of a group, padded to 8, 16 or 32."""
    return 8 if columns <= 8 else 16 if columns <= 16 else 32


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
    lines: bool = False,
    features: Collection[str] = (),
    out_f32: bool = False,
    among_longer: bool = False,
) -> tuple[tuple[str, int], ...]:
    """Return what decode.cu is specialised for.

    `lines` tells that the TMA counts lines of 128 bytes and not tokens of a block; `features` are
    as in `pagedattn.attention.call`.
    """
    of_cache = {"head_size": head_size, "kv_bytes": kv_bytes, "block_size": block_size}
    producers = producers_of(config, **of_cache)
    cutting = Cutting(0, 0)
    if config.keeps_whole:
        cutting = Cutting.of(config, **of_cache)
    return (
        ("HEAD_SIZE", head_size),
        ("GROUP", group),
        ("KV_BYTES", kv_bytes),
        ("BF16", int(bf16)),
        ("COLUMNS", config.columns),
        ("BLOCK_SIZE", block_size),
        ("LINES", int(lines)),
        ("TILE", config.tile),
        ("STAGES", config.stages),
        ("WARPS", WARPS),
        ("PRODUCERS", producers),
        ("PROGRAMS", config.programs),
        ("CLUSTER", config.cluster),
        ("WHOLE", int(config.keeps_whole)),
        ("NEVER_CUTS", int(config.never_cuts)),
        ("CUT_TOKENS", cutting.anywhere),
        ("ALIGNED_TOKENS", cutting.aligned),
        ("ALIGNED", int(config.aligns)),
        ("SHARED_BYTES", config.shared_bytes),
        ("CAUSAL", int("not_causal" not in features)),
        ("OUT_F32", int(out_f32)),
        ("AMONG_LONGER", int(among_longer)),
        *((name.upper(), int(name in features)) for name in SWITCHES),
    )
