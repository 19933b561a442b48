"""How decode divides rows of several lengths: whole, cut anywhere, or each begun with a range.

As the kernel's own source does it on the host. Lengths here are whole tiles, in which it counts.
"""

import itertools

import numpy as np
import pytest

pytest.importorskip("triton")

from pagedattn.attention.cuda import decode_calls, decode_division
from pagedattn.testing.emulator import unavailable

from .divided import TILE, config_of, described, most_tokens, share_out

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"emulation: {unavailable()}")

on_each = pytest.mark.parametrize("on_each", [1, 2], ids="{} a multiprocessor".format)

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
        heads, mean = (4 * num_kv_heads, num_kv_heads), tiles.mean() / longest
        calls = [
            described(count, longest * TILE * longer, heads, head_size, mean=mean)
            for longer in (0.95, 1.05)
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
