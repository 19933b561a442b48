"""The CUDA kernel of prefill, run on the host: see test_cuda_emulated.py."""

import dataclasses
from unittest import mock
from unittest.mock import DEFAULT

import numpy as np
import pytest
import torch

from pagedattn.attention.cascade import attend_in_parts, plan_of
from pagedattn.attention.cascade.sharing import Sharing
from pagedattn.attention.known_lengths import KnownLengths
from pagedattn.attention.reference import reference_attention
from pagedattn.kv_cache import FP8

pytest.importorskip("triton")

from pagedattn.attention.cuda import prefill
from pagedattn.attention.cuda.prefill_choice import Way
from pagedattn.attention.cuda.prefill_config import Cut
from pagedattn.testing import check_attention, make_inputs
from pagedattn.testing.emulator import EmulatedImplementation, emulation, unavailable
from pagedattn.workloads import AttentionShape

from .emulated import (
    ALL,
    by_fp8,
    check,
    inputs_of,
    nightly,
    prefill_of,
)
from .sanitized import CASES, check_case

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"emulation: {unavailable()}")


RAGGED = ((1, 5, 1, 40, 3, 70), (1, 15, 16, 47, 37, 333))
CHUNKS = ((130, 9), (450, 700))
SHORT = ((9, 3, 5), (700, 300, 1000))
PREFILLS = {
    "d64 ragged": (RAGGED, {"dtype": "bfloat16"}),
    "d64 chunks": (CHUNKS, {"dtype": "bfloat16"}),
    "d64 short": (SHORT, {"dtype": "bfloat16"}),
    "d80": (RAGGED, {"head_size": 80}),
    "d128 window": (CHUNKS, {"head_size": 128, "window": 100, "block_size": 64}),
    "d256": (RAGGED, {"head_size": 256, "heads": (4, 2)}),
    "d64 ALiBi": (CHUNKS, {"alibi": True}),
    "d128 ALiBi": (RAGGED, {"head_size": 128, "alibi": True, "dtype": "bfloat16"}),
    "d192 ALiBi fp8": (RAGGED, {"head_size": 192, "alibi": True, "fp8": True}),
    "d128 not causal": (RAGGED, {"head_size": 128, "causal": False}),
    "d128 fp8": (RAGGED, {"head_size": 128, "fp8": True, "dtype": "bfloat16"}),
    "d64 fp8 window": (CHUNKS, {"fp8": True, "window": 100, "block_size": 64}),
    "d64 fp8 not causal": (
        RAGGED, {"heads": (16, 2), "fp8": True, "dtype": "bfloat16", "causal": False}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PREFILLS)
def test_prefill_takes_every_kind_of_call(case):
    (queries, kv_lengths), options = PREFILLS[case]
    inputs = inputs_of(kv_lengths, queries, **options)
    check(inputs, prefill_of, multiprocessors=3, lse=not inputs.causal)


CUTS = {
    "d64 window": ((2, 128), CHUNKS, {"window": 100, "sinks": True}),
    "d64 window by three": ((3, 64), CHUNKS, {"window": 100, "dtype": "bfloat16"}),
    "d64 all": ((2, 64), CHUNKS, ALL),
    "d64 ragged": ((2, 64), RAGGED, {"heads": (9, 3), "dtype": "bfloat16"}),
    "d64 fp8": ((2, 64), CHUNKS, {"fp8": True, "window": 100, "block_size": 128}),
    "d80": ((2, 64), RAGGED, {"head_size": 80, "block_size": 64}),
    "d128 window": ((2, 64), CHUNKS, {"head_size": 128, "window": 100, "block_size": 256}),
    "d128 fp8": ((2, 64), RAGGED, {"head_size": 128, "fp8": True, "dtype": "bfloat16"}),
}


@pytest.mark.parametrize("case", CUTS)
def test_tiles_that_are_not_the_usual_ones_give_what_these_do(case):
    cut, (queries, kv_lengths), options = CUTS[case]
    inputs = inputs_of(kv_lengths, queries, **options)
    check(inputs, lambda call: prefill.PrefillLaunch(call, cut=Cut(*cut)), multiprocessors=3)


FEW_QUERIES = ((21, 1, 5), (150, 30, 300))
PARTS = {
    "48 heads in three": ((2, 128, 3), {"heads": (48, 1), "dtype": "bfloat16", "sinks": True}),
    "7 heads in four and three": ((2, 64, 2), {"heads": (14, 2)} | ALL),
    "71 heads in two of 24 and one of 23": ((3, 128, 3), {"heads": (71, 1), "sinks": True}),
    "5 heads one by one": ((2, 128, 5), {"heads": (10, 2), "head_size": 128, "window": 100}),
    "over fp8": ((2, 128, 2), {"heads": (14, 2), "fp8": True, "dtype": "bfloat16"}),
    "of heads of 256": ((2, 64, 2), {"heads": (6, 2), "head_size": 256, "soft_cap": 3.0}),
}


@pytest.mark.parametrize("case", PARTS)
def test_parts_of_heads_give_what_whole_ones_do(case):
    cut, options = PARTS[case]
    queries, kv_lengths = FEW_QUERIES
    inputs = inputs_of(kv_lengths, queries, **options)

    def divided(call):
        return prefill.PrefillLaunch(call, cut=Cut(*cut))

    check(inputs, divided, multiprocessors=3, lse=True)


def test_a_window_ends_for_a_tile_of_parts_of_heads_where_its_last_token_s_does():
    inputs = inputs_of((600,), (140,), heads=(5, 1), window=200)
    cut = Cut(2, 64, 5)  # 128 tokens, where 25 of all heads would be
    check(inputs, lambda call: prefill.PrefillLaunch(call, cut=cut), multiprocessors=3)


def test_parts_of_heads_are_worked_on_in_sections_of_kv_heads(monkeypatch):
    monkeypatch.setattr(prefill, "section_heads", lambda *_: 1)
    queries, kv_lengths = FEW_QUERIES
    inputs = inputs_of(kv_lengths, queries, heads=(14, 2))
    cut = Cut(2, 128, 2)
    check(inputs, lambda call: prefill.PrefillLaunch(call, cut=cut), multiprocessors=3)


def test_more_heads_than_a_tile_has_rows_are_divided():
    inputs = inputs_of((20, 150), (2, 9), heads=(260, 1))
    check(inputs, prefill_of, multiprocessors=3, lse=True)


@pytest.mark.parametrize(
    ("options", "launch_options", "cut", "shared_bytes"),
    [
        # two tiles of queries, and two of K and of V, 128 bytes a row, and 2,824 more
        ({"window": 100}, {}, (2, 64), (2 * 128 + 4 * 64) * 128 + 2824),
        ({"window": 100}, {"splits": 2}, (3, 128), (2 * 192 + 4 * 128) * 128 + 2824),
        ({"window": 100}, {"cut": Cut(3, 64)}, (3, 64), (2 * 192 + 4 * 64) * 128 + 2824),
        # and two of each, 64 bytes a row, that wait to be widened
        (
            {"window": 100, "fp8": True},
            {},
            (2, 64),
            (2 * 128 + 4 * 64) * 128 + 4 * 64 * 64 + 2824,
        ),
        # a row of K of 128 bytes, and V in rows of 128 tokens and turned around
        (
            {"window": 100, "fp8": True},
            {"fp8_products": True},
            (2, 128),
            (2 * 128 + 4 * 128) * 128 + 2 * 64 * 128 + 2824,
        ),
    ],
)
def test_a_launch_has_the_tiles_of_its_call(options, launch_options, cut, shared_bytes):
    queries, kv_lengths = CHUNKS
    call = inputs_of(kv_lengths, queries, **options).call()
    with emulation(132), mock.patch.multiple(prefill, load_kernel=DEFAULT, launch=DEFAULT) as made:
        made_launch = prefill.PrefillLaunch(call, **launch_options)
        made_launch._launch(call)
    macros = dict(made["load_kernel"].call_args.args[2])
    assert (macros["WARPGROUPS"], macros["KV_TILE"]) == cut
    _, threads, shared = made["launch"].call_args.args[1]
    assert threads == (cut[0] + (2 if "fp8" in options else 1)) * 128
    assert shared == shared_bytes


# few queries, as Triton's interpreter merges each of them: 33 make two tiles
FEW_RAGGED = ((1, 5, 33), (1, 15, 333))
FEW_CHUNKS = ((33, 9), (450, 700))
SHARED_OUT = {
    "two": (2, FEW_CHUNKS, {"dtype": "bfloat16"}),
    "more than there are tiles": (7, FEW_RAGGED, {"head_size": 128}),
    "all options": (3, FEW_CHUNKS, ALL),
    "fp8": (2, FEW_CHUNKS, {"fp8": True, "sinks": True}),
    "products of fp8": (2, FEW_CHUNKS, {"fp8": True, "window": 300}),
    "parts of heads": (2, ((9, 2), (300, 40)), {"heads": (48, 1), "sinks": True}),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=nightly if case in ("two", "fp8") else ()) for case in SHARED_OUT],
)
def test_shares_of_a_tile_s_keys_are_merged(case):
    splits, (queries, kv_lengths), options = SHARED_OUT[case]
    inputs = inputs_of(kv_lengths, queries, **options)
    in_fp8 = case == "products of fp8"

    def shared_out(call):
        return prefill.PrefillLaunch(call, splits=splits, fp8_products=in_fp8)

    check(inputs, shared_out, multiprocessors=3, lse=True, rounded_to=FP8 if in_fp8 else None)


