"""The CUDA kernels, run on the host without a GPU, give what attention in float64 gives.

Every case is launched twice by each of some seeds, which let lanes and copies come in other orders,
and the counters of the batch have to be zero again. What is specialised alike is compiled once,
which takes a few seconds.
"""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pagedattn.attention.batch_memory import NUM_ARRIVALS

from .bounds import with_bound

pytest.importorskip("triton")

from pagedattn.attention.cuda import decode, decode_calls
from pagedattn.testing import check_attention
from pagedattn.testing.emulator import emulation, unavailable

from .emulated import (
    ALL,
    aligned_rows,
    check,
    inputs_of,
    nightly,
    skip_small_boxes,
    small_tiles,
    two_programs,
    two_with_aligned_rows,
    two_with_whole_rows,
    whole_rows,
)

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"emulation: {unavailable()}")


ROWS = {
    "whole": ((130,) * 6, (8, 2), 6),
    "cut": ((500, 33, 1), (8, 2), 6),
    "one cut by many": ((1000, 20), (4, 1), 24),
    "ragged": ((1, 1, 300, 17, 1, 64), (8, 2), 6),
    "many": (tuple(range(1, 41)), (4, 1), 24),
}
"""Lengths, heads of queries and of KV, and multiprocessors."""
EVEN_ROWS = {
    "each cut by itself": ((300,) * 5, (4, 1), 21),
    "each cut into bundles": ((400,) * 2, (4, 1), 44),
    "whole, by half": ((910,) * 6, (4, 1), 4),
    "whole, one more for some": ((520,) * 7, (4, 1), 5),
    "whole, one more for some of two": ((20,) * 7, (4, 1), 2),
    "whole, by an odd number": ((20,) * 7, (4, 1), 5),
}


@pytest.mark.parametrize("rows", ROWS)
def test_decode_cuts_rows_between_any_number_of_programs(rows):
    kv_lengths, heads, multiprocessors = ROWS[rows]
    inputs = inputs_of(kv_lengths, heads=heads)
    check(inputs, small_tiles, multiprocessors=multiprocessors, seeds=range(6))


@pytest.mark.parametrize("rows", [*ROWS, "few of several lengths", "of a bundle", "heads apart"])
@pytest.mark.parametrize("launch_of", [aligned_rows, two_with_aligned_rows], ids=["one", "two"])
def test_rows_of_several_lengths_begin_with_a_range(rows, launch_of):
    own = {
        "few of several lengths": ((700, 40, 333, 5), (4, 1), 24),
        "of a bundle": ((1000, 20, 300), (4, 1), 44),
        "heads apart": ((500, 33, 1, 200), (8, 2), 31),
    }
    kv_lengths, heads, multiprocessors = (ROWS | own)[rows]
    inputs = inputs_of(kv_lengths, heads=heads, sinks=True)
    check(inputs, launch_of, multiprocessors=multiprocessors, lse=True)


@pytest.mark.parametrize("rows", EVEN_ROWS)
@pytest.mark.parametrize("launch_of", [small_tiles, two_programs], ids=["one", "two"])
def test_rows_of_one_length_go_to_any_number_of_programs(rows, launch_of):
    kv_lengths, heads, multiprocessors = EVEN_ROWS[rows]
    check(inputs_of(kv_lengths, heads=heads), launch_of, multiprocessors=multiprocessors)


@pytest.mark.parametrize("rows", [*ROWS, *EVEN_ROWS, "short", "few", "empty"])
@pytest.mark.parametrize("launch_of", [whole_rows, two_with_whole_rows], ids=["one", "two"])
def test_rows_that_stay_whole_are_shared_out_whatever_their_lengths(rows, launch_of):
    own = {
        "short": ((1, 17, 33, 5, 60, 2, 9, 40, 16, 31, 50, 3), (8, 2), 3),
        "few": ((20, 1), (8, 2), 6),
        "empty": ((1, 1, 30, 1, 17, 1, 1, 1, 1), (4, 1), 4),
    }
    kv_lengths, heads, multiprocessors = (ROWS | EVEN_ROWS | own)[rows]
    inputs = inputs_of(kv_lengths, heads=heads)
    if rows == "empty":
        inputs.batch.kv_lengths[[0, 1, 3, 5, 6, 8]] = 0
    check(inputs, launch_of, multiprocessors=multiprocessors, lse=True)


