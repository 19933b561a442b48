"""Window, soft cap, ALiBi, sinks, log-sum-exp and fp8 caches, each and together, in any batch."""

import dataclasses
import itertools
import sys

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
# the interpreter takes a millisecond and more for a tile
KINDS_ON_A_CPU = KINDS | {
    "verify": ((4,) * 2, (4, 300)),
    "chunk": ((40,), (133,)),
    "prefill": ((1, 17, 70), (1, 17, 70)),
    "mixed": ((1, 5, 1, 40, 3), (1, 5, 300, 64, 64)),
}
# bfloat16 twice: it is what models use
ON = [
    ("cpu", "float16"),
    *(("cuda", "bfloat16"), ("cuda", "bfloat16"), ("cuda", "float16"), ("cuda", "float32")),
]
WINDOWS = {"no window": None, "window of 1": 1, "window": 20, "window of tiles": 250}
SCORES = {name: OPTIONS[name] for name in ("plain", "soft cap", "alibi", "sinks")}
SCORES["all"] = {**OPTIONS["all"], "window": None}
CACHES = {"16-bit": False, "fp8": True}
HEADS = {
    "4-2-64": (4, 2, 64),
    "6-2-80": (6, 2, 80),
    "8-1-128": (8, 1, 128),
    "3-1-192": (3, 1, 192),
    "2-2-256": (2, 2, 256),
}
FP8 = "float8_e4m3"


def make(on, kind, options, *, fp8=False, heads=(4, 2), head_size=64, block_size=16, seed=0):
    device, dtype = on
    lengths = (KINDS_ON_A_CPU if device == "cpu" else KINDS)[kind]
    shape = AttentionShape(
        *("test", *lengths, *heads, head_size, block_size, dtype, FP8 if fp8 else None)
    )
    return make_inputs(shape, device=device, seed=seed, **options)


@pytest.mark.implementations("own")
@pytest.mark.parametrize("soft_cap", [1e3, 1e5, 1e8, 1e20, 1e300], ids=str)
@pytest.mark.parametrize(("kind", "dtype"), [("decode", "float16"), ("chunk", "float32")])
def test_scores_far_below_a_cap_are_what_they_would_be_without(
    attend, implementation, device, kind, dtype, soft_cap
):
    inputs = make((device, dtype), kind, {"soft_cap": soft_cap}, heads=(6, 2))
    out, lse = attend(inputs, implementation, return_lse=True)
    check_attention(out, inputs, lse, implementation=implementation)


@pytest.mark.implementations("own")
@pytest.mark.pairs(
    nightly=False,
    on=ON,
    kind=list(KINDS),
    window=WINDOWS,
    options=SCORES,
    fp8=CACHES,
    heads=HEADS,
    block_size=[1, 3, 16, 24, 32, 256],
    return_lse={"lse": True, "no lse": False},
)
def test_options_with_batches_caches_heads_and_blocks_agree_with_float64(
    attend, implementation, on, kind, window, options, fp8, heads, block_size, return_lse
):
    *heads, head_size = heads
    options = {**options, "window": window}
    inputs = make(
        on, kind, options, fp8=fp8, heads=heads, head_size=head_size, block_size=block_size
    )
    if return_lse:
        out, lse = attend(inputs, implementation, return_lse=True)
        check_attention(out, inputs, lse, implementation)
    else:
        check_attention(attend(inputs, implementation), inputs, implementation=implementation)


@pytest.mark.parametrize("window", [300, 2**31 - 1, 2**32, sys.maxsize])
@pytest.mark.parametrize("kind", ["decode", "mixed"])
def test_a_window_that_hides_nothing_is_none(attend, implementation, device, kind, window):
    inputs = make((device, "float16"), kind, {})
    assert inputs.batch.max_kv_length == 300
    plain = attend(inputs, implementation)
    wide = attend(dataclasses.replace(inputs, window=window), implementation)
    assert torch.equal(wide, plain)


