"""How the host cuts the decode kernel: tiles, programs, ranges, and heads side by side."""

import itertools
from functools import partial

import pytest

from pagedattn.attention.cuda import decode_calls, decode_config, decode_division
from pagedattn.attention.cuda.decode_fits import H100, H200

from .divided import described


def name_of(value):
    """Return a fit's name, or what else a case has."""
    return {H100: "H100", H200: "H200"}.get(value, str(value))


EITHER_FIT = pytest.mark.parametrize("fit", [H100, H200], ids=name_of)


def shared_bytes_of(config, head_size, kv_bytes, block_size):
    """Bytes of `Shared` of decode_work.cuh, and 1024 to align it, at most."""
    blocks = max(1, config.tile // block_size)
    producers = decode_config.producers_of(
        config, head_size=head_size, kv_bytes=kv_bytes, block_size=block_size
    )
    return (
        config.stages * 2 * config.tile * head_size * kv_bytes
        + decode_config.WARPS * 8 * (head_size + 4) * 4  # sums
        + 2 * 2 * decode_config.WARPS * config.columns * 4  # peaks and totals
        + producers * max(32, 16 * blocks) * 4  # the block table
        + 24 * (1 if config.programs == 2 else config.columns * head_size // 4 + 32)  # sent
        + decode_config.WARPS * 2 * 36  # cuts
        + config.stages * 2 * 8  # barriers
        + 2 * 1024
    )


@EITHER_FIT
@pytest.mark.parametrize("block_size", [2**i for i in range(9)])
@pytest.mark.parametrize("head_size", decode_calls.HEAD_SIZES)
def test_every_cut_of_every_block_size_is_one_that_the_kernel_takes(head_size, block_size, fit):
    for kv_bytes, columns, programs, tokens_a_program, max_kv_length in itertools.product(
        (1, 2), range(1, 33), (1, 2), (0, 64, 1000, 1 << 30), (1, 100, 1 << 30)
    ):
        if min(block_size, 16) * head_size * kv_bytes % 128:
            continue  # not taken
        if columns * head_size > decode_config.MAX_ACCUMULATORS:
            continue  # not taken
        config = decode_config.choose_config(
            head_size, kv_bytes, columns,
            block_size=block_size, programs=programs,
            tokens_a_program=tokens_a_program, max_kv_length=max_kv_length, fit=fit,
        )  # fmt: skip
        assert columns <= config.columns
        assert config.tile in (16, 32, 64)
        assert config.programs in (1, programs)
        assert 0 < config.stages <= decode_config.MAX_STAGES
        assert config.stages % decode_config.WARPS == 0
        # a lane of the producer has a block, and a tile is not asked for by too many instructions
        assert block_size == 1 or config.tile <= decode_config.MAX_BOXES * block_size
        assert min(config.tile, block_size) * head_size * kv_bytes % 128 == 0 or block_size == 1
        assert shared_bytes_of(config, head_size, kv_bytes, block_size) <= config.shared_bytes


PROGRAMS = {
    "short, of one length": ((8, 40, 128, True), {}, 2),
    "one for each": ((33, 4, 64, True), {}, 1),
    "two for one of them": ((133, 1, 128, True), {}, 2),
    "not that short": ((133, 1, 129, True), {}, 1),
    "short, in blocks of one": ((133, 1, 64, True), {"block_size": 1}, 1),
    "short, of many columns": ((133, 1, 64, True), {"columns": 9}, 1),
    "longer, even for two, of two rows each": ((64, 8, 4000, True), {}, 2),
    "so in blocks of one": ((64, 8, 4000, True), {"block_size": 1}, 2),
    "so, of many columns": ((64, 8, 4000, True), {"columns": 9}, 1),
    "so over heads of 256": ((64, 8, 4000, True), {"head_size": 256}, 1),
    "even for two, of one row each": ((32, 8, 4000, True), {}, 1),
    "even for neither": ((40, 8, 1000, True), {}, 1),
    "even for one program alone": ((24, 16, 1000, True), {}, 1),
    "not even where five heads are read side by side": ((79, 5, 1000, True), {}, 1),
    "even for two where five heads are read side by side": ((104, 5, 1000, True), {}, 2),
    "many of heads of 64": ((396, 1, 300, True), {"head_size": 64}, 2),
    "many long ones of heads of 64": ((396, 1, 4000, True), {"head_size": 64}, 2),
    "not as many": ((395, 1, 4000, True), {"head_size": 64}, 1),
    "short, of several lengths": ((176, 1, 512, False), {}, 2),
    "fewer of them": ((175, 1, 512, False), {}, 1),
    "of several lengths, in blocks of one": ((176, 1, 512, False), {"block_size": 1}, 1),
    "of several lengths, of many columns": ((176, 1, 512, False), {"columns": 9}, 1),
    "longer, of several lengths": ((900, 8, 513, False), {}, 1),
    "fp8, of several lengths": ((176, 1, 1024, False), {"kv_bytes": 1}, 2),
    "long, over fp8, of several lengths": ((396, 1, 1025, False), {"kv_bytes": 1}, 2),
    "fewer long ones over fp8": ((395, 1, 1025, False), {"kv_bytes": 1}, 1),
    "of heads of 64, of several lengths": ((396, 1, 4000, False), {"head_size": 64}, 2),
    "shared, more than multiprocessors": ((133, 1, 300, True), {"is_shared": True}, 2),
    "shared, but fewer": ((132, 1, 300, True), {"is_shared": True}, 1),
    "shared, few long ones": ((64, 1, 2048, True), {"is_shared": True}, 2),
    "shared, fewer long ones": ((63, 1, 2048, True), {"is_shared": True}, 1),
    "shared, a row for one multiprocessor in six": ((22, 1, 9000, True), {"is_shared": True}, 2),
    "shared, a few longer ones": ((21, 1, 9000, True), {"is_shared": True}, 1),
    "shared, few long ones of several lengths": ((64, 1, 2048, False), {"is_shared": True}, 2),
    "shared, even for neither": ((40, 8, 1000, True), {"is_shared": True}, 2),
    "shared, of several lengths": ((40, 8, 1000, False), {"is_shared": True}, 2),
    "shared, of many columns": ((40, 8, 1000, True), {"is_shared": True, "columns": 9}, 1),
    "shared, in blocks of one": ((40, 8, 1000, True), {"is_shared": True, "block_size": 1}, 1),
    "just one for each of two": ((264, 1, 1000, True), {}, 1),
    "short, in blocks of two": ((133, 1, 128, True), {"block_size": 2}, 2),
    "many of heads of 80": ((400, 1, 4000, True), {"head_size": 80}, 1),
    "many over fp8 in blocks of one": ((396, 1, 1025, False), {"kv_bytes": 1, "block_size": 1}, 1),
    "many of heads of 64 in blocks of one": (
        (396, 1, 4000, False),
        {"head_size": 64, "block_size": 1},
        2,
    ),
    "shared and short": ((133, 1, 128, True), {"is_shared": True}, 2),
    "fewer of heads of 64, of several lengths": ((395, 1, 400, False), {"head_size": 64}, 1),
    "long, of several lengths, that leave some idle": ((50, 8, 2048, False), {"fit": H200}, 2),
    "so where that does not matter": ((50, 8, 2048, False), {"fit": H100}, 1),
    "so, but shorter": ((50, 8, 2047, False), {"fit": H200}, 1),
    "so, but fewer": ((49, 8, 2048, False), {"fit": H200}, 1),
    "so, but none idle": ((100, 4, 2048, False), {"fit": H200}, 1),
    "so, but as many idle of two": ((13, 32, 2048, False), {"fit": H200}, 1),
    "so, of more columns": ((50, 8, 2048, False), {"columns": 9, "fit": H200}, 1),
}
"""Sequences, KV heads, tokens of a sequence, whether they are even; what is not as with 8 columns
over 16-bit heads of 128 in blocks of 16 on an H100; programs of each of 132 multiprocessors."""


@pytest.mark.parametrize("case", PROGRAMS)
def test_rows_that_are_many_or_short_take_two_programs_on_a_multiprocessor(case):
    (num_sequences, num_kv_heads, tokens, is_even), changes, expected = PROGRAMS[case]
    kind = {"head_size": 128, "kv_bytes": 2, "columns": 8, "block_size": 16, "fit": H100, **changes}
    row_bytes = tokens * 2 * kind["head_size"] * kind["kv_bytes"]
    programs = decode_config.programs_for(
        num_sequences, num_kv_heads, 132, row_bytes=row_bytes, is_even=is_even, **kind
    )
    assert programs == expected


@EITHER_FIT
@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize("kind", [(64, 2, 4, 16), (128, 2, 4, 16), (128, 1, 4, 16), (96, 2, 12, 1)])
def test_whole_rows_all_have_a_range_and_those_that_come_out_even_have_no_limit(
    kind, programs, fit
):
    rows = decode_division.RowKind.of(*kind, fit=fit)
    for num_rows, heads, per_head, length in itertools.product(
        (*range(1, 70), 131, 132, 133, 500, 4000), (1, 3, 8, 32), (1, 33, 132), (100, 5000)
    ):
        ranges = max(1, per_head * programs // heads)
        whole = decode_division.WholeRows.of(
            num_rows, heads, ranges, 132 * programs, length, rows, programs=programs
        )
        assert whole.of_range * ranges + whole.more >= num_rows
        assert 0 <= whole.more < ranges
        assert whole.most_bytes >= 0
        if num_rows % ranges == 0:
            assert whole.of_range * ranges == num_rows
            assert whole.most_bytes == decode_division.NO_LIMIT


@pytest.mark.parametrize(
    ("fit", "kind", "full_rate", "fewer_cost"),
    [
        (H100, (128, 2, 8, 16), 57, 31),
        (H100, (96, 2, 4, 2), 57, 31),
        (H100, (64, 2, 8, 16), 66, 87),
        (H100, (64, 1, 8, 16), 76, 87),
        (H100, (128, 1, 8, 16), 76, 31),
        (H100, (128, 2, 9, 16), 76, 10),
        (H100, (64, 2, 16, 16), 76, 10),
        (H100, (128, 2, 8, 1), 76, 10),
        (H200, (128, 2, 8, 16), 66, 87),
        (H200, (128, 2, 16, 16), 66, 87),
        (H200, (96, 2, 4, 2), 90, 87),
        (H200, (64, 2, 8, 16), 90, 87),
        (H200, (128, 1, 16, 16), 90, 87),
        (H200, (128, 2, 17, 16), 110, 87),
        (H200, (128, 2, 8, 1), 110, 87),
    ],
    ids=name_of,
)
def test_rows_are_cut_where_what_programs_lose_takes_longer_than_merging(
    fit, kind, full_rate, fewer_cost
):
    rows = decode_division.RowKind.of(*kind, fit=fit)
    # 40 programs read less than the memory gives, 100 as much but for what is lost
    too_few = 1000 * max(0, full_rate - 100)
    for num_rows, cost in ((40, 1000 * (full_rate - 40)), (100, max(100 * fewer_cost, too_few))):
        whole = decode_division.WholeRows.of(num_rows, 1, 132, 132, 100, rows)
        assert (whole.of_range, whole.more) == (1, 0)
        assert whole.most_bytes == 1000 * fit.merge_bytes // cost


@pytest.mark.parametrize(
    ("kind", "full_rate"), [((128, 2, 8, 16), 71), ((64, 2, 8, 16), 71), ((128, 1, 8, 16), 76)]
)
def test_more_programs_read_all_that_the_l2_gives(kind, full_rate):
    shared = decode_division.RowKind.of(*kind, is_shared=True, fit=H100)
    assert shared.full_rate == full_rate
    assert shared.fewer_cost == decode_division.RowKind.of(*kind, fit=H100).fewer_cost
    assert not shared.halves


def test_rows_of_1024_tokens_and_512_kib_may_stay_whole():
    assert decode_division.keeps_whole(1024, 512 << 10)
    assert not decode_division.keeps_whole(1025, 256 << 10)
    assert not decode_division.keeps_whole(512, (512 << 10) + 1)


@pytest.mark.parametrize(
    ("fit", "kind", "programs", "tile", "stages"),
    [
        (H100, (64, 2, 4), 1, 64, 12),
        (H100, (64, 2, 4), 2, 64, 4),
        (H100, (80, 2, 4), 1, 64, 4),
        (H100, (128, 2, 4), 1, 64, 4),
        (H200, (64, 2, 4), 1, 64, 12),
        (H200, (80, 2, 4), 1, 64, 8),
        (H200, (80, 2, 4), 2, 32, 4),
        (H200, (96, 2, 4), 1, 64, 4),
        (H200, (128, 2, 4), 1, 32, 8),
        (H200, (128, 2, 9), 1, 64, 4),
        (H200, (128, 1, 4), 1, 64, 8),
    ],
    ids=name_of,
)
def test_more_is_in_flight_over_small_heads_where_a_multiprocessor_has_one_program(
    fit, kind, programs, tile, stages
):
    config = decode_config.choose_config(*kind, programs=programs, fit=fit)
    assert (config.tile, config.stages, config.programs) == (tile, stages, programs)


def test_less_is_in_flight_where_paths_are_shared_unevenly_on_an_h100_alone():
    for fit, expected in ((H100, (16, 8)), (H200, (32, 8))):
        config = decode_config.choose_config(128, 2, 4, shares_paths=True, fit=fit)
        assert (config.tile, config.stages) == expected


@pytest.mark.parametrize(
    ("columns", "head_size", "kv_bytes", "programs", "copying"),
    [
        (4, 128, 2, 2, 4),
        (16, 128, 2, 2, 2),  # whose sums need more registers, as the following
        (4, 192, 2, 2, 2),
        (4, 128, 1, 2, 2),
        (16, 128, 2, 1, 4),
    ],
)
def test_warps_that_copy_blocks_of_one_leave_registers_to_those_that_multiply(
    columns, head_size, kv_bytes, programs, copying
):
    config = decode_config.choose_config(
        head_size, kv_bytes, columns, block_size=1, programs=programs, fit=H100
    )
    assert config.programs == programs
    for block_size, expected in ((1, copying), (2, 1), (16, 1)):
        assert expected == decode_config.producers_of(
            config, head_size=head_size, kv_bytes=kv_bytes, block_size=block_size
        )


def test_less_is_in_flight_over_heads_of_128_where_some_multiprocessors_share_a_path():
    choose = partial(decode_config.choose_config, 128, 2, 4, max_kv_length=2048, fit=H100)
    assert choose(shares_paths=True) == decode_config.DecodeConfig(8, 16, 8, 1)
    assert choose(shares_paths=False) == decode_config.DecodeConfig(8, 64, 4, 1)
    assert choose(shares_paths=True, block_size=1) == choose(block_size=1)
    many = partial(choose, programs=2)
    assert many(shares_paths=True) == many()
    for head_size, kv_bytes in ((64, 2), (96, 2), (256, 2), (128, 1), (256, 1)):
        other = partial(decode_config.choose_config, head_size, kv_bytes, 4, fit=H100)
        assert other(shares_paths=True) == other()


@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 5, 8, 12, 40])
@pytest.mark.parametrize("num_programs", [114, 132, 264])
def test_heads_go_to_neighbouring_programs_where_few_are_left_without_work(
    num_kv_heads, num_programs
):
    parallel = decode_division.heads_in_parallel(num_kv_heads, num_programs)
    assert num_kv_heads % parallel == 0
    assert num_programs % parallel <= num_programs / 20


@pytest.mark.parametrize(
    ("num_kv_heads", "num_programs", "parallel"),
    [(8, 132, 8), (3, 132, 3), (12, 132, 12), (40, 132, 10), (40, 264, 20), (52, 132, 26)],
)
def test_as_many_heads_as_possible_are_read_side_by_side(num_kv_heads, num_programs, parallel):
    assert decode_division.heads_in_parallel(num_kv_heads, num_programs) == parallel


def ranges_of(num_sequences, num_kv_heads, kv_length, num_programs=132, fit=H100):
    heads = decode_division.heads_in_parallel(num_kv_heads, num_programs)
    rows = num_sequences * num_kv_heads // heads
    row_bytes = 2 * kv_length * 128 * 2
    sizes = rows, heads, num_programs, kv_length, row_bytes
    return decode_division.ranges_of(*sizes, fit), rows, heads


@EITHER_FIT
@pytest.mark.parametrize("num_programs", [114, 132])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 4, 5, 8, 40])
@pytest.mark.parametrize("num_sequences", [1, 2, 3, 7, 200])
def test_few_rows_are_cut_into_no_more_parts_than_are_merged_at_once_nor_into_tiny_ones(
    num_sequences, num_kv_heads, num_programs, fit
):
    for kv_length in (1, 95, 300, 1000, 5000, 40_000, 10**6):
        ranges, rows, heads = ranges_of(num_sequences, num_kv_heads, kv_length, num_programs, fit)
        all_ranges = num_programs // heads
        assert 1 <= ranges <= all_ranges
        if ranges == all_ranges:
            continue
        assert ranges <= decode_division.MOST_PARTS * rows
        assert ranges == rows or kv_length * rows >= decode_division.LEAST_OF_PART * ranges
        # who works must not take much longer to read
        paths = ranges * heads * decode_division.PATH_RATE
        slower = rows * heads * 512 * kv_length / paths
        assert paths >= fit.read_rate or slower < 4e-6


