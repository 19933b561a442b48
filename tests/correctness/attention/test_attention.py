"""Every implementation gives what attention in float64 gives, on every shape it claims."""

import dataclasses

import pytest
import torch

from pagedattn.attention import AttentionBatch, attention
from pagedattn.testing import check_attention, make_inputs
from pagedattn.workloads import AttentionShape

HEADS = {"mha": (4, 4), "gqa": (8, 2), "group3": (9, 3), "mqa": (8, 1)}
HEAD_SIZES = [64, 80, 96, 128, 192, 256]
BLOCK_SIZES = [1, 5, 8, 16, 24, 32, 64, 100, 128, 256]
KINDS = ["decode", "prefill", "mixed"]
# bfloat16 is what models use; Triton's interpreter multiplies it wrongly. What is there twice gets
# more cases: float32 takes the interpreter twice as long.
ON = [
    *(("cpu", "float16"), ("cpu", "float16"), ("cpu", "float32")),
    *(("cuda", "bfloat16"), ("cuda", "bfloat16"), ("cuda", "float16"), ("cuda", "float32")),
]


def lengths(kind, block_size, device):
    """Query and KV lengths: one token, a block but one, a block, one more, several tiles."""
    kv = [1, max(1, block_size - 1), block_size, block_size + 1, 2 * block_size + 5, 333]
    if device == "cpu":  # the interpreter takes a millisecond and more for a tile
        kv[4:] = [133]
        if kind == "prefill":
            kv = [min(length, 70) for length in kv]
    if kind == "decode":
        return (1,) * len(kv), tuple(kv)
    if kind == "prefill":
        return tuple(kv), tuple(kv)
    # a query that is too long for the decode kernel, which a launch of mixed lengths is not for
    queries = [1, 5, 1, 3, 70] if device == "cpu" else [1, 5, 1, 40, 3, 100]
    return tuple(min(pair) for pair in zip(kv, queries, strict=False)), tuple(kv)


def check(attend, implementation, on, kind, heads, head_size, block_size, seed=0):
    device, dtype = on
    shape = AttentionShape(
        "test", *lengths(kind, block_size, device), *HEADS[heads], head_size, block_size, dtype
    )
    inputs = make_inputs(shape, device=device, seed=seed)
    check_attention(attend(inputs, implementation), inputs, implementation=implementation)


@pytest.mark.implementations("own")
@pytest.mark.pairs(
    on=ON, kind=KINDS, heads=list(HEADS), head_size=HEAD_SIZES, block_size=BLOCK_SIZES
)
def test_heads_and_blocks_of_every_size_agree_with_float64(
    attend, implementation, on, kind, heads, head_size, block_size
):
    check(attend, implementation, on, kind, heads, head_size, block_size, seed=head_size)


@pytest.mark.gpu
@pytest.mark.implementations("peers")
@pytest.mark.parametrize("on", [("cuda", "bfloat16")], ids="-".join)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("head_size", "block_size"),
    [*((size, 16) for size in HEAD_SIZES), *((64, size) for size in BLOCK_SIZES if size != 16)],
)
def test_sizes_one_by_one_agree_with_float64(
    attend, implementation, on, kind, head_size, block_size
):
    check(attend, implementation, on, kind, "gqa", head_size, block_size)


def small(query_lengths=(1, 1, 1), kv_lengths=(7, 16, 33), **changes):
    values = {"num_query_heads": 4, "num_kv_heads": 2, "head_size": 64, "block_size": 4}
    return AttentionShape(
        "small", query_lengths, kv_lengths, **(values | {"dtype": "float16"} | changes)
    )


MIXED = {"query_lengths": (20, 1, 3), "kv_lengths": (20, 16, 33)}


@pytest.mark.parametrize("lengths", [{}, MIXED], ids=["decode", "mixed"])
def test_where_the_blocks_lie_changes_no_bit(attend, implementation, device, lengths):
    results = []
    for shuffled in (False, True):
        inputs = make_inputs(small(**lengths), device=device, shuffled=shuffled)
        other = make_inputs(small(**lengths), device=device, seed=5, shuffled=True)
        # the same contents in other places: copy each block from where `other` has it
        tables, places = other.batch.block_tables.long(), inputs.batch.block_tables.long()
        inputs.cache.key[places], inputs.cache.value[places] = (
            other.cache.key[tables],
            other.cache.value[tables],
        )
        inputs = dataclasses.replace(inputs, query=other.query)
        results.append(attend(inputs, implementation))
    assert torch.equal(*results)