@pytest.mark.implementations("own")
@pytest.mark.parametrize("entry", [-1, 2**30])
@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("kind", ["decode", "verify", "mixed"])
def test_entries_of_blocks_that_nobody_sees_are_not_followed(
    attend, implementation, device, kind, block_size, entry
):
    inputs = make((device, "float16"), kind, {"window": 70}, block_size=block_size)
    batch = inputs.batch
    queries = batch.query_starts.diff()
    first_seen = (batch.kv_lengths - queries + 1 - 70).clamp(min=0)
    tokens = block_size * torch.arange(batch.block_tables.shape[1], device=device)
    seen = (tokens > first_seen[:, None] - block_size) & (tokens < batch.kv_lengths[:, None])
    usual = batch.block_tables.clone()
    batch.block_tables.copy_(torch.where(seen, usual, entry))
    out = attend(inputs, implementation)
    batch.block_tables.copy_(usual)
    check_attention(out, inputs, implementation=implementation)


@pytest.mark.implementations("own")
@pytest.mark.pairs(
    on=ON,
    kind=list(KINDS),
    options={name: OPTIONS[name] for name in ("plain", "soft cap", "sinks")},
    fp8=CACHES,
)
def test_without_causality_every_query_sees_all_keys_even_fewer_than_queries(
    attend, implementation, on, kind, options, fp8
):
    inputs = dataclasses.replace(make(on, kind, options, fp8=fp8), causal=False)
    out, lse = attend(inputs, implementation, return_lse=True)
    check_attention(out, inputs, lse, implementation)
    inputs.batch.kv_lengths.sub_(25).clamp_(min=0)
    out, lse = attend(inputs, implementation, return_lse=True)
    check_attention(out, inputs, lse, implementation)
    check_attention(attend(inputs, implementation), inputs, implementation=implementation)


@pytest.mark.gpu
@pytest.mark.implementations("peers")
@pytest.mark.parametrize("on", [("cuda", "bfloat16")], ids="-".join)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "fp8"), [*((name, False) for name in OPTIONS), ("plain", True), ("all", True)]
)
def test_options_one_by_one_agree_with_float64(attend, implementation, on, kind, name, fp8):
    inputs = make(on, kind, OPTIONS[name], fp8=fp8, seed=1)
    out, lse = attend(inputs, implementation, return_lse=True)
    check_attention(out, inputs, lse, implementation)


@pytest.mark.implementations("own")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["decode", "mixed"])
def test_queries_of_other_dtypes_read_an_fp8_cache_on_a_cpu(attend, implementation, kind, dtype):
    if (implementation, dtype) == ("triton", "bfloat16"):
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    inputs = make(("cpu", dtype), kind, OPTIONS["all"], fp8=True)
    out, lse = attend(inputs, implementation, return_lse=True)
    check_attention(out, inputs, lse, implementation)


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
    check_attention(out, inputs, lse, implementation)
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
    check_attention(out, inputs, lse, implementation)
    if sink == 1000.0:
        assert not out.any()


@pytest.mark.parametrize("kind", ["decode", "mixed"])
def test_a_soft_cap_bounds_large_scores(attend, implementation, device, kind):
    inputs = make((device, "float16"), kind, OPTIONS["soft cap"])
    inputs = dataclasses.replace(inputs, query=inputs.query * 1000)
    out, lse = attend(inputs, implementation, return_lse=True)
    check_attention(out, inputs, lse, implementation)


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
        check_attention(attend(inputs, implementation), inputs, implementation=implementation)
    assert batch.block_tables.tolist() == tables.tolist()


EACH = [
    dict(zip(("window", "soft_cap", "alibi", "sinks"), values, strict=True))
    for values in itertools.product((None, 37), (None, 3.0), (False, True), (False, True))
]


@pytest.mark.nightly
@pytest.mark.pairs(on=ON, kind=list(KINDS), options={str(each): each for each in EACH}, fp8=CACHES)
def test_every_combination_of_options_agrees_with_float64(
    attend, implementation, on, kind, fp8, options
):
    inputs = make(on, kind, options, fp8=fp8, seed=2)
    out, lse = attend(inputs, implementation, return_lse=True)
    check_attention(out, inputs, lse, implementation)


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
    check_attention(out, inputs, lse, implementation)


def test_the_cases_ask_for_every_feature():
    inputs = make(("cpu", "float16"), "decode", OPTIONS["all"], fp8=True)
    assert inputs.call(lse=torch.empty(5, 4)).features == FEATURES.keys() - {"not_causal"}
    inputs = dataclasses.replace(inputs, causal=False)
    assert "not_causal" in inputs.call().features
