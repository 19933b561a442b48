"""Window, soft cap, ALiBi, sinks, log-sum-exp and fp8 caches, each and together, in any batch."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from pagedattn import KVCache, PageTable
from pagedattn.attention import AttentionBatch, write_kv
from pagedattn.attention.call import FEATURES
from pagedattn.testing import AttentionInputs, check_attention, make_inputs
from pagedattn.workloads import AttentionShape

OPTIONS = {
    "plain": {},
    "window": {"window": 20},
    "window of 1": {"window": 1},
    "window of tiles": {"window": 250},
    "soft cap": {"soft_cap": 2.0},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True},
    "all": {"window": 20, "soft_cap": 2.0, "alibi": True, "sinks": True},
}
# query and KV lengths: one token, blocks partly, exactly and over-full, several tiles
KINDS = {
    "decode": ((1,) * 5, (1, 15, 16, 17, 300)),
    "verify": ((4,) * 3, (4, 130, 300)),
    "chunk": ((40,), (400,)),
    "prefill": ((1, 17, 150), (1, 17, 150)),
    "mixed": ((1, 5, 1, 40, 3), (1, 5, 300, 133, 64)),
}
ON = [
    pytest.param(("cpu", "float16"), id="cpu-fp16"),
    pytest.param(("cuda", "float16"), id="cuda-fp16", marks=pytest.mark.gpu),
    pytest.param(("cuda", "bfloat16"), id="cuda-bf16", marks=pytest.mark.gpu),
]
FP8 = "float8_e4m3"


def make(on, kind, options, *, fp8=False, heads=(4, 2), head_size=64, block_size=16, seed=0):
    device, dtype = on
    shape = AttentionShape(
        *("test", *KINDS[kind], *heads, head_size, block_size, dtype, FP8 if fp8 else None)
    )
    return make_inputs(shape, device=device, seed=seed, **options)


@pytest.mark.parametrize("on", ON)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_option_and_its_log_sum_exp_agree_with_float64(
    attend, implementation, on, kind, options
):
    inputs = make(on, kind, options)
    out, lse = attend(inputs, implementation, return_lse=True)
    check_attention(out, inputs, lse)


@pytest.mark.parametrize("on", ON)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["plain", "window", "all"])
def test_an_fp8_cache_with_scales_agrees_with_float64(attend, implementation, on, kind, name):
    inputs = make(on, kind, OPTIONS[name], fp8=True, seed=1)
    out, lse = attend(inputs, implementation, return_lse=True)
    check_attention(out, inputs, lse)


@pytest.mark.parametrize("on", ON)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["plain", "soft cap", "sinks"])
@pytest.mark.parametrize("fp8", [False, True], ids=["16-bit", "fp8"])
def test_without_causality_every_query_sees_all_keys_even_fewer_than_queries(
    attend, implementation, on, kind, name, fp8
):
    inputs = dataclasses.replace(make(on, kind, OPTIONS[name], fp8=fp8), causal=False)
    out, lse = attend(inputs, implementation, return_lse=True)
    check_attention(out, inputs, lse)
    inputs.batch.kv_lengths.sub_(25).clamp_(min=0)
    out, lse = attend(inputs, implementation, return_lse=True)
    check_attention(out, inputs, lse)
    check_attention(attend(inputs, implementation), inputs)


@pytest.mark.parametrize("fp8", [False, True], ids=["16-bit", "fp8"])
@pytest.mark.parametrize("kind", ["decode", "mixed"])
def test_a_window_without_the_log_sum_exp_agrees_with_float64(
    attend, implementation, device, kind, fp8
):
    inputs = make((device, "float16"), kind, OPTIONS["window"], fp8=fp8)
    check_attention(attend(inputs, implementation), inputs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["decode", "mixed"])
def test_queries_of_other_dtypes_read_an_fp8_cache(attend, implementation, device, kind, dtype):
    if (implementation, device, dtype) == ("triton", "cpu", "bfloat16"):
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    inputs = make((device, dtype), kind, OPTIONS["all"], fp8=True)
    out, lse = attend(inputs, implementation, return_lse=True)
    check_attention(out, inputs, lse)


@pytest.mark.parametrize("block_size", [1, 3, 24, 256])
@pytest.mark.parametrize("kind", ["decode", "mixed"])
def test_a_window_begins_anywhere_in_a_block_of_any_size(
    attend, implementation, device, kind, block_size
):
    for window in (7, 131):
        inputs = make(
            (device, "float16"), kind, {"window": window}, block_size=block_size, seed=window
        )
        check_attention(attend(inputs, implementation), inputs)


@pytest.mark.parametrize("head_size", [80, 192])
@pytest.mark.parametrize("kind", ["decode", "mixed"])
def test_options_in_heads_that_are_padded_agree_with_float64(
    attend, implementation, device, kind, head_size
):
    inputs = make(
        *((device, "float16"), kind, OPTIONS["all"]), fp8=True, heads=(9, 3), head_size=head_size
    )
    out, lse = attend(inputs, implementation, return_lse=True)
    check_attention(out, inputs, lse)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("num_tokens", [(0, 7, 33), (5, 0, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("queries", [1, 40])
def test_a_padding_sequence_has_zeros_and_its_sink_as_log_sum_exp(
    attend, implementation, device, queries, num_tokens, sinks
):
    lengths = tuple(max(queries, n) for n in num_tokens)
    shape = AttentionShape("padding", (queries,) * 3, lengths, 4, 2, 64, 16, "float16")
    inputs = make_inputs(shape, device=device, sinks=sinks)
    empty = torch.tensor(num_tokens, device=device) == 0
    inputs.batch.kv_lengths.masked_fill_(empty, 0)
    out, lse = attend(inputs, implementation, return_lse=True)
    check_attention(out, inputs, lse)
    rows = empty.repeat_interleave(queries)
    assert not out[rows].any()
    expected = inputs.sinks if sinks else torch.full((4,), -torch.inf, device=device)
    assert torch.allclose(lse[rows], expected.expand(int(rows.sum()), 4), rtol=1e-6)


def test_a_bound_of_no_keys_gives_zeros_and_the_sinks(attend, implementation, device):
    inputs = make((device, "float16"), "decode", OPTIONS["sinks"])
    inputs.batch.kv_lengths.zero_()
    inputs = dataclasses.replace(inputs, batch=dataclasses.replace(inputs.batch, max_kv_length=0))
    out, lse = attend(inputs, implementation, return_lse=True)
    assert not out.any()
    assert torch.allclose(lse, inputs.sinks.expand(lse.shape), rtol=1e-6)


@pytest.mark.parametrize("kind", ["decode", "mixed"])
@pytest.mark.parametrize("sink", [-torch.inf, -1000.0, 1000.0])
def test_sinks_of_any_size_do_not_overflow(attend, implementation, device, kind, sink):
    inputs = make((device, "float16"), kind, {})
    inputs = dataclasses.replace(inputs, sinks=torch.full((4,), sink, device=device))
    out, lse = attend(inputs, implementation, return_lse=True)
    check_attention(out, inputs, lse)
    if sink == 1000.0:
        assert not out.any()


@pytest.mark.parametrize("kind", ["decode", "mixed"])
def test_a_soft_cap_bounds_large_scores(attend, implementation, device, kind):
    inputs = make((device, "float16"), kind, OPTIONS["soft cap"])
    inputs = dataclasses.replace(inputs, query=inputs.query * 1000)
    out, lse = attend(inputs, implementation, return_lse=True)
    check_attention(out, inputs, lse)


@pytest.mark.parametrize("kind", ["decode", "mixed"])
def test_a_second_run_with_every_option_gives_the_same_bits(attend, implementation, device, kind):
    inputs = make((device, "float16"), kind, OPTIONS["all"], fp8=True)
    first, second = (attend(inputs, implementation, return_lse=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("fp8", [False, True], ids=["16-bit", "fp8"])
def test_a_sequence_grows_over_blocks_within_one_batch(attend, implementation, device, fp8):
    cache = KVCache(
        num_layers=1, num_blocks=9, block_size=4, num_kv_heads=2, head_size=64,
        dtype=torch.float8_e4m3fn if fp8 else torch.float16, device=device,
    )  # fmt: skip
    if fp8:
        cache.scales.uniform_(0.0125, 0.0375)
    cache.storage.fill_(torch.nan)
    tables = np.array([[8, 3, 0, 5], [1, 7, 2, 6]], dtype=np.int32)
    torch.manual_seed(0)
    batch = None
    for length in (1, 3, 4, 5, 8, 9, 13):  # in a block, filling it, opening the next
        num_tokens = np.array([length, max(1, length - 2)])
        width = -(-length // 4)
        table = PageTable(4, tables[:, :width].copy(), num_tokens)
        now = AttentionBatch.of(table, 1, device, max_kv_length=13 if batch is None else None)
        if batch is None:
            batch = now
        else:
            batch.update(now)
        query = torch.randn((2, 4, 64), device=device).half()
        held = torch.from_numpy(table.slots(num_tokens)).to(device)
        key, value = torch.randn((2, len(held), 2, 64), device=device).half()
        write_kv(key, value, cache.layer(0), held, implementation="torch")
        inputs = AttentionInputs(query, key, value, cache.layer(0), batch)
        check_attention(attend(inputs, implementation), inputs)
    assert batch.block_tables.tolist() == tables.tolist()


EACH = [
    dict(zip(("window", "soft_cap", "alibi", "sinks"), values, strict=True))
    for values in itertools.product((None, 37), (None, 3.0), (False, True), (False, True))
]


@pytest.mark.nightly
@pytest.mark.parametrize("on", ON)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fp8", [False, True], ids=["16-bit", "fp8"])
@pytest.mark.parametrize("options", EACH, ids=str)
def test_every_combination_of_options_agrees_with_float64(
    attend, implementation, on, kind, fp8, options
):
    inputs = make(on, kind, options, fp8=fp8, seed=2)
    out, lse = attend(inputs, implementation, return_lse=True)
    check_attention(out, inputs, lse)


@pytest.mark.nightly
@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fp8", [False, True], ids=["16-bit", "fp8"])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (9, 3), (8, 1)], ids=str)
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("block_size", [1, 16, 100, 256])
@pytest.mark.parametrize("name", ["window", "all"])
def test_every_size_with_options_agrees_with_float64(
    attend, implementation, kind, fp8, heads, head_size, block_size, name
):
    inputs = make(
        *(("cuda", "bfloat16"), kind, OPTIONS[name]),
        fp8=fp8,
        heads=heads,
        head_size=head_size,
        block_size=block_size,
    )
    out, lse = attend(inputs, implementation, return_lse=True)
    check_attention(out, inputs, lse)


def test_the_cases_ask_for_every_feature():
    inputs = make(("cpu", "float16"), "decode", OPTIONS["all"], fp8=True)
    assert inputs.call(lse=torch.empty(5, 4)).features == FEATURES.keys() - {"not_causal"}
    inputs = dataclasses.replace(inputs, causal=False)
    assert "not_causal" in inputs.call().features
