"""The error budget refuses what is wrong and lets through what is only rounded."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from pagedattn.attention.reference import reference_attention
from pagedattn.testing import (
    ErrorBudget,
    check_attention,
    error_budget,
    error_of,
    known_roundings,
    lse_budget,
    lse_error,
    make_inputs,
    make_rotation,
    tolerance,
)
from pagedattn.workloads import AttentionShape

DTYPES = ["float16", "bfloat16", "float32"]
FP8 = torch.float8_e4m3fn


def shape(dtype="float16", kv_lengths=(1, 15, 16, 17, 300)):
    return AttentionShape("test", (1,) * len(kv_lengths), kv_lengths, 4, 2, 64, 16, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_exact_result_rounded_once_is_within_the_budget(dtype):
    inputs = make_inputs(shape(dtype))
    exact, _ = reference_attention(inputs.call(), torch.float64)
    error, budget = check_attention(exact.to(inputs.query.dtype), inputs)
    assert budget.covers(error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", ["a key too few", "a key too many", "a scale 1 % off", "NaN"])
def test_a_wrong_result_is_refused(dtype, wrong):
    inputs = make_inputs(shape(dtype))
    lengths = inputs.batch.kv_lengths
    original = lengths.clone()
    scale = None
    if wrong == "a key too few":
        lengths[4] -= 1
    elif wrong == "a key too many":
        lengths[1] += 1
        inputs.cache.key.nan_to_num_(0.0)
        inputs.cache.value.nan_to_num_(0.0)
    elif wrong == "a scale 1 % off":
        scale = 1.01 / 8
    result, _ = reference_attention(inputs.call(scale=scale))
    lengths.copy_(original)
    if wrong == "NaN":
        result[2, 1, 5] = torch.nan
    with pytest.raises(AssertionError, match="above the budget"):
        check_attention(result.to(inputs.query.dtype), inputs)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_parts_is_allowed_as_one_rounding_more_where_it_is_known(dtype):
    inputs = make_inputs(shape(dtype))
    exact, _ = reference_attention(inputs.call(), torch.float64)
    once = error_of(exact.to(inputs.query.dtype), exact)
    plain = error_budget(inputs, exact)
    more = error_budget(inputs, exact, rounds_parts=True)
    assert plain.relative < more.relative < plain.relative + 2 * once.relative
    assert (
        plain.largest <= more.largest <= max(1.5 * plain.largest, plain.largest + 2 * once.largest)
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_largest_element_may_be_one_rounding_off_and_not_three(dtype):
    # the first token sees itself alone: its result, the largest, is its V, which the ordinary
    # computation has exactly
    inputs = make_inputs(shape(dtype, kv_lengths=(1, *(17,) * 20)))
    result, _ = reference_attention(inputs.call())
    result = result.to(inputs.query.dtype).contiguous()
    largest = result.abs().max().float()
    step = float(torch.finfo(result.dtype).eps * 2 ** largest.log2().floor())
    place = result.view(-1).abs().argmax()
    for steps in (1, 3):
        off = result.clone()
        off.view(-1)[place] -= off.view(-1)[place].sign() * steps * step
        if steps == 1:
            check_attention(off, inputs)
            continue
        with pytest.raises(AssertionError, match="above the budget"):
            check_attention(off, inputs)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_largest_element_may_be_three_halves_off_where_parts_are_rounded(dtype):
    # alone, and exact in the ordinary computation: by chance no element of few tells more
    inputs = make_inputs(shape(dtype, kv_lengths=(1,)))
    exact, _ = reference_attention(inputs.call(), torch.float64)
    spacing = torch.finfo(inputs.query.dtype).eps * 2 ** float(exact.abs().max().log2().floor())
    assert error_budget(inputs, exact).largest == pytest.approx(spacing, rel=1e-3)
    more = error_budget(inputs, exact, rounds_parts=True).largest
    assert more == pytest.approx(1.5 * spacing, rel=1e-3)


def test_one_wrong_element_is_refused():
    inputs = make_inputs(shape())
    result = reference_attention(inputs.call())[0].half()
    result[4, 0, 0] += 0.02
    with pytest.raises(AssertionError, match="above the budget"):
        check_attention(result, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 100, "soft_cap": 3.0, "alibi": True, "sinks": True}],
    ids=["plain", "options"],
)
def test_a_log_sum_exp_in_float32_is_within_its_budget_and_a_wrong_one_is_not(dtype, options):
    inputs = make_inputs(shape(dtype), **options)
    out, lse = reference_attention(inputs.call())
    out = out.to(inputs.query.dtype)
    check_attention(out, inputs, lse)
    _, exact = reference_attention(inputs.call(), torch.float64)
    assert lse_error(lse, exact) > 0
    assert lse_budget(inputs, exact) < 1e-3  # one key of 300 is a few thousandths
    base_two, nan, empty = lse / 0.6931, lse.clone(), lse.clone()
    nan[2, 1], empty[2, 1] = torch.nan, -torch.inf
    for wrong in (base_two, lse.half().float(), nan, empty):
        with pytest.raises(AssertionError, match="log-sum-exp is off by"):
            check_attention(out, inputs, wrong)


def test_a_log_sum_exp_that_is_known_to_be_coarser_may_be_off_by_that_much_more():
    inputs = make_inputs(shape("float16"), soft_cap=3.0)
    out, lse = reference_attention(inputs.call())
    out = out.half()
    more = 3.0 * 2.0**-11 + 2.0**-11  # tanh.approx, and weights in float16
    check_attention(out, inputs, lse + 0.9 * more, "flashinfer_fa2")
    for off, name in ((1.1 * more, "flashinfer_fa2"), (0.9 * more, "torch"), (0.9 * more, None)):
        with pytest.raises(AssertionError, match="log-sum-exp is off by"):
            check_attention(out, inputs, lse + off, name)


def test_minus_infinity_is_right_where_no_key_is_seen():
    exact = torch.tensor([-torch.inf, 1.0])
    assert lse_error(torch.tensor([-torch.inf, 1.5]), exact) == 0.5
    assert lse_error(torch.tensor([0.0, 1.0]), exact) == torch.inf
    assert lse_error(exact[:0], exact[:0]) == 0.0


def test_what_has_left_the_window_is_poisoned_and_its_blocks_are_not_named():
    inputs = make_inputs(shape(), window=20)  # the longest sees 280 to 299
    poison = inputs.cache.num_blocks - 1
    table = inputs.batch.block_tables[4, :19].tolist()
    assert table[:17] == [poison] * 17
    assert poison not in table[17:]
    block = inputs.cache.key[table[17]]  # tokens 272 to 287
    assert block[:, :8].isnan().all()
    assert not block[:, 8:].isnan().any()


def test_an_fp8_cache_holds_normal_numbers_under_scales_that_are_not_1():
    fp8 = AttentionShape("test", (1, 1), (300, 9), 4, 2, 64, 16, "float16", "float8_e4m3")
    inputs = make_inputs(fp8)
    for part, scale in (
        (inputs.cache.key, inputs.cache.key_scale),
        (inputs.cache.value, inputs.cache.value_scale),
    ):
        assert part.dtype == torch.float8_e4m3fn
        assert scale.unique().numel() == 2
        assert (scale < 0.5).all()
        assert part[inputs.batch.block_tables[1, 0].long(), :, 9:].isnan().all()
        full = inputs.batch.block_tables[0, :18].long()
        for head in range(2):
            numbers = part[full, head].float() * scale[head]
            assert 0.95 < numbers.std() < 1.05


def test_a_budget_does_not_cover_nan():
    assert ErrorBudget(1.0, 1.0).covers(ErrorBudget(1.0, 1.0))
    assert not ErrorBudget(1.0, 1.0).covers(ErrorBudget(float("nan"), 0.0))
    assert not ErrorBudget(1.0, 1.0).covers(ErrorBudget(0.0, float("nan")))


def test_the_error_is_the_distance_over_the_norm():
    exact = torch.tensor([3.0, 4.0])
    error = error_of(torch.tensor([3.0, 4.5]), exact)
    assert error == ErrorBudget(relative=0.1, largest=0.5)
    assert error_of(exact[:0], exact[:0]) == ErrorBudget(0.0, 0.0)


def test_lower_precision_has_the_larger_budget():
    budgets = []
    for dtype in ("float32", "float16", "bfloat16"):
        inputs = make_inputs(shape(dtype))
        exact, _ = reference_attention(inputs.call(), torch.float64)
        budgets.append(error_budget(inputs, exact).relative)
    assert budgets[0] * 100 < budgets[1] < budgets[2] < 0.02


def test_slots_without_a_token_hold_nan_and_the_others_do_not():
    inputs = make_inputs(shape(), extra_columns=2)
    held = torch.zeros(inputs.cache.num_blocks, 16, dtype=torch.bool)
    for row, length in zip(
        inputs.batch.block_tables, inputs.batch.kv_lengths.tolist(), strict=True
    ):
        for token in range(length):
            held[row[token // 16], token % 16] = True
    for part in (inputs.cache.key, inputs.cache.value):
        nan = part.isnan().all(dim=3).all(dim=1)
        assert torch.equal(nan, ~held)
        assert not part.isnan().any(dim=3).any(dim=1)[held].any()
    padding = inputs.batch.block_tables[0, 1:]
    assert inputs.cache.key[padding.long()].isnan().all()


def test_batches_of_a_rotation_share_no_block_and_differ():
    rotation = make_rotation(shape(), 3, seed=1)
    blocks = [
        {int(b) for b in inputs.batch.block_tables.flatten()} - {inputs.cache.num_blocks - 1}
        for inputs in rotation
    ]
    assert not blocks[0] & blocks[1]
    assert not blocks[1] & blocks[2]
    assert not torch.equal(rotation[0].query, rotation[1].query)
    assert rotation[0].cache.key.data_ptr() == rotation[2].cache.key.data_ptr()


def test_unshuffled_tables_ascend_and_shuffled_ones_do_not():
    flat, mixed = (
        make_inputs(shape(), shuffled=shuffled, extra_columns=0).batch.block_tables[4].tolist()
        for shuffled in (False, True)
    )
    assert flat == sorted(flat)
    assert mixed != sorted(mixed)


def test_the_same_seed_gives_the_same_inputs():
    first, second, other = (make_inputs(shape(), seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.query, second.query)
    assert torch.equal(first.batch.block_tables, second.batch.block_tables)
    assert not torch.equal(first.query, other.query)


def test_what_an_implementation_rounds_is_what_it_says():
    call = make_inputs(shape()).call()
    rounding = SimpleNamespace(rounds_to=lambda _: torch.float8_e4m3fn, rounds_parts=True)
    assert known_roundings(SimpleNamespace(), call) == (None, False)
    assert known_roundings(rounding, call) == (torch.float8_e4m3fn, True)


def over_fp8(kv_lengths, queries=1):
    shape = AttentionShape(
        *("fp8", (queries,) * len(kv_lengths), kv_lengths, 4, 1, 64, 16),
        *("bfloat16", "float8_e4m3"),
    )
    inputs = make_inputs(shape)
    exact, exact_lse = reference_attention(inputs.call(), torch.float64)
    return inputs, exact, exact_lse


@pytest.mark.parametrize("kv_lengths", [(9, 40), (1500,), (8192,)], ids=str)
def test_rounding_to_fp8_is_allowed_its_own_error_however_many_keys_there_are(kv_lengths):
    inputs, exact, _ = over_fp8(kv_lengths)
    budget = error_budget(inputs, exact, FP8)
    assert 0.02 < budget.relative < 0.1  # e4m3 rounds by 2^-4 at most
    half = torch.roll(exact, 1, 1) * 0.1 + exact * 0.9  # a tenth of another head's
    for wrong in (torch.zeros_like(exact), exact / 1.2, half):
        assert not budget.covers(error_of(wrong, exact))


def test_what_an_implementation_says_that_it_rounds_is_allowed_by_its_name(monkeypatch):
    inputs, exact, exact_lse = over_fp8((70, 800), queries=3)
    call = inputs.call()
    rounded = dataclasses.replace(call, query=call.query.to(FP8).float())
    out, lse = reference_attention(rounded, torch.float32, weights_dtype=FP8)
    out = out.bfloat16()
    said = SimpleNamespace(rounds_to=lambda _: FP8)
    monkeypatch.setattr(tolerance, "get_implementation", lambda _: said)
    check_attention(out, inputs, lse, "one that rounds")
    allowed = lse_budget(inputs, exact_lse, "one that rounds")
    assert allowed == lse_budget(inputs, exact_lse, rounded_to=FP8)
    assert lse_error(lse, exact_lse) < allowed < 0.1
    with pytest.raises(AssertionError, match="the error"):
        check_attention(out, inputs)
    with pytest.raises(AssertionError, match="log-sum-exp is off by"):
        check_attention(exact.bfloat16(), inputs, lse)
    with pytest.raises(AssertionError, match="log-sum-exp is off by"):
        check_attention(out, inputs, lse + 2 * allowed, "one that rounds")
    with pytest.raises(AssertionError, match="the error"):
        check_attention(torch.zeros_like(out), inputs, lse, "one that rounds")