# a lane that is late for the second merge meets who reads its part in one launch of a hundred
@pytest.mark.parametrize("seeds", [range(4), pytest.param(range(100), marks=nightly)], ids=len)
def test_a_row_of_more_programs_than_are_merged_at_once_is_merged_by_bundles(seeds):
    inputs = inputs_of((1000,), heads=(4, 1))
    check(inputs, two_programs, multiprocessors=24, seeds=seeds)


def test_parts_are_merged_whose_scores_are_zero():
    inputs = inputs_of((150, 400, 90, 300), heads=(4, 1))
    inputs.query.zero_()
    check(inputs, small_tiles, multiprocessors=7)


@pytest.mark.parametrize("kv_lengths", [(150, 400, 90, 300), (500,) * 3, (700, 20), (500, 33, 1)])
@pytest.mark.parametrize(
    ("heads", "head_size"), [((4, 1), 64), ((8, 2), 64), ((8, 1), 128), ((8, 1), 256)]
)
@pytest.mark.parametrize("multiprocessors", [6, 7])
def test_results_are_the_same_bits_whoever_comes_last(
    kv_lengths, heads, head_size, multiprocessors
):
    inputs = inputs_of(kv_lengths, heads=heads, head_size=head_size)
    found = []
    for seed in range(12):
        out = torch.full_like(inputs.query, torch.nan)
        with emulation(multiprocessors, seed):
            small_tiles(inputs.call(out))(inputs.call(out))
        found.append(out)
    check_attention(found[0], inputs)
    assert all(torch.equal(found[0], other) for other in found)


def test_decode_counts_only_where_it_says_that_it_does(monkeypatch):
    inputs = inputs_of((1000,), heads=(4, 1))
    counters = torch.full((NUM_ARRIVALS,), 1 << 20, dtype=torch.int32)
    asked = []

    def counters_of(_, count):
        asked.append(count)
        counters[:count] = 0
        return counters

    monkeypatch.setattr(type(inputs.batch), "counters", counters_of)
    check(inputs, two_programs, multiprocessors=24)
    (count,) = set(asked)
    assert not counters[:count].any()
    assert (counters[count:] == 1 << 20).all()


