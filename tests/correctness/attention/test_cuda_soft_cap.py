"""The soft cap of the CUDA prefill kernel: by polynomials where they do, else by the formula."""

import dataclasses
import math

import numpy as np
import pytest

pytest.importorskip("triton")

from pagedattn.attention.cuda import decode_calls, launcher_of, prefill
from pagedattn.attention.cuda.soft_cap import ALL_TERMS, FEW_TERMS, LARGEST_CAP, Polynomial
from pagedattn.kv_cache import FP8
from pagedattn.testing.emulator import unavailable

from .emulated import by_fp8, check, inputs_of, nightly, prefill_of, small_tiles

emulated = pytest.mark.skipif(unavailable() is not None, reason=f"emulation: {unavailable()}")
CHUNKS = ((130, 9), (450, 700))


def by_terms(terms, scores):
    """What the kernel makes of scores, in float32."""
    _, _, *coefficients = np.array(terms, np.float32)
    square = scores * scores
    total = np.zeros_like(scores)
    for coefficient in coefficients[::-1]:
        total = total * square + coefficient
    return scores * total


def test_caps_of_which_a_score_would_be_few_last_places_are_left_to_triton():
    for kv_lengths, queries in (((90,), 1), ((450,), 130), ((450, 90), (130, 1))):
        call = inputs_of(kv_lengths, queries, soft_cap=LARGEST_CAP).call()
        assert launcher_of(call) is not None
        larger = dataclasses.replace(call, soft_cap=2 * LARGEST_CAP)
        assert launcher_of(larger) is None
        assert prefill.not_taken(larger) == decode_calls.not_taken(larger) == "a soft cap of 2000"


@emulated
def test_the_largest_cap_is_right_far_above_all_scores():
    check(inputs_of((90, 300), soft_cap=LARGEST_CAP), small_tiles, lse=True, seeds=(0,))
    check(inputs_of((90, 300), 20, soft_cap=LARGEST_CAP), prefill_of, lse=True, seeds=(0,))


@pytest.mark.parametrize(("polynomial", "error"), [(FEW_TERMS, 1.5e-6), (ALL_TERMS, 1e-6)])
@pytest.mark.parametrize(("soft_cap", "scale"), [(50.0, 128**-0.5), (1.0, 3.0), (30.0, 1 / 16)])
def test_terms_are_the_cap_up_to_the_largest_score_and_no_nearer_to_zero_beyond(
    polynomial, error, soft_cap, scale
):
    largest, least_peak, *_ = terms = polynomial.terms(soft_cap, scale)
    assert largest == pytest.approx(polynomial.largest * soft_cap / scale)
    scores = np.linspace(-largest, largest, 4001).astype(np.float32)
    exact = soft_cap * np.tanh(scores.astype(float) * scale / soft_cap) / math.log(2)
    np.testing.assert_allclose(by_terms(terms, scores), exact, rtol=error)
    # what is below is negligible by both, if the row's largest is as large as it must be
    below = by_terms(terms, -largest * np.geomspace(1, 1e3, 400, dtype=np.float32))
    negligible = least_peak - 24
    assert (below <= negligible * (1 - error)).all()
    assert negligible == pytest.approx(exact[0], rel=error)


def test_documents_tell_the_least_peak_for_three_terms_under_two_caps():
    peaks = [FEW_TERMS.terms(cap, 1.0)[1] * math.log(2) for cap in (50.0, 30.0)]
    assert peaks == pytest.approx([2.1, 7.9], abs=0.05)


def test_no_terms_are_taken_that_float32_cannot_hold():
    for soft_cap, scale in ((1e4, 1e-2), (1e-6, 1e3), (1e-36, 0.1), (1e-300, 1e10)):
        assert ALL_TERMS.terms(soft_cap, scale)[:2] == (0.0, math.inf)


def scaled(inputs, factor):
    query = (inputs.query.float() * factor).to(inputs.query.dtype)
    return dataclasses.replace(inputs, query=query)


@emulated
@pytest.mark.parametrize(
    "options",
    [
        {"head_size": 128},
        {"head_size": 128, "fp8": True},
        {"head_size": 64, "sinks": True},
        pytest.param({"head_size": 128, "window": 100}, marks=nightly),
        pytest.param({"head_size": 80}, marks=nightly),
    ],
    ids=str,
)
@pytest.mark.parametrize("factor", [1, 8, 20])
def test_small_scores_large_ones_and_all_between_are_capped(factor, options):
    queries, kv_lengths = CHUNKS
    inputs = inputs_of(kv_lengths, queries, soft_cap=50.0, **options)
    check(scaled(inputs, factor), prefill_of, multiprocessors=3, lse=True, seeds=(0,))


def split(call):
    """Prefill by three shares of each tile's keys."""
    return prefill.PrefillLaunch(call, splits=3)


@emulated
@pytest.mark.parametrize(
    ("launch", "options"),
    [
        pytest.param(split, {}, marks=nightly, id="shares"),
        pytest.param(by_fp8, {"fp8": True}, id="products of fp8"),
        pytest.param(prefill_of, {"causal": False, "heads": (16, 2)}, id="not causal"),
    ],
)
def test_other_ways_to_launch_are_capped_alike(launch, options):
    queries, kv_lengths = CHUNKS
    inputs = inputs_of(kv_lengths, queries, head_size=64, soft_cap=50.0, **options)
    rounded_to = FP8 if launch is by_fp8 else None
    check(inputs, launch, multiprocessors=3, lse=True, seeds=(0,), rounded_to=rounded_to)


@emulated
@pytest.mark.parametrize("factor", [0.5, 1, 4])
def test_rows_all_of_whose_scores_are_far_below_zero_are_capped(factor):
    """Polynomials would say less of them than the cap does, of all alike but not of the sum."""
    queries, kv_lengths = CHUNKS
    inputs = inputs_of(kv_lengths, queries, head_size=128, soft_cap=4.0)
    inputs.cache.key.abs_()
    below = dataclasses.replace(inputs, query=-factor * inputs.query.abs() / 8)
    check(below, prefill_of, multiprocessors=3, lse=True, seeds=(0,))


@emulated
@pytest.mark.parametrize(
    ("name", "factor"), [("FEW_TERMS", 1.0), ("ALL_TERMS", 8.0)], ids=["few", "all"]
)
def test_terms_are_what_is_used_where_they_will_do(monkeypatch, name, factor):
    queries, kv_lengths = CHUNKS
    inputs = scaled(inputs_of(kv_lengths, queries, head_size=128, soft_cap=50.0), factor)
    right = getattr(prefill, name)
    wrong = Polynomial(right.largest, (0.9, *right.coefficients[1:]))
    monkeypatch.setattr(prefill, name, wrong)
    with pytest.raises(AssertionError, match="above the budget"):
        check(inputs, prefill_of, multiprocessors=3, lse=True, seeds=(0,))


def test_a_scale_too_small_to_divide_slopes_by_is_left_to_another_kernel():
    plain, with_slopes = (inputs_of((40,), 40, alibi=alibi).call() for alibi in (False, True))
    assert prefill.not_taken(with_slopes) is None
    tiny = [dataclasses.replace(call, scale=1e-21) for call in (plain, with_slopes)]
    assert [prefill.not_taken(call) for call in tiny] == [None, "ALiBi at a scale of 1e-21"]
