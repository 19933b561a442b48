"""Wrong arguments get one sentence that says what was given and what is allowed."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from pagedattn import KVCache
from pagedattn.attention import (
    AttentionBatch,
    Rotary,
    attention,
    get_implementation,
    implementation_names,
    register,
    rotary_write_kv,
    write_kv,
)
from pagedattn.attention import registry as registry_module
from pagedattn.attention.call import FEATURES
from pagedattn.attention.torch_impl import TorchImplementation
from pagedattn.testing import check_attention, make_inputs
from pagedattn.workloads import AttentionShape

from .page_tables import page_table

SHAPE = AttentionShape("small", (1, 1), (7, 16), 4, 2, 64, 4, "float32")


@pytest.fixture
def inputs():
    return make_inputs(SHAPE)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda q: q[0], "query has 2 dimensions; it must be"),
        (lambda q: q[:1], "query has 1 tokens; the batch has 2"),
        (lambda q: q[..., :32], "query has head_size 32; the cache has 64"),
        (lambda q: q[:, :3], "query has 3 heads, which is no multiple of the cache's 2 KV heads"),
        (lambda q: q[:, :0], "query has 0 heads, which is no multiple of the cache's 2 KV heads"),
        (lambda q: q.half(), r"query is torch.float16; the cache is torch.float32"),
        (lambda q: q.double(), r"query is torch.float64; it must be torch.float16, torch.bfl"),
        (lambda q: q.transpose(1, 2).contiguous().transpose(1, 2), "query must be contiguous"),
        (lambda q: q.to("meta"), "query is on meta; the cache is on cpu"),
    ],
)
def test_a_query_that_does_not_fit_is_refused(inputs, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        attention(change(inputs.query), inputs.cache, inputs.batch)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"window": 0}, "window is 0; it must be a whole number of tokens, at least 1, or None"),
        ({"window": 2.5}, "window is 2.5; it must be a whole number"),
        ({"window": True}, "window is True; it must be a whole number"),
        ({"window": np.int64(0)}, r"window is .*0.*; it must be a whole number"),
        ({"scale": float("nan")}, "scale is nan; it must be a finite number, or None"),
        ({"scale": -math.inf}, "scale is -inf; it must be a finite number"),
        ({"soft_cap": 0.0}, "soft_cap is 0.0; it must be a finite number above 0, or None"),
        ({"soft_cap": -3.0}, "soft_cap is -3.0; it must be"),
        ({"soft_cap": float("inf")}, "soft_cap is inf; it must be"),
        ({"alibi_slopes": torch.ones(2)}, r"alibi_slopes is torch.float32 .2,.; it must be torch"),
        ({"alibi_slopes": torch.ones(4).half()}, "alibi_slopes is torch.float16"),
        ({"alibi_slopes": torch.ones(8)[::2]}, "alibi_slopes must be contiguous"),
        ({"sinks": torch.ones(4, 1)}, r"sinks is torch.float32 .4, 1.; it must be .* here .4,."),
        ({"sinks": torch.ones(4, device="meta")}, "sinks is on meta; the cache is on cpu"),
        ({"causal": False, "window": 4}, "count from a query's own position; they need causal=T"),
        ({"causal": False, "alibi_slopes": torch.ones(4)}, "own position; they need causal=True"),
    ],
    ids=str,
)
def test_an_option_that_means_nothing_is_refused(inputs, options, sentence):
    out = torch.full_like(inputs.query, 7.0)
    with pytest.raises(ValueError, match=sentence):
        attention(inputs.query, inputs.cache, inputs.batch, out=out, **options)
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        (torch.empty(2, 4, 32), "out is torch.float32 .2, 4, 32."),
        (torch.empty(2, 4, 64, dtype=torch.float16), "out is torch.float16"),
        (torch.empty(2, 64, 4).transpose(1, 2), "out must be contiguous"),
        (torch.empty(2, 4, 64, device="meta"), "out is on meta"),
        (
            torch.empty(1, 4, 64).expand(2, 4, 64),
            "out has strides .* and several rows in one place; each must",
        ),
    ],
)
def test_an_output_that_does_not_fit_is_refused(inputs, out, sentence):
    with pytest.raises(ValueError, match=sentence):
        attention(inputs.query, inputs.cache, inputs.batch, out=out)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"key": torch.zeros(2, 2, 32)}, "key has shape .2, 2, 32."),
        ({"value": torch.zeros(3, 2, 64)}, "value has shape .3, 2, 64."),
        ({"slots": torch.zeros(2, dtype=torch.int32)}, "slots are torch.int32; they must be"),
        ({"slots": torch.zeros(4, dtype=torch.int64)[::2]}, "slots must be contiguous"),
        ({"slots": torch.zeros(2, dtype=torch.int64, device="meta")}, "slots is on meta"),
        ({"slots": torch.tensor(3)}, "slots must be contiguous in their one dimension"),
        ({"key": torch.zeros(2, 64, 2).transpose(1, 2)}, "key must be contiguous"),
        ({"value": torch.zeros(2, 2, 64).half()}, "key is torch.float32 and value torch.float16"),
        (
            {name: torch.zeros(2, 2, 64).int() for name in ("key", "value")},
            "value torch.int32; they must be of one floating dtype",
        ),
    ],
)
def test_keys_values_and_slots_that_do_not_fit_are_refused(inputs, change, sentence):
    given = {"key": inputs.key, "value": inputs.value, "slots": inputs.batch.slots} | change
    before = inputs.cache.key.clone()
    with pytest.raises(ValueError, match=sentence):
        write_kv(given["key"], given["value"], inputs.cache, given["slots"])
    torch.testing.assert_close(inputs.cache.key, before, equal_nan=True, rtol=0, atol=0)


def test_a_whole_cache_and_a_page_table_are_told_from_a_layer_and_a_batch(inputs):
    cache = KVCache(
        num_layers=1, num_blocks=2, block_size=4, num_kv_heads=2, head_size=64, dtype=torch.float32
    )
    slots = inputs.batch.slots
    for call in (
        lambda: attention(inputs.query, cache, inputs.batch),
        lambda: write_kv(inputs.key, inputs.value, cache, slots),
    ):
        with pytest.raises(ValueError, match=r"cache is a KVCache; .* as KVCache\.layer returns"):
            call()
    with pytest.raises(ValueError, match="batch is a PageTable; attention takes an AttentionBatch"):
        attention(inputs.query, inputs.cache, page_table([7, 16]))


def test_a_page_table_of_other_blocks_than_the_caches_is_refused(inputs):
    batch = AttentionBatch.of(page_table([7, 16], block_size=8))
    with pytest.raises(ValueError, match="is of blocks of 8 tokens; the cache's have 4"):
        attention(inputs.query, inputs.cache, batch)
    with pytest.raises(ValueError, match="is of blocks of 8 tokens; this batch was made for 4"):
        inputs.batch.advance(page_table([7, 16], block_size=8))


@pytest.mark.implementations("own")
@pytest.mark.parametrize("scale", [np.float32(0.1), np.float64(0.1), torch.tensor(0.1)], ids=repr)
def test_a_scale_and_a_window_may_be_numbers_of_other_packages(
    attend, implementation, device, scale
):
    results = [
        attend(
            dataclasses.replace(make_inputs(SHAPE, device=device), window=window),
            implementation,
            scale=factor,
        )
        for factor, window in ((scale, np.int64(5)), (float(scale), 5))
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_nothing_is_kept_for_gradients(inputs, name):
    key, value, query = (
        tensor.clone().requires_grad_() for tensor in (inputs.key, inputs.value, inputs.query)
    )
    sinks = torch.ones(4, requires_grad=True)
    positions = torch.arange(2)
    rotary = Rotary.of(torch.ones(32), 4)
    layer = inputs.cache
    for _ in range(2):
        write_kv(key, value, layer, inputs.batch.slots, implementation=name)
        turned = rotary_write_kv(
            query, key, value, layer, inputs.batch.slots, positions, rotary,
            implementation=name,
        )  # fmt: skip
    out = attention(query, layer, inputs.batch, sinks=sinks, implementation=name)
    for tensor in (layer.key, layer.value, turned, out):
        assert not tensor.requires_grad
    assert not layer.value.isnan().all()


def test_the_log_sum_exp_comes_with_the_result_where_asked(inputs):
    out, lse = attention(inputs.query, inputs.cache, inputs.batch, return_lse=True)
    assert lse.dtype == torch.float32
    assert lse.shape == (2, 4)
    check_attention(out, inputs, lse)
    empty = AttentionBatch.of(page_table([7, 16]), 0)
    out, lse = attention(inputs.query[:0], inputs.cache, empty, return_lse=True)
    assert (out.shape, lse.shape) == ((0, 4, 64), (0, 4))


def test_an_unknown_implementation_names_the_known_ones(inputs):
    with pytest.raises(
        ValueError, match="no implementation 'fast'; known are cuda, triton, torch, ref"
    ):
        attention(inputs.query, inputs.cache, inputs.batch, implementation="fast")


def test_what_an_implementation_cannot_take_is_said():
    pytest.importorskip("triton")
    inputs = make_inputs(AttentionShape("large", (1,), (3,), 1, 1, 512, 4, "float32"))
    with pytest.raises(ValueError, match="'triton' cannot take these inputs: head_size 512"):
        attention(inputs.query, inputs.cache, inputs.batch, implementation="triton")
    check_attention(attention(inputs.query, inputs.cache, inputs.batch), inputs)


def test_a_registered_implementation_is_called_by_its_name(inputs, monkeypatch):
    monkeypatch.setattr(registry_module, "_made", dict(registry_module._made))

    class Mine(TorchImplementation):
        name = "mine"

        def attention(self, call):
            super().attention(call)
            call.out.neg_()

    register(Mine())
    assert "mine" in implementation_names()
    mine, own = (
        attention(inputs.query, inputs.cache, inputs.batch, implementation=name)
        for name in ("mine", "torch")
    )
    assert torch.equal(mine, -own)
    for name in ("mine", "torch"):
        other = Mine()
        other.name = name
        with pytest.raises(ValueError, match=f"named '{name}' exists"):
            register(other)
    assert get_implementation("mine").name == "mine"


@pytest.mark.parametrize("window", [1, 2**30, 2**32, 10**30])
def test_a_call_has_no_window_that_an_int32_does_not_hold(inputs, window):
    call = dataclasses.replace(inputs, window=window).call()
    assert call.window == min(window, 2**30)


@pytest.mark.parametrize("soft_cap", [2.0**100, 1e300])
def test_a_call_has_no_cap_that_no_score_comes_near(inputs, soft_cap):
    assert dataclasses.replace(inputs, soft_cap=soft_cap).call().soft_cap is None
    assert dataclasses.replace(inputs, soft_cap=2.0**99).call().soft_cap == 2.0**99


def test_a_call_names_what_it_asks_for_and_what_is_missing(inputs):
    plain = inputs.call()
    assert plain.features == frozenset()
    assert plain.beyond(()) is None
    ones = torch.ones(4)
    full = dataclasses.replace(
        plain, lse=torch.empty(2, 4), window=3, soft_cap=5.0, alibi_slopes=ones, sinks=ones,
        causal=False,
    )  # fmt: skip
    assert full.features == FEATURES.keys() - {"fp8"}
    assert full.beyond(FEATURES) is None
    assert (
        full.beyond({"alibi", "lse", "sinks", "not_causal"})
        == "it does not do a sliding window or a soft cap"
    )
