"""A probe tells what is right, wrong, refused and raised apart."""

import dataclasses

import pytest
import torch

from pagedattn.attention import UnsupportedError, register
from pagedattn.attention import registry as registry_module
from pagedattn.attention.reference import ReferenceImplementation
from pagedattn.testing import Finding, features, finite, make_inputs, probe
from pagedattn.testing.support import over_fp8
from pagedattn.workloads import AttentionShape


@pytest.fixture
def made(monkeypatch):
    """Function that registers the oracle with another `attention`, or other attributes."""
    monkeypatch.setattr(registry_module, "_made", dict(registry_module._made))

    def make(attention=None, **attributes):
        one = ReferenceImplementation()
        one.name = "probed"
        right = one.attention
        if attention is not None:
            one.attention = lambda call: attention(right, call)
        for key, value in attributes.items():
            setattr(one, key, value)
        register(one)

    return make


@pytest.mark.parametrize("feature", features())
def test_what_is_right_passes(made, feature):
    made()
    found = probe("probed", feature, "cpu")
    expected = "untried" if feature == "CUDA graph" else "passed"
    assert (found.status, found.implementation) == (expected, "probed")


@pytest.mark.parametrize(
    ("field", "feature"),
    [("window", "window"), ("soft_cap", "soft cap"), ("alibi_slopes", "ALiBi"), ("sinks", "sinks")],
)
def test_an_option_that_is_passed_over_is_wrong(made, field, feature):
    made(lambda right, call: right(dataclasses.replace(call, **{field: None})))
    assert probe("probed", feature, "cpu").status == "wrong"
    assert probe("probed", "mixed", "cpu").status == "passed"


@pytest.mark.parametrize("feature", ["fp8, a scale a tensor", "fp8, a scale a head"])
def test_scales_that_are_passed_over_are_wrong(made, feature):
    def first_scale_for_all(right, call):
        cache = call.cache
        scale = cache.key_scale[:1].expand(cache.num_kv_heads).contiguous()
        right(dataclasses.replace(call, cache=dataclasses.replace(cache, key_scale=scale)))

    made(first_scale_for_all)
    expected = "passed" if feature.endswith("tensor") else "wrong"
    assert probe("probed", feature, "cpu").status == expected


def test_a_log_sum_exp_to_another_base_is_wrong(made):
    def to_the_base_2(right, call):
        right(call)
        if call.lse is not None:
            call.lse.mul_(1.4427)

    made(to_the_base_2)
    found = probe("probed", "log-sum-exp", "cpu")
    assert found.status == "wrong"
    assert "a log-sum-exp off by" in found.detail


def test_other_bits_in_a_second_run_are_told(made):
    calls = iter(range(100))

    def drifting(right, call):
        right(call)
        call.out.mul_(1 + 1e-3 * (next(calls) % 2))

    made(drifting)
    assert probe("probed", "same bits again", "cpu").detail.endswith("other bits in a second run")


def test_a_phrase_is_unsupported_and_an_exception_has_raised(made):
    def refuse(*_):
        raise UnsupportedError("it raised RuntimeError: no such kernel")

    made(refuse)
    assert probe("probed", "decode", "cpu") == Finding(
        "probed", "decode", "raised", "decode: it raised RuntimeError: no such kernel"
    )


def test_a_kernel_for_decode_alone_is_told_as_one(made):
    def decode_only(call):
        return None if call.batch.max_query_length == 1 else "it takes one query token a sequence"

    made(unsupported=decode_only)
    found = [probe("probed", feature, "cpu") for feature in ("decode", "window", "mixed")]
    assert [one.status for one in found] == ["passed", "passed", "unsupported"]
    assert found[1].detail == "decode only"
    assert found[2].detail == "it takes one query token a sequence"


def test_one_that_multiplies_unused_slots_passes_and_is_told(made):
    def careless(right, call):
        right(call)
        blocks = call.batch.block_tables[:, 0].long()
        call.out.add_(0 * call.cache.value[blocks].sum().half())

    made(careless)
    found = probe("probed", "decode", "cpu")
    assert (found.status, found.detail) == ("passed", "multiplies unused slots by 0")


def test_one_that_rounds_to_fp8_has_a_larger_budget_if_it_says_so(made):
    def rounding(right, call):
        right(dataclasses.replace(call, query=call.query.to(torch.float8_e4m3fn).half()))

    made(rounding)
    assert probe("probed", "decode", "cpu").status == "wrong"
    registry_module._made.pop("probed")
    made(rounding, rounds_to=lambda _: torch.float8_e4m3fn)
    found = probe("probed", "decode", "cpu")
    assert (found.status, found.detail) == ("passed", "rounds to float8_e4m3fn")


@pytest.mark.parametrize("feature", [f for f in features() if f != "CUDA graph"])
def test_one_that_takes_fp8_alone_is_tried_over_it(made, feature):
    def fp8_only(call):
        return None if call.cache.dtype == torch.float8_e4m3fn else "a cache of 16 bits"

    made(unsupported=fp8_only)
    found = probe("probed", feature, "cpu")
    detail = "" if feature.startswith("fp8") else "over fp8"
    assert (found.status, found.detail) == ("passed", detail)
    registry_module._made.pop("probed")
    made(lambda _, call: call.out.zero_(), unsupported=fp8_only)
    found = probe("probed", feature, "cpu")
    assert (found.status, found.detail.startswith(detail)) == ("wrong", True)


def test_one_that_refuses_a_feature_is_not_tried_over_fp8(made):
    def no_window(call):
        return "a window" if call.window and call.cache.dtype != torch.float8_e4m3fn else None

    made(unsupported=no_window)
    found = probe("probed", "window", "cpu")
    assert (found.status, found.detail) == ("unsupported", "a window")


@pytest.mark.parametrize(
    ("rounds_to", "sentence"),
    [
        (torch.float8_e4m3fn, "probed's rounds_to must be a method, rounds_to(call)."),
        (lambda _: "fp8", "probed's rounds_to must return a torch.dtype, or None, not 'fp8'."),
    ],
)
def test_what_no_type_is_rounded_to_is_told_by_name(made, rounds_to, sentence):
    made(rounds_to=rounds_to)
    found = probe("probed", "decode", "cpu")
    assert (found.status, found.detail) == ("raised", f"decode: TypeError: {sentence}")


@pytest.mark.parametrize("fp8", [False, True])
def test_nan_is_put_back(fp8):
    shape = AttentionShape("small", (1, 1), (7, 17), 4, 2, 64, 4, "float16")
    cache = make_inputs(shape).cache
    cache = over_fp8(cache, per_head=True) if fp8 else cache
    before = cache.key.view(torch.uint8).clone() if fp8 else cache.key.view(torch.int16).clone()
    with finite(cache):
        assert not cache.key.isnan().any()
    assert torch.equal(cache.key.view(before.dtype), before)
    assert cache.key.isnan().any()
