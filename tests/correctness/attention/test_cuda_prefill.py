"""The Hopper prefill kernel gives what attention in float64 gives, on every shape it claims."""

import dataclasses

import numpy as np
import pytest
import torch

from pagedattn.attention.cuda.prefill import PrefillLaunch, not_taken
from pagedattn.attention.cuda.prefill_config import Cut
from pagedattn.attention.reference import reference_attention
from pagedattn.kv_cache import FP8
from pagedattn.testing import check_attention

from .prefill_inputs import CACHES, FEATURES, LONG, RAGGED, inputs_of

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU",
)


def launch(call, **options):
    PrefillLaunch(call, **options)(call)


def run_by_fp8(inputs, rounded_to=FP8):
    """Multiply in fp8, and compare with what rounding to it errs."""
    out = torch.full_like(inputs.query, torch.nan)
    call = inputs.call(out)
    assert not_taken(call) is None
    launch(call, fp8_products=True)
    check_attention(out, inputs, rounded_to=rounded_to)


def run(inputs, *, return_lse=False, cut=None):
    out = torch.full_like(inputs.query, torch.nan)
    lse = torch.full(inputs.query.shape[:2], torch.nan, device="cuda") if return_lse else None
    call = inputs.call(out, lse)
    assert not_taken(call) is None
    launch(call, cut=cut)
    check_attention(out, inputs)
    if return_lse:
        _, exact = reference_attention(inputs.call(), torch.float64)
        torch.testing.assert_close(lse.double(), exact, atol=1e-4, rtol=1e-5)


# blocks smaller than a tile of keys, which has 64 or 128 tokens, as large, and larger
SIZES = {
    "lengths": {"ragged": RAGGED, "long": LONG},
    "heads": ["mha", "group3", "mqa"],
    "head_size": [64, 80, 96, 128, 192, 256],
    "block_size": [8, 64, 256],
    "dtype": ["bfloat16", "float16"],
}


@pytest.mark.gpu
@on_hopper
@pytest.mark.pairs(
    **SIZES,
    kv_dtype=CACHES,
    return_lse={"lse": True, "no lse": False},
)
def test_heads_and_blocks_of_every_size_agree_with_float64(
    lengths, heads, head_size, block_size, dtype, kv_dtype, return_lse
):
    run(inputs_of(lengths, heads, head_size, block_size, dtype, kv_dtype), return_lse=return_lse)


@pytest.mark.gpu
@on_hopper
@pytest.mark.pairs(**SIZES)
def test_products_of_fp8_err_as_those_of_numbers_rounded_to_it(
    lengths, heads, head_size, block_size, dtype
):
    run_by_fp8(inputs_of(lengths, heads, head_size, block_size, dtype, CACHES["fp8"]))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("features", FEATURES)
def test_features_go_with_products_of_fp8(features):
    run_by_fp8(inputs_of(LONG, kv_dtype=CACHES["fp8"], **FEATURES[features]))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
