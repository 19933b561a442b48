"""Parts of random inputs are the inputs that they are said to be."""

import numpy as np
import pytest
import torch

from pagedattn.attention import attention
from pagedattn.testing import last_queries, make_inputs, make_rotation
from pagedattn.workloads import AttentionShape

CASES = {
    "decode": ((1,) * 5, (30, 1, 64, 17, 40), 0),
    "mixed": ((1, 20, 3, 7, 1), (30, 20, 64, 17, 40), 0),
    "shared": ((1, 2, 1, 9, 1), (70, 80, 64, 90, 66), 48),
}


@pytest.mark.parametrize("options", [{}, {"window": 9, "alibi": True}], ids=["plain", "window"])
@pytest.mark.parametrize("case", CASES)
def test_last_queries_of_some_sequences_attend_as_in_the_whole_batch(case, options):
    queries, lengths, prefix = CASES[case]
    shape = AttentionShape("test", queries, lengths, 4, 2, 16, 8, "float32", shared_prefix=prefix)
    inputs = make_inputs(shape, **options)
    part, rows = last_queries(inputs, np.array([3, 0, 2]), 4)
    taken = [min(queries[sequence], 4) for sequence in (3, 0, 2)]
    ends = np.cumsum(queries)[[3, 0, 2]]
    expected = [
        row for end, count in zip(ends, taken, strict=True) for row in range(end - count, end)
    ]
    assert rows.tolist() == expected
    assert torch.equal(part.key, inputs.key[rows])
    assert torch.equal(part.value, inputs.value[rows])
    whole, of_part = (
        attention(x.query, x.cache, x.batch, implementation="reference", **x.options)
        for x in (inputs, part)
    )
    torch.testing.assert_close(of_part, whole[rows])


OF_SHAPE = {"window": 9, "soft_cap": 5.0, "alibi": True, "sinks": True}


def of_shape(lengths=(30, 5, 64), **options):
    return AttentionShape("test", (1, 3, 20), lengths, 4, 2, 16, 8, "float32", **options)


@pytest.mark.parametrize("option", OF_SHAPE)
def test_an_option_of_the_shape_is_as_one_that_is_asked_for(option):
    said = {option: OF_SHAPE[option]}
    of_call, plain = make_inputs(of_shape(), **said), make_inputs(of_shape())
    for inputs in (make_inputs(of_shape(**said)), make_inputs(of_shape(**said), **said)):
        assert inputs.call().features == of_call.call().features == {option}
        assert plain.call().features == set()
        out, expected = (
            attention(x.query, x.cache, x.batch, implementation="reference", **x.options)
            for x in (inputs, of_call)
        )
        torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_a_number_that_is_asked_for_comes_before_the_shape_s_and_false_keeps_it():
    inputs = make_inputs(of_shape(**OF_SHAPE), window=3, soft_cap=2.0, alibi=False, sinks=False)
    assert (inputs.window, inputs.soft_cap) == (3, 2.0)
    assert inputs.call().features == set(OF_SHAPE)


def test_last_queries_have_the_options_of_the_whole_batch():
    inputs = make_inputs(of_shape(**OF_SHAPE))
    part, _ = last_queries(inputs, np.array([2, 0]), 4)
    for option, value in inputs.options.items():
        assert part.options[option] is value


@pytest.mark.parametrize("kv_dtype", [None, "float8_e4m3"])
@pytest.mark.parametrize("window", [1, 8, 9, 44, 45, 64])
def test_a_window_leaves_in_the_cache_what_some_query_sees_and_nan_before_it(window, kv_dtype):
    shape = of_shape(window=window, kv_dtype=kv_dtype)
    rotation = make_rotation(shape, 2)
    blocks = 0
    for inputs in rotation:
        cache, tables = inputs.cache, inputs.batch.block_tables.tolist()
        for queries, length, table in zip(
            shape.query_lengths, shape.kv_lengths, tables, strict=True
        ):
            first = max(0, length - queries - window + 1)
            blocks += -(-length // 8) - first // 8
            slots = [(table[at // 8], at % 8) for at in range(length)]
            is_nan = [bool(cache.key[block, :, at].float().isnan().all()) for block, at in slots]
            has_nan = [bool(cache.value[block, :, at].float().isnan().any()) for block, at in slots]
            assert is_nan == has_nan == [at < first for at in range(length)]
    assert rotation[0].cache.key.shape[0] == blocks + 1  # and one of NaN alone


def test_shared_blocks_that_have_left_a_window_that_is_asked_for_are_the_one_of_nan():
    shape = AttentionShape("test", (1, 2), (70, 80), 4, 2, 16, 8, "float32", shared_prefix=48)
    inputs = make_inputs(shape, window=9)
    last = inputs.cache.key.shape[0] - 1
    assert inputs.cache.key[last].isnan().all()
    is_last = (inputs.batch.block_tables == last).tolist()
    for row, (first, blocks) in zip(is_last, ((61 // 8, 9), (70 // 8, 10)), strict=True):
        assert row == [not first <= column < blocks for column in range(len(row))]


def test_a_shared_block_that_one_sequence_sees_is_left_for_it():
    shape = AttentionShape("test", (1, 1), (70, 74), 4, 2, 16, 8, "float32", shared_prefix=48)
    for window in (9, 30, 60):
        inputs = make_inputs(shape, window=window)
        out = attention(
            inputs.query, inputs.cache, inputs.batch, implementation="reference", **inputs.options
        )
        assert out.isfinite().all()