@pytest.mark.parametrize(
    ("num_sequences", "num_kv_heads", "kv_length", "ranges"),
    [
        *((1, 8, 128, 1), (1, 8, 1024, 10), (1, 8, 8192, 16), (1, 4, 4096, 20), (2, 4, 8192, 33)),
        *((1, 1, 4096, 20), (1, 1, 131_072, 132), (64, 8, 64, 16)),
    ],
)
def test_few_rows_have_these_ranges_and_many_have_all(
    num_sequences, num_kv_heads, kv_length, ranges
):
    assert ranges_of(num_sequences, num_kv_heads, kv_length)[0] == ranges


def aligns(num_sequences, longest, heads, head_size=128, *, ranges=None, **options):
    """Whether a call's rows may begin with a range, by 132 programs."""
    parallel = decode_division.heads_in_parallel(heads[1], 132)
    call = described(num_sequences, longest, heads, head_size, **options)
    return decode_calls.aligns(call, parallel, ranges or 132 // parallel)


@pytest.mark.parametrize(
    ("case", "options", "expected"),
    [
        ((16, 12_000, (8, 1)), {}, True),
        ((16, 12_000, (8, 1)), {"is_full": True}, False),
        ((66, 4000, (8, 1)), {}, True),
        ((129, 1000, (8, 1)), {"ranges": 264}, False),  # more sequences than a warp looks at
        ((100, 2500, (8, 1)), {}, False),
        ((100, 2000, (8, 1)), {}, True),
        ((132, 100, (16, 1)), {}, False),  # as many rows as ranges
        ((64, 16_000, (8, 1)), {}, False),  # whose last ranges would be large, and empty,
        ((64, 16_000, (8, 1)), {"mean": 0.05}, True),  # which they are not then,
        ((64, 16_000, (8, 1)), {"window": 4000}, True),
        ((64, 14_000, (16, 1)), {}, True),  # or which takes less than to end two rows
        ((64, 24_000, (16, 1)), {"head_size": 64}, False),
        ((12, 13_000, (28, 4)), {}, True),
        ((4, 4000, (32, 8)), {}, True),
        ((3, 4000, (32, 8)), {}, False),  # of 16 ranges
        ((3, 4000, (96, 8)), {}, True),
        ((3, 4000, (32, 8)), {"ranges": 32}, True),
        ((0, 0, (8, 1)), {}, True),
    ],
)
def test_rows_may_begin_with_a_range_where_little_of_it_is_left_empty(case, options, expected):
    assert aligns(*case, **options) == expected


def cutting_of(head_size=128, kv_bytes=2, columns=8, tile=32, block_size=16):
    config = decode_config.DecodeConfig(columns, tile, 8)
    return decode_config.Cutting.of(
        config, head_size=head_size, kv_bytes=kv_bytes, block_size=block_size
    )


def test_a_row_may_be_longer_where_cutting_takes_longer_or_reading_takes_less():
    usual = cutting_of()
    # 6.1 and 3.4 µs, of 7.9 ns each
    assert (usual.anywhere, usual.aligned) == (766, 433)
    assert usual.of_rows(3) == pytest.approx(sum((766, 433)) / 2, abs=1)
    assert usual.of_rows(4) == 766
    assert cutting_of(columns=16, tile=64).anywhere > usual.anywhere  # more to end and to merge
    assert cutting_of(tile=64).anywhere > usual.anywhere > cutting_of(tile=16).anywhere
    assert cutting_of(head_size=256).anywhere < 2 * usual.anywhere
    assert cutting_of(kv_bytes=1).aligned < usual.aligned
    assert cutting_of(block_size=1).anywhere < usual.anywhere  # which takes longer to come