RAGGED_SHARES = {
    "few": ((9, 3, 1, 5), (700, 40, 333, 128), {}),
    "window": ((9, 3, 1, 5), (700, 40, 333, 128), {"window": 200, "sinks": True}),
    "fp8": ((9, 3, 1, 5), (700, 40, 333, 128), {"fp8": True, "head_size": 128}),
    "a prompt among them": ((150, 1, 1), (150, 600, 20), {"head_size": 128}),
    "more than 32": ((1,) * 40, (600, 0, *range(10, 390, 10)), {"heads": (4, 2), "sinks": True}),
    "too many to be sorted": ((1,) * 193, (500, *range(1, 193)), {"heads": (2, 1)}),
}


@pytest.mark.parametrize("case", RAGGED_SHARES)
@pytest.mark.parametrize("splits", [3, 5])
def test_sequences_have_as_many_shares_as_their_keys_need(case, splits):
    """Of one share the prefill kernel writes the result, of more another one merges them."""
    queries, kv_lengths, options = RAGGED_SHARES[case]
    inputs = inputs_of([max(1, length) for length in kv_lengths], queries, **options)
    inputs.batch.kv_lengths[torch.tensor(kv_lengths) == 0] = 0

    def shared_out(call):
        return prefill.PrefillLaunch(call, splits=splits)

    check(inputs, shared_out, multiprocessors=3, lse=True, seeds=(splits,))
    tile = 128
    seen = [min(length, options.get("window", 10**6) + tile // 2) for length in kv_lengths]
    tiles = torch.tensor([-(-length // tile) for length in seen])
    is_merged = tiles > -(-tiles.max() // splits)
    assert is_merged.any()
    assert not is_merged.all()
    out = torch.full_like(inputs.query, torch.nan)
    with emulation(3):
        call = inputs.call(out)
        launch = shared_out(call)
        shares = torch.full((splits, *out.shape), torch.nan)
        launch._launch(call, shares, shares[..., 0].clone())
    of_token = is_merged.repeat_interleave(torch.tensor(queries))
    assert torch.equal(out.isnan().all((1, 2)), of_token)
    assert torch.equal(~shares[0].isnan().all((1, 2)), of_token)


def test_shares_follow_lengths_that_change_after_a_launch_was_made():
    """As a captured graph's do: beyond what was known, to others' lengths, and to none."""
    inputs = inputs_of((700, 690, 600), (9, 3, 5), sinks=True)
    known = KnownLengths.of(np.array([9, 3, 5]), np.array([200, 130, 40]))
    batch = dataclasses.replace(inputs.batch, likely_kv_length=200, known_lengths=known)
    inputs = dataclasses.replace(inputs, batch=batch)
    with emulation(3):
        launch = prefill.PrefillLaunch(inputs.call(), splits=2)
        for lengths in ((200, 130, 40), (700, 690, 600), (40, 690, 0), (9, 3, 5)):
            batch.kv_lengths.copy_(torch.tensor(lengths))
            out = torch.full_like(inputs.query, torch.nan)
            launch(inputs.call(out))
            exact, _ = reference_attention(inputs.call(), torch.float64)
            torch.testing.assert_close(out.double(), exact, atol=4e-3, rtol=4e-3)


def test_each_sequence_s_own_keys_are_shared_out_beside_shared_blocks(monkeypatch):
    """Their results are float32, to be merged with those of the shared blocks."""
    splits = []

    def way_of(work, **_):
        splits.append(3 if work.causal else 1)
        return Way(work.usual, splits[-1], 0.0)

    monkeypatch.setattr(prefill, "way_of", way_of)
    shape = AttentionShape(
        *("shared", (20,) * 3, (700, 300, 460), 4, 2),
        head_size=64,
        dtype="float16",
        shared_prefix=256,
    )
    inputs = make_inputs(shape, sinks=True)
    sharing = Sharing(inputs.batch.sharing.now, always=True)
    batch = dataclasses.replace(inputs.batch, sharing=sharing)
    inputs = dataclasses.replace(inputs, batch=batch)
    implementation = EmulatedImplementation(6)
    call = inputs.call(torch.full_like(inputs.query, torch.nan))
    attend_in_parts(implementation, call, plan_of(implementation, call))
    assert sorted(splits) == [1, 3]
    check_attention(call.out, inputs)


@pytest.mark.parametrize("splits", [65, 300])
def test_more_shares_than_are_merged_are_refused(splits):
    call = inputs_of((700, 40), (9, 3)).call()
    with emulation(3), pytest.raises(ValueError, match="it must be 64 at most"):
        prefill.PrefillLaunch(call, splits=splits)


def test_queries_that_see_all_keys_are_not_shared_out():
    call = inputs_of((700, 40), (9, 3), causal=False).call()
    with emulation(3), pytest.raises(ValueError, match="shared out 2 times"):
        prefill.PrefillLaunch(call, splits=2)


FP8_PRODUCTS = {
    "ragged": (RAGGED, {}),
    "chunks": (CHUNKS, {"dtype": "bfloat16", "block_size": 64}),
    "all": (CHUNKS, ALL),
    "not causal": (RAGGED, {"heads": (16, 2), "dtype": "bfloat16", "causal": False}),
}


@pytest.mark.parametrize(
    ("head_size", "case"),
    [
        pytest.param(
            head_size, case, marks=nightly if case != "ragged" and head_size != 128 else ()
        )
        for head_size in prefill.HEAD_SIZES
        for case in FP8_PRODUCTS
    ],
)
def test_products_of_fp8_err_as_those_of_numbers_rounded_to_it(head_size, case):
    (queries, kv_lengths), options = FP8_PRODUCTS[case]
    inputs = inputs_of(kv_lengths, queries, head_size=head_size, fp8=True, **options)
    check(inputs, by_fp8, multiprocessors=3, rounded_to=FP8)


@pytest.mark.parametrize(
    "head_size",
    [
        pytest.param(head_size, marks=() if head_size in (64, 128) else nightly)
        for head_size in prefill.HEAD_SIZES
    ],
)
def test_products_of_fp8_are_those_of_16_bits_where_nothing_has_to_be_rounded(head_size):
    queries, kv_lengths = CHUNKS
    # a query that sees one key gives it all weight
    inputs = inputs_of(kv_lengths, queries, head_size=head_size, fp8=True, window=1)
    check(inputs, by_fp8, multiprocessors=3)
    # scores of numbers that fp8 holds, times a power of two for each row
    inputs = inputs_of(kv_lengths, queries, head_size=head_size, fp8=True)
    powers = 2.0 ** torch.randint(-8, 3, inputs.query.shape[:2])
    inputs = dataclasses.replace(
        inputs, query=(inputs.query.to(FP8).float() * powers[..., None]).half()
    )
    lse = torch.empty(inputs.query.shape[:2])
    with emulation(3):
        call = inputs.call(torch.empty_like(inputs.query), lse)
        by_fp8(call)(call)
    _, exact = reference_attention(inputs.call(), torch.float64)
    torch.testing.assert_close(lse.double(), exact, atol=1e-5, rtol=1e-5)


def test_prefill_gives_zeros_to_sequences_without_tokens():
    inputs = inputs_of((50,) * 40, 3, dtype="bfloat16")
    inputs.batch.kv_lengths[1:-1] = 0
    check(inputs, prefill_of, seeds=range(6))


@nightly
@pytest.mark.pairs(
    lengths={"ragged": RAGGED, "chunks": CHUNKS, "short": SHORT},
    heads=[(4, 4), (8, 2), (9, 3)],
    head_size=prefill.HEAD_SIZES,
    block_size=[8, 64, 256],
    options={
        "plain": {},
        "all": ALL,
        "window": {"window": 3},
        "part": {"causal": False},
        "fp8": {"fp8": True, "dtype": "bfloat16"},
    },
    nightly=False,
)
def test_prefill_agrees_with_float64_in_many_orders(lengths, heads, head_size, block_size, options):
    queries, kv_lengths = lengths
    inputs = inputs_of(
        kv_lengths, queries, heads=heads, head_size=head_size, block_size=block_size, **options
    )
    check(inputs, prefill_of, multiprocessors=3, lse=True, seeds=range(4))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case, marks=() if case.endswith(("options", "tiles", "ALiBi", "of heads")) else nightly
        )
        for case in CASES
    ],
)
def test_cases_for_the_sanitizer_are_right(case):
    check_case(case, EmulatedImplementation(), "cpu")
