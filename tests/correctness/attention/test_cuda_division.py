"""How decode divides a batch between programs, as its own source does it on the host.

Lengths here are whole tiles, in which the division counts.
"""

import itertools

import numpy as np
import pytest

pytest.importorskip("triton")

from pagedattn.attention.cuda import decode_calls, decode_division
from pagedattn.testing.emulator import unavailable

from .divided import HEAD_SIZE, TILE, config_of, described, divide, most_tokens, share_out

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"emulation: {unavailable()}")

TILE_BYTES = 2 * TILE * HEAD_SIZE * 2  # of K and V
MERGING = 6_100_000 // TILE_BYTES  # tiles that are read in the time that it takes
UNREAD = (64 << 20) // TILE_BYTES  # that those without work may leave, of two a multiprocessor
HALVED = 57  # tiles of a row, 900 tokens, for which half of the programs may be better than all
FULL_RATE, FEWER_COST, HALF_COST = 66, 0.087, 0.031  # over 16-bit heads of 64
GUESSED = 4  # tiles at most
FEW = 16  # one in so many is left without work, or less

on_each = pytest.mark.parametrize("on_each", [1, 2], ids="{} a multiprocessor".format)


def batches(on_each, *, even):
    """Divide batches of all sizes."""
    rng = np.random.default_rng(on_each)
    for _ in range(100):
        num_multiprocessors = int(rng.choice([1, 2, 3, 7, 12, 21, 44, 66, 100, 132]))
        num_kv_heads = int(rng.choice([1, 2, 3, 8, 40]))
        num_sequences = int(2 ** rng.uniform(0, 8))
        most = int(2 ** rng.uniform(0, min(10, 16 - np.log2(num_sequences * num_kv_heads))))
        tiles = np.full(num_sequences, most)
        if not even:
            tiles[:-1] = rng.integers(0, most + 1, num_sequences - 1)
        yield (
            num_multiprocessors,
            divide(rng.permutation(tiles), num_kv_heads, num_multiprocessors, on_each),
        )


@on_each
@pytest.mark.parametrize("even", [True, False], ids=["even", "ragged"])
def test_ranges_follow_one_another_and_each_tile_has_its_range(on_each, even):
    for _, divided in batches(on_each, even=even):
        begins, total = divided.begins, len(divided.range_of)
        assert begins[0] == 0
        assert begins[-1] == total
        assert (divided.sizes >= 0).all()
        expected = np.searchsorted(begins, np.arange(total), side="right") - 1
        assert np.array_equal(divided.range_of, expected)


def cost(num_multiprocessors, programs, each, tiles):
    """Tiles that all programs would read while so many take longer for theirs."""
    lost = tiles * FEWER_COST if programs < 15 / 16 * num_multiprocessors else 0
    return max(lost, each * FULL_RATE - tiles)


