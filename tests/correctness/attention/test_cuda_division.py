"""How decode divides a batch between programs, as its own source does it on the host.

Lengths here are whole tiles, in which the division counts.
"""

import itertools

import numpy as np
import pytest

pytest.importorskip("triton")

from pagedattn.testing.emulator import unavailable

from .divided import HEAD_SIZE, TILE, divide

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
