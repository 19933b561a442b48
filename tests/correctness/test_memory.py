"""Bytes, blocks and waste: exact arithmetic."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedattn.config import ConfigError, ModelConfig
from pagedattn.memory import (
    kv_bytes_per_block,
    kv_bytes_per_token,
    num_blocks_for,
    num_blocks_in,
    wasted_slots,
)

OPT_13B = ModelConfig.preset("opt-13b")


@pytest.mark.parametrize(
    ("name", "num_bytes"),
    [
        ("gpt2", 73_728),
        ("opt-13b", 819_200),
        ("llama-2-7b", 524_288),
        ("llama-3-8b", 131_072),
        ("qwen3-0.6b", 114_688),
        ("smollm2-135m", 23_040),
    ],
)
def test_bytes_a_token_follow_kv_heads_and_head_size(name, num_bytes):
    assert kv_bytes_per_token(ModelConfig.preset(name)) == num_bytes


@pytest.mark.parametrize(
    ("dtype", "num_bytes"),
    [(None, 819_200), ("bfloat16", 819_200), ("float32", 1_638_400), ("float8_e4m3", 409_600)],
)
def test_the_caches_dtype_replaces_the_models(dtype, num_bytes):
    assert kv_bytes_per_token(OPT_13B, dtype) == num_bytes
    assert kv_bytes_per_block(OPT_13B, 16, dtype) == 16 * num_bytes


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ConfigError, match=r"dtype must be one of .*float8_e4m3.*, not 'int4'"):
        kv_bytes_per_token(OPT_13B, "int4")


def test_only_whole_blocks_fit_in_a_budget():
    block_bytes = kv_bytes_per_block(OPT_13B, 16)
    assert num_blocks_in(0, OPT_13B, 16) == 0
    assert num_blocks_in(block_bytes - 1, OPT_13B, 16) == 0
    assert num_blocks_in(block_bytes, OPT_13B, 16) == 1
    assert num_blocks_in(3.99 * block_bytes, OPT_13B, 16) == 3
    assert num_blocks_in(12 * 2**30, OPT_13B, 16) == 983


@pytest.mark.parametrize("budget", [-1, math.nan, math.inf, True, "12"], ids=repr)
def test_a_budget_that_is_no_number_of_bytes_is_refused(budget):
    with pytest.raises(ValueError, match="budget_bytes"):
        num_blocks_in(budget, OPT_13B, 16)


@pytest.mark.parametrize(
    ("num_tokens", "num_blocks", "wasted"),
    [(0, 0, 0), (1, 1, 3), (3, 1, 1), (4, 1, 0), (5, 2, 3), (7, 2, 1), (8, 2, 0)],
)
def test_the_last_block_may_be_part_filled(num_tokens, num_blocks, wasted):
    assert num_blocks_for(num_tokens, 4) == num_blocks
    assert wasted_slots(num_tokens, 4) == wasted


@given(st.integers(0, 2**62), st.integers(1, 2**20))
def test_blocks_hold_the_tokens_and_waste_less_than_one_block(num_tokens, block_size):
    num_blocks = num_blocks_for(num_tokens, block_size)
    wasted = wasted_slots(num_tokens, block_size)
    assert num_blocks * block_size == num_tokens + wasted
    assert 0 <= wasted < block_size


@pytest.mark.parametrize("dtype", ["uint8", "int32", "uint32", "int64", "uint64"])
def test_an_array_gives_an_array_that_agrees_with_integers(dtype):
    tokens = np.array([[0, 1, 3], [4, 7, 255]], dtype=dtype)
    before = tokens.copy()
    blocks, wasted = num_blocks_for(tokens, 3), wasted_slots(tokens, 3)
    assert blocks.dtype == wasted.dtype == np.int64
    assert blocks.tolist() == [[num_blocks_for(int(n), 3) for n in row] for row in tokens]
    assert wasted.tolist() == [[wasted_slots(int(n), 3) for n in row] for row in tokens]
    np.testing.assert_array_equal(tokens, before)


def test_an_empty_batch_needs_no_blocks():
    empty = np.array([], dtype=np.int32)
    assert num_blocks_for(empty, 16).shape == wasted_slots(empty, 16).shape == (0,)


@pytest.mark.parametrize(
    "num_tokens",
    [-1, 1.0, True, "7", [7], np.array([1, -1]), np.array([1.0]), np.array([2**63], np.uint64)],
    ids=repr,
)
@pytest.mark.parametrize("function", [num_blocks_for, wasted_slots])
def test_token_counts_that_are_negative_or_no_integers_are_refused(function, num_tokens):
    with pytest.raises(ValueError, match="num_tokens must"):
        function(num_tokens, 16)


@pytest.mark.parametrize("block_size", [0, -16, True, 16.0], ids=repr)
def test_a_block_size_that_is_no_positive_integer_is_refused(block_size):
    for call in (
        lambda: num_blocks_for(7, block_size),
        lambda: wasted_slots(np.array([7]), block_size),
        lambda: kv_bytes_per_block(OPT_13B, block_size),
        lambda: num_blocks_in(2**30, OPT_13B, block_size),
    ):
        with pytest.raises(ConfigError, match="block_size must be a positive integer"):
            call()


def test_query_heads_and_hidden_size_cost_no_cache():
    wider = dataclasses.replace(OPT_13B, num_query_heads=80, hidden_size=1)
    assert kv_bytes_per_token(wider) == kv_bytes_per_token(OPT_13B)