@on_each
def test_rows_of_one_length_stay_whole_or_are_cut_evenly(on_each):
    kinds = set()
    for num_multiprocessors, divided in batches(on_each, even=True):
        rows, row, sizes = divided.rows, divided.row, divided.sizes
        heads, ranges = divided.parallel_heads, len(sizes)
        with_work = sizes[sizes > 0]
        is_whole = not (divided.begins % row).any()
        least, more = -(-rows // ranges), rows % ranges
        half = ranges // 2
        by_half = -(-rows // half) if half else 0
        ways = {
            "all as many": np.diff(np.minimum(least * np.arange(ranges + 1), rows)),
            "one more": rows // ranges + (np.arange(ranges) < more),
            "half": np.diff(np.minimum(by_half * np.arange(ranges + 1), rows)),
        }
        if on_each == 2:
            missing = -rows % ranges
            few = missing * FEW <= rows
            assert is_whole == (few or (missing <= rows and missing * row * heads <= UNREAD)), (
                divided
            )
            expected = "one more"
        else:
            every = rows * row * heads
            costs = {
                "all as many": cost(
                    num_multiprocessors, -(-rows // least) * heads, least * row, every
                ),
                "one more": cost(num_multiprocessors, more * heads, row, more * row * heads),
            }
            if more == 0:
                costs["one more"] = 0
            if row >= HALVED and least < by_half and (by_half * half - rows) * FEW <= rows:
                costs["half"] = every * HALF_COST
            expected = min(costs, key=costs.get)
            if abs(costs[expected] - MERGING) > 2:  # else it depends on how costs are rounded
                assert is_whole == (costs[expected] < MERGING), (divided, costs)
            if sorted(costs.values())[1] - costs[expected] < 2:
                expected = None
        if is_whole:
            of_range = sizes // row
            found = [kind for kind, way in ways.items() if np.array_equal(of_range, way)]
            assert found
            assert expected is None or expected in found, (divided, found)
            kinds.add(expected or found[0])
            continue
        assert with_work.max() - with_work.min() <= 1
        first, last = divided.begins[:-1][sizes > 0], divided.begins[1:][sizes > 0] - 1
        ranges = min(ranges, rows * row)  # with a tile each
        if rows > 1 and (first // row == last // row).all():
            kinds.add("each row by itself")
            assert (ranges - len(with_work)) * FEW <= ranges
        else:
            kinds.add("all")
            assert len(with_work) == ranges
    only_one = {"half", "all as many"} if on_each == 1 else set()
    assert kinds == {"one more", "each row by itself", "all"} | only_one


@on_each
def test_a_right_guess_is_what_a_program_begins_with(on_each):
    for _, divided in batches(on_each, even=True):
        begins = divided.begins[:-1][divided.sizes > 0]
        of_row = divided.row - begins % divided.row
        first = np.minimum(np.minimum(divided.sizes[divided.sizes > 0], of_row), GUESSED)
        assert np.array_equal(divided.guessed, np.repeat(first, divided.parallel_heads))


@pytest.mark.parametrize("cluster", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("num_kv_heads", [1, 3])
def test_a_cluster_has_one_row_of_those_of_one_length(num_kv_heads, cluster):
    for num_sequences, row in itertools.product((1, 2, 3), (1, cluster, 29, 300)):
        divided = divide([row] * num_sequences, num_kv_heads, 80, cluster=cluster)
        sizes = divided.sizes
        assert len(sizes) % (cluster * divided.rows) == 0
        of_row = len(sizes) // divided.rows
        if row < of_row:  # some would have nothing
            assert sizes.sum() == row * divided.rows
            continue
        assert np.array_equal(divided.begins[::of_row], row * np.arange(divided.rows + 1))
        assert sizes.max() - sizes.min() <= 1
        first = np.minimum(sizes, GUESSED)
        assert np.array_equal(divided.guessed, np.repeat(first, divided.parallel_heads))


CUT = {
    "each row by itself": (5, 63, 20, 1, [16, 16, 16, 15] * 5),
    "and one without work": (5, 63, 21, 1, [16, 16, 16, 15] * 5 + [0]),
    "too many without work": (5, 63, 24, 1, [14] * 3 + [13] * 21),
    "one row": (1, 63, 20, 1, [4] * 3 + [3] * 17),
    "as few as can have all, nearly all": (125, 400, 132, 1, [400] * 125 + [0] * 7),
    "one each, as merging takes longer": (100, 171, 132, 1, [171] * 100 + [0] * 32),
    "merging takes less time": (100, 172, 132, 1, [131] * 40 + [130] * 92),
    "two each for few": (160, 40, 132, 1, [80] * 80 + [0] * 52),
    "one more for some": (212, 40, 132, 1, [80] * 80 + [40] * 52),
    "by half of the programs": (192, 57, 132, 1, [171] * 64 + [0] * 68),
    "rows too short for half": (192, 56, 132, 1, [112] * 60 + [56] * 72),
    "not by half, which would be uneven": (184, 60, 132, 1, [120] * 52 + [60] * 80),
    "one more for few of two a multiprocessor": (15, 1, 6, 2, [2] * 3 + [1] * 9),
    "one for some of two a multiprocessor": (9, 5, 6, 2, [5] * 9 + [0] * 3),
    "two a multiprocessor, which may leave 64 MiB": (66, 248, 66, 2, [248] * 66 + [0] * 66),
    "and no more": (66, 249, 66, 2, [125, 124] * 66),
}
"""Rows, their tiles, multiprocessors, programs on each, and the tiles of each range."""


@pytest.mark.parametrize("case", CUT)
def test_what_is_cut_where(case):
    rows, row, num_multiprocessors, on_each, sizes = CUT[case]
    assert divide([row] * rows, 1, num_multiprocessors, on_each).sizes.tolist() == sizes


ONE_MORE, FEWER = [114] * 60 + [57] * 72, [114] * 96 + [0] * 36


@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        ({}, [171] * 64 + [0] * 68),
        ({"head_size": 128}, ONE_MORE),
        ({"kv_bytes": 1}, ONE_MORE),
        ({"columns": 32}, FEWER),
        ({"head_size": 128, "columns": 16}, FEWER),
        ({"head_size": 128, "columns": 32}, FEWER),
        ({"head_size": 128, "kv_bytes": 1}, FEWER),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_whole_rows_that_come_out_uneven_are_shared_out_by_what_a_program_takes(case, sizes):
    assert divide([57] * 192, 1, 132, **case).sizes.tolist() == sizes


def test_rows_are_long_by_their_tokens_and_not_by_tiles_that_are_not_full():
    by_half = [171] * 64 + [0] * 68
    assert divide([57] * 192, 1, 132, last_tokens=4).sizes.tolist() == by_half
    assert divide([57] * 192, 1, 132, last_tokens=3).sizes.tolist() == ONE_MORE


def test_the_host_knows_where_2_to_4_of_5_pairs_of_multiprocessors_have_a_row_each():
    seen = set()
    for num_multiprocessors in (3, 8, 21, 44, 66):
        for num_sequences, num_kv_heads, row in itertools.product(
            range(1, 50), (1, 2, 8), (3, 40, 1100)
        ):
            if num_sequences * num_kv_heads > 1.2 * num_multiprocessors:
                continue
            divided = divide(
                [row] * num_sequences, num_kv_heads, num_multiprocessors, head_size=128
            )
            sizes = divided.sizes
            with_work = divided.parallel_heads * (sizes > 0).sum()
            share = (2 * with_work - num_multiprocessors) / num_multiprocessors
            expected = set(sizes) <= {0, row} and 0.4 <= share <= 0.8
            assert divided.shares_paths == expected, (num_multiprocessors, num_sequences, row)
            seen.add((row, expected))
    assert {(3, True), (3, False), (40, True), (40, False), (1100, False)} <= seen


LONGEST = 32  # tiles of a row of 512 KiB, of heads of 256
MODEST = 16  # tiles of a row that is whole, whatever the others have
ROW_END = 2  # tiles that come while a row ends, rounded up


@on_each
def test_short_rows_are_each_one_programs_and_shared_out_by_what_they_take(on_each):
    rng = np.random.default_rng(on_each)
    many = few = 0
    for _ in range(100):
        num_multiprocessors = int(rng.choice([1, 2, 3, 7, 12, 24, 44]))
        num_kv_heads = int(rng.choice([1, 2, 3, 8]))
        tiles = rng.integers(0, MODEST + 1, int(2 ** rng.uniform(0, 7)))
        tiles[0] = max(1, tiles[0])
        of_program, parts = share_out(tiles, num_kv_heads, num_multiprocessors, on_each)
        assert np.array_equal(parts, np.repeat((tiles > 0)[:, None], num_kv_heads, axis=1))
        assert of_program.sum() == tiles.sum() * num_kv_heads
        # rows that begin in a range are its own, so the last one may reach beyond
        num_programs = num_multiprocessors * on_each
        parallel = decode_division.heads_in_parallel(num_kv_heads, num_programs)
        groups, ranges = num_kv_heads // parallel, num_programs // parallel
        share = -(-int(np.where(tiles > 0, tiles + ROW_END, 0).sum()) * groups // ranges)
        assert of_program.max() <= share + MODEST
        if (tiles > 0).sum() * groups <= ranges // on_each:
            assert of_program.max() == tiles.max()
            few += 1
        else:
            many += 1
    assert few > 20
    assert many > 20


@on_each
def test_as_many_rows_as_multiprocessors_have_one_each_whatever_their_lengths(on_each):
    for tiles in ([1] * 11 + [16], [16] * 11 + [1], range(3, 15)):
        of_program, _ = share_out(tiles, 1, 12, on_each)
        # the first half of the programs are on different multiprocessors
        assert sorted(of_program[:12]) == sorted(tiles)


@pytest.mark.parametrize("others", [[], [1] * 2, [1] * 5, [20] * 5, [40] * 4], ids=str)
@pytest.mark.parametrize("head_size", [64, 256])
@on_each
def test_few_rows_are_cut_where_one_takes_longer_than_cutting_them_would(
    others, head_size, on_each
):
    cut = set()
    for longest in range(max([9, *others]) + 1, 120):
        tiles = [*others, longest]
        _, parts = share_out(tiles, 1, 6, on_each, head_size=head_size)
        is_cut = longest * TILE > most_tokens(tiles, 6, head_size=head_size)
        assert (parts.max() > 1) == is_cut, tiles
        cut.add(is_cut)
    assert cut == {False, True}


@on_each
def test_as_many_rows_as_multiprocessors_that_are_nearly_alike_stay_whole_however_long(on_each):
    _, parts = share_out([5000, 4990, 5000, 4980, 4999, 4970], 1, 6, on_each)
    assert parts.max() == 1


@on_each
def test_more_rows_than_multiprocessors_are_cut_where_one_is_long(on_each):
    for longest, is_cut in ((LONGEST, False), (LONGEST + 1, True)):
        _, parts = share_out([longest] * 11 + [longest - 9], 1, 6, on_each)
        assert (parts.max() > 1) == is_cut


def test_rows_of_narrow_heads_stay_whole_up_to_1024_tokens():
    for tiles, is_cut in ((1024 // TILE, False), (1024 // TILE + 1, True)):
        _, parts = share_out([tiles] * 6 + [1], 1, 6, head_size=64)
        assert (parts.max() > 1) == is_cut


@pytest.mark.parametrize("head_size", [64, 256])
@on_each
def test_short_rows_of_one_length_leave_one_more_to_the_first_programs(on_each, head_size):
    for rows, tiles in itertools.product((1, 5, 6, 7, 9, 11, 13, 40), (1, 20, 32, 60)):
        is_long = tiles * TILE * 4 * head_size > 512 << 10
        is_cut = tiles * TILE > most_tokens([tiles] * rows, 6, head_size=head_size)
        if is_cut or (is_long and rows > 6):
            continue
        of_program, _ = share_out([tiles] * rows, 1, 6, on_each, head_size=head_size)
        more = np.arange(6 * on_each) < rows % (6 * on_each)
        assert np.array_equal(of_program, (rows // (6 * on_each) + more) * tiles), (rows, tiles)


def test_a_short_row_counts_for_its_end_too():
    # 18 and 16 times 3, of two halves: four rows of one tile, and their ends, against the long one
    of_program, _ = share_out([16] + [1] * 16, 1, 2)
    assert of_program.tolist() == [21, 11]


def test_heads_that_are_not_read_side_by_side_are_rows_of_their_own():
    # ten rows for seven multiprocessors: they are not one each
    of_program, _ = share_out([16, 1, 1, 1, 16], 2, 7)
    assert of_program.max() == 16
    cut = set()
    for longest in range(30, 60):
        _, parts = share_out([longest, 0, 0], 2, 7)
        cut.add((parts.max() > 1, longest * TILE > most_tokens([longest] * 2, 7)))
    assert cut == {(False, False), (True, True)}


def test_rows_are_short_by_the_tokens_that_are_seen():
    _, parts = share_out([LONGEST + 8] * 6 + [3], 1, 6, window=64)
    assert parts.max() == 1


ALIGNED_BY = 24  # tiles of 384 KiB, of heads of 256
BUNDLE_BY = 24  # of 384 tokens
LEAST_CUT = 3  # rows
MOST_ALIGNED = 128  # sequences
FAN_IN = 20  # parts that are merged at once


@on_each
def test_few_rows_of_several_lengths_share_no_range_where_it_costs_little(on_each):
    rng = np.random.default_rng(on_each)
    seen = {"few cut": 0, "shared": 0, "their own": 0, "of a bundle": 0}
    for _ in range(400):
        num_multiprocessors = int(rng.choice([3, 12, 24, 44, 132]))
        num_kv_heads = int(rng.choice([1, 2, 3, 8]))
        tiles = (2 ** rng.uniform(0, 9, int(2 ** rng.uniform(1, 7.3)))).astype(int)
        tiles[0] += (tiles == tiles[0]).all()  # of several lengths
        of_program, parts = share_out(
            tiles, num_kv_heads, num_multiprocessors, on_each, keeps_whole=False, aligns=True
        )
        assert of_program.sum() == tiles.sum() * num_kv_heads
        assert (parts > 0).all()
        parallel = decode_division.heads_in_parallel(num_kv_heads, of_program.size)
        groups, ranges = num_kv_heads // parallel, of_program.size // parallel
        rows, all_tiles = tiles.size * groups, int(tiles.sum()) * groups
        share, bundle = -(-all_tiles // ranges), -(-tiles.max() // FAN_IN)
        by_bundle = share < bundle <= share + BUNDLE_BY
        most, cut = of_program.max(), (tiles > share).sum() * groups
        if rows >= ranges or tiles.size > MOST_ALIGNED:
            assert most == share
        elif cut < LEAST_CUT and not by_bundle:
            assert most == share
            seen["few cut"] += 1
        elif parts.sum() > (of_program > 0).sum():  # some program has two rows
            assert most == share
            # by a sixteenth more than would do, at most
            enough = -(-all_tiles // (ranges - rows))
            assert 17 * max(enough, by_bundle * bundle) > 16 * (share + ALIGNED_BY)
            seen["shared"] += 1
        else:
            assert most <= max(share + ALIGNED_BY, by_bundle * bundle)
            seen["their own"] += 1
            if by_bundle:
                assert parts.max() <= FAN_IN
                seen["of a bundle"] += 1
    assert min(seen.values()) > 10, seen


def test_a_row_that_begins_with_a_range_is_cut_into_as_few_as_have_no_more_than_others():
    of_program, parts = share_out([40, 9, 1, 25], 1, 12, keeps_whole=False, aligns=True)
    # of eight each: five, two, one and four of twelve
    assert of_program.tolist() == [8] * 5 + [8, 1] + [1] + [8, 8, 8, 1]
    assert parts.ravel().tolist() == [5, 2, 1, 4]


def test_rows_that_do_not_begin_with_a_range_are_cut_into_as_few_as_the_host_says():
    for tiles in ([100, 100], [900, 400], [900, 3, 900]):
        _, parts = share_out(tiles, 1, 132, keeps_whole=False, aligns=True, few_ranges=40)
        assert parts.sum() in (40, 41), tiles  # with one that both share
    _, parts = share_out([100, 80, 90], 1, 132, keeps_whole=False, aligns=True, few_ranges=40)
    assert parts.sum() > 41


def test_rows_begin_with_a_range_where_one_takes_longer_than_that():
    ways = set()
    for longest in range(10, 60):
        tiles = [longest] + [longest // 2] * 19
        _, parts = share_out(tiles, 1, 132, head_size=128, aligns=True)
        stays_whole = longest * TILE <= most_tokens(tiles, 132, head_size=128, aligns=True)
        assert (parts.max() == 1) == stays_whole
        ways.add(stays_whole)
    assert ways == {False, True}


def test_rows_that_begin_with_no_range_each_stay_whole_where_cutting_takes_longer():
    tiles = [16, 16, 1, 1, 1, 1]  # of which too few are cut for it to pay
    assert most_tokens(tiles, 132, head_size=64, aligns=True) < 16 * TILE
    assert most_tokens(tiles, 132, head_size=64) >= 16 * TILE
    _, parts = share_out(tiles, 1, 132, head_size=64, aligns=True)
    assert parts.max() == 1


@on_each
@pytest.mark.parametrize("aligns", [False, True], ids=["cut anywhere", "aligned"])
def test_the_host_expects_rows_to_stay_whole_that_do(on_each, aligns):
    rng = np.random.default_rng(on_each)
    config = config_of(on_each, keeps_whole=True, aligns=aligns)
    seen = set()
    for _ in range(150):
        num_kv_heads, head_size = int(rng.choice([1, 4, 8])), int(rng.choice([64, 128]))
        count = int(rng.integers(2, 200 // num_kv_heads))
        longest = int(rng.integers(8, 300))
        tiles = rng.integers(int(rng.choice([1, longest - 6])), longest + 1, count)
        tiles[:2] = longest, longest - 1  # of several lengths
        calls = [
            described((tiles * longer).tolist(), num_kv_heads, head_size) for longer in (0.95, 1.05)
        ]
        expected = {decode_calls.stays_whole(call, config, 132) for call in calls}
        if len(expected) > 1:
            continue  # nearly as long as they may be
        _, parts = share_out(tiles, num_kv_heads, 132, on_each, head_size=head_size, aligns=aligns)
        stays_whole = parts.max() == 1
        # what may begin with a range, and does not after all, may stay whole instead
        assert stays_whole == expected.pop() or (aligns and stays_whole)
        seen.add((bool(stays_whole), count * num_kv_heads > 128))
    assert len(seen) == 4


def test_rows_that_are_never_cut_are_not_where_each_may_have_a_program():
    for others in ([], [1] * 5):
        _, parts = share_out([*others, 2000], 1, 6, never_cuts=True)
        assert parts.max() == 1
    _, parts = share_out([1] * 6 + [2000], 1, 6, never_cuts=True)
    assert parts.max() > 1


def test_few_rows_that_may_stay_whole_are_not_cut_for_all_programs():
    for tiles in ([64, 57], [64] + [57] * 7):
        _, parts = share_out(tiles, 1, 132, head_size=128, aligns=True)
        assert 1 < parts.max() <= FAN_IN
    _, parts = share_out([64, 57], 1, 132, head_size=128)
    assert parts.max() == 64