@pytest.mark.parametrize("lengths", [{}, MIXED], ids=["decode", "mixed"])
def test_a_second_run_gives_the_same_bits_and_inputs_are_untouched(
    attend, implementation, device, lengths
):
    inputs = make_inputs(small(**lengths), device=device)
    before = [tensor.clone() for tensor in (inputs.query, inputs.cache.key, inputs.cache.value)]
    first, second = (attend(inputs, implementation) for _ in range(2))
    assert torch.equal(first, second)
    after = (inputs.query, inputs.cache.key, inputs.cache.value)
    assert all(
        torch.equal(x.view(torch.int16), y.view(torch.int16))
        for x, y in zip(before, after, strict=True)
    )


@pytest.mark.parametrize("num_tokens", [(0, 7, 33), (5, 0, 0), (0, 0, 0)])
def test_padding_sequences_get_zeros_and_disturb_nobody(attend, implementation, device, num_tokens):
    inputs = make_inputs(small(), device=device)
    inputs.batch.kv_lengths.copy_(torch.tensor(num_tokens))
    out = attend(inputs, implementation)
    check_attention(out, inputs, implementation=implementation)
    padding = torch.tensor(num_tokens) == 0
    assert not out[padding].any()


def test_padding_sequences_among_long_queries_get_zeros(attend, implementation, device):
    inputs = make_inputs(small((40, 30, 20), (40, 30, 20)), device=device)
    inputs.batch.kv_lengths[1] = 0
    out = attend(inputs, implementation)
    check_attention(out, inputs, implementation=implementation)
    assert not out[40:70].any()


def test_sequences_without_queries_are_passed_over(attend, implementation, device):
    inputs = make_inputs(small((2, 2, 2), (7, 16, 33)), device=device)
    starts = torch.tensor([0, 3, 3, 6], dtype=torch.int32, device=device)
    batch = dataclasses.replace(inputs.batch, query_starts=starts, max_query_length=3)
    inputs = dataclasses.replace(inputs, batch=batch)
    check_attention(attend(inputs, implementation), inputs, implementation=implementation)


@pytest.mark.parametrize("num_sequences", [0, 2])
def test_a_batch_without_query_tokens_gives_an_empty_result(
    attend, implementation, device, num_sequences
):
    inputs = make_inputs(small(), device=device)
    empty = AttentionBatch(
        inputs.batch.block_tables[:num_sequences],
        inputs.batch.kv_lengths[:num_sequences],
        torch.zeros(num_sequences + 1, dtype=torch.int32, device=device),
        inputs.batch.slots[:0],
        0,
        0,
    )
    inputs = dataclasses.replace(inputs, query=inputs.query[:0], batch=empty)
    out = attend(inputs, implementation)
    assert out.shape == (0, 4, 64)


@pytest.mark.parametrize("lengths", [{}, MIXED], ids=["decode", "mixed"])
def test_queries_and_outputs_may_be_strided(attend, implementation, device, lengths):
    inputs = make_inputs(small(**lengths), device=device)
    tokens = inputs.query.shape[0]
    fused = torch.full((tokens, 4 + 2 + 2, 64), torch.nan, dtype=torch.float16, device=device)
    fused[:, :4] = inputs.query
    out = torch.full((tokens, 6, 64), 7.0, dtype=torch.float16, device=device)
    attend(dataclasses.replace(inputs, query=fused[:, :4]), implementation, out=out[:, :4])
    check_attention(out[:, :4], inputs, implementation=implementation)
    assert (out[:, 4:] == 7).all()


def test_a_cache_in_another_layout_is_read_by_its_strides(attend, implementation, device):
    inputs = make_inputs(small(), device=device)
    cache = dataclasses.replace(
        inputs.cache,
        key=inputs.cache.key.transpose(1, 2).contiguous().transpose(1, 2),
        value=inputs.cache.value.transpose(1, 2).contiguous().transpose(1, 2),
    )
    assert cache.key.stride() != inputs.cache.key.stride()
    inputs = dataclasses.replace(inputs, cache=cache)
    check_attention(attend(inputs, implementation), inputs, implementation=implementation)


def test_the_scale_multiplies_the_scores(attend, implementation, device):
    inputs = make_inputs(small(), device=device)
    halved = dataclasses.replace(inputs, query=inputs.query * 0.5)
    check_attention(
        attend(inputs, implementation, scale=0.5 / 8), halved, implementation=implementation
    )


def test_large_scores_do_not_overflow(attend, implementation, device):
    inputs = make_inputs(small(), device=device)
    large = dataclasses.replace(inputs, query=inputs.query * 1000)
    check_attention(attend(large, implementation), large, implementation=implementation)


def test_the_default_implementation_is_right(device):
    inputs = make_inputs(small(), device=device)
    check_attention(attention(inputs.query, inputs.cache, inputs.batch), inputs)