KINDS = {
    "d80": {"head_size": 80},
    "d80 b4": {"head_size": 80, "block_size": 4},
    "d80 b64": {"head_size": 80, "block_size": 64, "dtype": "bfloat16"},
    "d96 fp8 b128": {"head_size": 96, "block_size": 128, "fp8": True},
    "d128 b64": {"head_size": 128, "block_size": 64, "dtype": "bfloat16"},
    "d256 b256": {"head_size": 256, "block_size": 256, "heads": (4, 2)},
    "b1": {"block_size": 1},
    "b1 d128 fp8, two": {"block_size": 1, "head_size": 128, "fp8": True, "programs": 2},
    "b2, four queries": {"block_size": 2, "queries": 4},
    "b4 d128 fp8, eight queries": {
        "block_size": 4, "head_size": 128, "fp8": True, "dtype": "bfloat16", "queries": 8
    },
    "fp8": {"fp8": True, "dtype": "bfloat16"},
    "d256, two": {"head_size": 256, "programs": 2},  # whose sums have room for one row
    "three queries": {"queries": 3},
    "four queries": {"queries": 4},
    "all": {"dtype": "bfloat16", **ALL},
    "not causal": {"causal": False},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_decode_takes_every_kind_of_call(kind):
    options = dict(KINDS[kind])
    launch_of = two_programs if options.pop("programs", 1) == 2 else small_tiles
    # entries of small blocks are more than are read at once
    longest = 700 if options.get("block_size", 16) < 8 else 200
    inputs = inputs_of((longest, 8, 77, 31), **options)
    check(inputs, launch_of, lse=kind in ("all", "not causal"))


@pytest.mark.parametrize("kind", [{"head_size": 80}, {"head_size": 96, "fp8": True}], ids=str)
def test_tokens_that_do_not_follow_each_other_in_memory_are_not_read_as_if_they_did(kind):
    inputs = inputs_of((100, 8, 77), **kind)

    def apart(part):
        return part.transpose(1, 2).contiguous().transpose(1, 2)

    cache = inputs.cache
    strided = dataclasses.replace(cache, key=apart(cache.key), value=apart(cache.value))
    assert strided.key.stride(2) == cache.num_kv_heads * cache.head_size
    check(dataclasses.replace(inputs, cache=strided), small_tiles)


GUESSED = {
    "whole": ((130,) * 6, 130, 6),
    "cut": ((500,) * 2, 500, 10),
    "far above": ((130,) * 6, 1024, 6),
    "one shorter": ((130,) * 5 + (17,), 130, 6),
    "ragged": ((1, 200, 64, 77, 100), 200, 6),
    "one of 1": ((260,) * 7 + (1,), 260, 6),
    "too few for all": ((2, 1), 500, 24),
    "one cut, far above": ((500,), 1024, 6),
    "another head": ((10, 10, 20), 32, 3),
    "as many tiles in a window": ((130, 130, 100, 130, 130, 130), 130, 6),
    "up to an end": ((20,) * 6, 20, 6),
    "each cut by itself": ((540,) * 2, 540, 12),
    "each cut by itself, above": ((500,) * 2, 540, 12),
    "each cut by itself, far above": ((540,) * 2, 1024, 12),
    "one would be cut by itself": ((540, 17), 540, 12),
    "whole, by half": ((910,) * 6, 910, 8),
    "by half, but for one shorter": ((910,) * 4 + (17, 910), 910, 8),
    "one more for some": ((520,) * 7, 520, 10),
    "one more for some, but for one shorter": ((520,) * 5 + (17, 520), 520, 10),
    "one more for some of two": ((20,) * 7, 20, 4),
}
"""Lengths, the bound that the host knows, and multiprocessors."""


def check_guess(lengths, seeds=(0, 1), launch_of=small_tiles, **options):
    kv_lengths, bound, multiprocessors = lengths
    inputs = with_bound(inputs_of(kv_lengths, extra_columns=1, **options), bound)
    check(inputs, launch_of, multiprocessors=multiprocessors, seeds=seeds)


@pytest.mark.parametrize(
    "lengths", ["whole", "one shorter", "ragged", "another head", "far above", "too few for all"]
)
@pytest.mark.parametrize("launch_of", [whole_rows, two_with_whole_rows], ids=["one", "two"])
def test_a_length_that_the_host_expects_of_rows_that_stay_whole_changes_no_result(
    lengths, launch_of
):
    check_guess(GUESSED[lengths], launch_of=launch_of)
    check_guess(GUESSED[lengths], launch_of=launch_of, window=70)


@pytest.mark.parametrize("lengths", GUESSED)
def test_what_decode_asks_for_by_a_guess_changes_no_result(lengths):
    check_guess(GUESSED[lengths])


@pytest.mark.parametrize("lengths", ["whole", "one shorter", "one more for some of two"])
def test_a_guess_of_two_programs_on_a_multiprocessor_changes_no_result(lengths):
    check_guess(GUESSED[lengths], launch_of=two_programs)


@pytest.mark.parametrize(
    ("kv_lengths", "window", "programs", "keeps_whole"),
    [
        *(((40,) * 4, None, 2, False), ((40,) * 3, None, 1, False)),
        *(((40, 40, 40, 500), None, 2, True), ((40, 40, 500), None, 1, True)),
        *(((40, 40, 40, 900), None, 1, True), ((40, 40, 40, 900), 64, 2, True)),
        *(((900,) * 4, None, 1, False), ((900,) * 4, 64, 2, False)),
        *(((40, 40, 40, 1100), None, 1, False), ((40, 40, 40, 1100), 64, 2, True)),
        ((40,), None, 1, False),
    ],
    ids=[
        *("short", "one each", "ragged", "ragged, one each", "ragged, not short"),
        *("ragged, not short, seen in part", "long", "long, seen in part"),
        *("ragged, long", "ragged, long, seen in part", "one"),
    ],
)
def test_a_launch_has_two_programs_on_a_multiprocessor_or_keeps_rows_whole_where_they_are_short(
    kv_lengths, window, programs, keeps_whole
):
    call = inputs_of(kv_lengths, heads=(4, 2), head_size=128, window=window).call()
    with emulation(6):
        config = decode.DecodeLaunch(call).config
    assert config.programs == programs
    assert config.keeps_whole == keeps_whole


@pytest.mark.parametrize(
    ("kv_lengths", "kind", "programs"),
    [
        ((1100,) + (40,) * 8, {"fp8": True}, 2),
        ((1100,) + (40,) * 8, {}, 1),
        ((40, 40, 40, 500), {"heads": (32, 2)}, 1),
        ((40, 40, 40, 500), {"block_size": 1}, 1),
    ],
    ids=["fp8", "16 bits", "16 columns", "blocks of one"],
)
def test_the_kind_of_a_launch_decides_how_many_programs_a_multiprocessor_has(
    kv_lengths, kind, programs
):
    call = inputs_of(kv_lengths, head_size=128, **{"heads": (4, 2), **kind}).call()
    with emulation(6):
        assert decode.DecodeLaunch(call).config.programs == programs


def test_one_sequence_of_a_length_that_the_host_does_not_know_is_not_kept_whole():
    call = inputs_of((40,)).call()
    call = dataclasses.replace(call, batch=dataclasses.replace(call.batch, is_full=False))
    with emulation(132):
        assert not decode.DecodeLaunch(call).config.keeps_whole


def test_entries_of_blocks_of_one_that_have_left_the_window_are_not_followed():
    inputs = inputs_of((5, 300, 130), block_size=1, window=70)
    for table, length in zip(inputs.batch.block_tables, (5, 300, 130), strict=True):
        table[: max(0, length - 70)] = 2**30
    check(inputs, small_tiles)


@pytest.mark.parametrize("lengths", ["whole", "cut", "as many tiles in a window"])
def test_a_guess_over_fp8_and_a_window_changes_no_result(lengths):
    check_guess(GUESSED[lengths], fp8=True, dtype="bfloat16", window=70)


@pytest.mark.parametrize("bound", [400, 700])
def test_a_guess_over_rows_that_are_merged_by_bundles_changes_no_result(bound):
    check_guess(((400,) * 2, bound, 44), heads=(4, 1))


@pytest.mark.parametrize(
    ("lengths", "queries", "launch_of"),
    [
        # of eight boxes a tile, then of sixteen
        *((rows, 4, small_tiles) for rows in ("one shorter", "each cut by itself", "up to an end")),
        *((rows, 1, decode.DecodeLaunch) for rows in ("one shorter", "each cut by itself")),
    ],
)
def test_a_guess_over_small_blocks_changes_no_result(lengths, queries, launch_of):
    check_guess(GUESSED[lengths], block_size=2, queries=queries, launch_of=launch_of)


@nightly
@pytest.mark.pairs(
    lengths=GUESSED,
    head_size=decode_calls.HEAD_SIZES,
    block_size=[2, 4, 8, 16, 64, 256],
    options={"plain": {}, "window": {"window": 70}, "fp8": {"fp8": True}, "all": ALL},
    nightly=False,
)
def test_no_guess_changes_a_result(lengths, head_size, block_size, options):
    if "fp8" in options and head_size == 80:
        pytest.skip("heads of 80 are not taken over fp8")
    skip_small_boxes(block_size * head_size * (1 if "fp8" in options else 2))
    check_guess(lengths, range(4), head_size=head_size, block_size=block_size, **options)


@nightly
@pytest.mark.pairs(
    rows=ROWS | EVEN_ROWS,
    head_size=decode_calls.HEAD_SIZES,
    block_size=[1, 2, 4, 8, 16, 64, 256],
    options={"plain": {}, "all": ALL, "window": {"window": 40}, "bf16": {"dtype": "bfloat16"}},
    launch_of={"small": small_tiles, "two": two_programs, "chosen": decode.DecodeLaunch},
    nightly=False,
)
def test_decode_agrees_with_float64_in_many_orders(rows, head_size, block_size, options, launch_of):
    kv_lengths, heads, multiprocessors = rows
    skip_small_boxes(block_size * head_size * 2)
    inputs = inputs_of(
        kv_lengths, heads=heads, head_size=head_size, block_size=block_size, **options
    )
    check(inputs, launch_of, multiprocessors=multiprocessors, seeds=range(4))


@nightly
@pytest.mark.skipif(torch.cuda.is_available(), reason="beside a GPU, Triton does not interpret")
def test_the_whole_correctness_suite_passes_on_the_emulated_kernels():
    words = ["--impl", "cuda-emulated", "-m", "not gpu", Path(__file__).parent]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "2", *words],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