def test_a_query_that_sees_one_key_gives_its_value_by_products_of_fp8_too(head_size):
    inputs = inputs_of(LONG, head_size=head_size, kv_dtype=CACHES["fp8"], window=1)
    run_by_fp8(inputs, rounded_to=None)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("kv_dtype", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("splits", [2, 5])
def test_a_captured_graph_merges_shares_of_later_lengths(splits, kv_dtype):
    inputs = inputs_of(((40, 3, 9), (1500, 700, 64)), kv_dtype=kv_dtype, **FEATURES["sinks"])
    out = torch.full_like(inputs.query, torch.nan)
    lse = torch.full(inputs.query.shape[:2], torch.nan, device="cuda")
    call = inputs.call(out, lse)
    launched = PrefillLaunch(call, splits=splits)
    launched(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launched(call)
    for lengths in ((1500, 700, 64), (900, 3, 0)):
        inputs.batch.kv_lengths.copy_(torch.tensor(lengths))
        graph.replay()
        check_attention(out, inputs, lse)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize(
    ("head_size", "cut"), [(64, (3, 128)), (64, (3, 64)), (64, (2, 128)), (128, (2, 128))]
)
def test_features_agree_with_float64_by_tiles_of_every_size(head_size, cut, features):
    inputs = inputs_of(LONG, head_size=head_size, **FEATURES[features])
    run(inputs, return_lse=True, cut=Cut(*cut))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("kv_dtype", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("features", FEATURES)
def test_features_agree_with_float64_over_many_tiles(features, kv_dtype):
    run(inputs_of(LONG, kv_dtype=kv_dtype, **FEATURES[features]), return_lse=True)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_queries_of_any_magnitude_are_multiplied_with_fp8(dtype):
    inputs = inputs_of(LONG, dtype=dtype, kv_dtype=CACHES["fp8"])
    smallest = -100 if dtype == "bfloat16" else -10
    powers = torch.randint(smallest, 3, inputs.query.shape[:2], device="cuda")
    factors = 2.0**powers
    factors[::7] = 0.0  # rows of zeros weigh all keys the same
    query = (inputs.query * factors[..., None]).to(inputs.query.dtype)
    run(dataclasses.replace(inputs, query=query), return_lse=True)


@pytest.mark.gpu
@on_hopper
def test_every_number_of_fp8_is_multiplied_as_it_is():
    inputs = inputs_of(((256,), (256,)), "one", 256, dtype="float16", kv_dtype=CACHES["fp8"])
    codes = torch.arange(256, dtype=torch.uint8, device="cuda")
    codes[[0x7F, 0xFF]] = 0  # NaN
    for part in (inputs.cache.key, inputs.cache.value):
        part.view(torch.uint8)[inputs.batch.block_tables[0, 0], 0, 0] = codes
    inputs.batch.kv_lengths.fill_(1)
    one_hot = torch.eye(256, device="cuda").half()[:, None]  # each query scores one number
    cache = dataclasses.replace(inputs.cache, key_scale=None, value_scale=None)
    inputs = dataclasses.replace(inputs, query=one_hot, cache=cache, causal=False)
    out, lse = torch.full_like(one_hot, torch.nan), torch.full((256, 1), torch.nan, device="cuda")
    call = inputs.call(out, lse)
    launch(call)
    numbers = codes.view(torch.float8_e4m3fn)
    assert torch.equal(out[:, 0], numbers.half().expand(256, 256))
    torch.testing.assert_close(lse[:, 0], numbers.float() * call.scale, atol=0, rtol=1e-5)


@pytest.mark.gpu
@on_hopper
def test_an_fp8_cache_without_scales_is_in_units_of_1():
    inputs = inputs_of(RAGGED, kv_dtype=CACHES["fp8"])
    plain = dataclasses.replace(inputs.cache, key_scale=None, value_scale=None)
    run(dataclasses.replace(inputs, cache=plain))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("kv_dtype", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
@pytest.mark.parametrize("lengths", [RAGGED, LONG], ids=["ragged", "long"])
def test_a_part_of_shared_blocks_sees_all_keys_and_is_float32(lengths, head_size, kv_dtype):
    inputs = inputs_of(lengths, head_size=head_size, kv_dtype=kv_dtype)
    inputs = dataclasses.replace(inputs, causal=False)
    exact, exact_lse = reference_attention(inputs.call(), torch.float64)
    out = torch.full(inputs.query.shape, torch.nan, device="cuda")
    lse = torch.full(inputs.query.shape[:2], torch.nan, device="cuda")
    call = inputs.call(out, lse)
    assert not_taken(call) is None
    launch(call)
    error = (out.double() - exact).norm() / exact.norm()
    assert error < 4e-3  # of softmax weights in bfloat16, not of an output in it
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-4, rtol=1e-5)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("kv_dtype", CACHES.values(), ids=CACHES)
def test_entries_of_blocks_that_nobody_sees_are_not_followed(kv_dtype):
    inputs = inputs_of(LONG, kv_dtype=kv_dtype, window=40)
    tables, lengths = inputs.batch.block_tables, inputs.batch.kv_lengths
    starts = inputs.batch.query_starts
    queries = starts[1:] - starts[:-1]
    first_seen = (lengths - queries + 1 - 40).clamp(min=0) // 16
    columns = torch.arange(tables.shape[1], device="cuda")
    unseen = (columns < first_seen[:, None]) | (columns >= (lengths[:, None] + 15) // 16)
    inputs.batch.block_tables.copy_(torch.where(unseen, 2**30, tables))
    out = torch.full_like(inputs.query, torch.nan)
    launch(inputs.call(out))
    again = torch.where(unseen, 0, tables)
    inputs.batch.block_tables.copy_(again)
    check_attention(out, inputs)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("kv_dtype", CACHES.values(), ids=CACHES)
def test_padding_and_idle_sequences_disturb_nobody_and_a_second_run_gives_the_same_bits(kv_dtype):
    inputs = inputs_of(LONG, kv_dtype=kv_dtype)
    inputs.batch.kv_lengths[3] = 0
    inputs.batch.query_starts[2] = 700  # the second sequence has no query, the third two
    first, second = torch.full((2, *inputs.query.shape), torch.nan, device="cuda").to(
        inputs.query.dtype
    )
    for out in (first, second):
        launch(inputs.call(out))
    assert torch.equal(first, second)
    check_attention(first, inputs)
    assert not first[702:766].any()


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("kv_dtype", CACHES.values(), ids=CACHES)
def test_a_strided_query_and_output_are_taken_and_nothing_else_is_written(kv_dtype):
    inputs = inputs_of(LONG, kv_dtype=kv_dtype)
    fused = torch.full((inputs.query.shape[0], 12, 128), torch.nan, device="cuda").bfloat16()
    fused[:, :8] = inputs.query
    out = torch.full_like(fused, 7.0)
    call = dataclasses.replace(inputs.call(out[:, :8]), query=fused[:, :8])
    launch(call)
    check_attention(out[:, :8].contiguous(), inputs)
    assert (out[:, 8:] == 7).all()


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("num_sequences", [1, 31, 32, 33, 300])
def test_a_tile_finds_its_sequence_among_any_number(num_sequences):
    rng = np.random.default_rng(num_sequences)
    kv_lengths = rng.integers(1, 200, num_sequences)
    queries = np.minimum(rng.integers(1, 50, num_sequences), kv_lengths)
    run(inputs_of((tuple(queries.tolist()), tuple(kv_lengths.tolist()))))
