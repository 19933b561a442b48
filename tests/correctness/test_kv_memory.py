"""What K and V cost a GPU: windows, hybrid layers, tensor parallelism, scales, weights."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedattn import BlockManager
from pagedattn.config import ConfigError, ModelConfig
from pagedattn.memory import KVMemory, kv_bytes_per_token, num_blocks_held, num_blocks_in

LLAMA_3_8B = ModelConfig.preset("llama-3-8b")
GEMMA_3_27B = ModelConfig.preset("gemma-3-27b")
GPT_OSS_20B = ModelConfig.preset("gpt-oss-20b")
HYBRID = dataclasses.replace(
    LLAMA_3_8B,
    num_layers=4,
    layer_types=("without_kv", "without_kv", "without_kv", "full_attention"),
)
GIB = 2**30


@pytest.mark.parametrize(
    ("gpus", "heads", "num_bytes"),
    [(1, 8, 131_072), (2, 4, 65_536), (8, 1, 16_384), (16, 1, 16_384), (32, 1, 16_384)],
)
def test_a_gpu_keeps_its_share_of_the_kv_heads_and_never_less_than_one(gpus, heads, num_bytes):
    memory = KVMemory(LLAMA_3_8B, tensor_parallel_size=gpus)
    assert (memory.kv_heads_per_gpu, memory.bytes_per_token) == (heads, num_bytes)


@pytest.mark.parametrize(
    ("name", "gpus"), [("llama-3-8b", 3), ("llama-3-8b", 64), ("gpt2", 8), ("smollm2-135m", 2)]
)
def test_heads_that_cannot_be_dealt_out_evenly_are_refused(name, gpus):
    with pytest.raises(ConfigError, match=rf"tensor_parallel_size must deal out .*, not {gpus}\."):
        KVMemory(ModelConfig.preset(name), tensor_parallel_size=gpus)


def test_fewer_kv_heads_than_gpus_must_divide_them():
    # 6 query heads go to 6 GPUs, but 2 of the 4 KV heads would have one GPU more than the others
    model = dataclasses.replace(LLAMA_3_8B, num_query_heads=12, num_kv_heads=4)
    with pytest.raises(ConfigError, match="12 query heads and 4 KV heads evenly, not 6"):
        KVMemory(model, tensor_parallel_size=6)
    assert KVMemory(model, tensor_parallel_size=12).kv_heads_per_gpu == 1


@pytest.mark.parametrize(
    ("scales", "token_bytes", "once"),
    [
        ("none", 65_536, 0),
        ("per-tensor", 65_536, 2 * 32 * 4),
        ("per-head", 65_536, 2 * 32 * 8 * 4),
        ("per-token-head", 65_536 + 2 * 32 * 8 * 4, 0),
    ],
)
def test_fp8_takes_a_byte_an_element_and_its_scales(scales, token_bytes, once):
    memory = KVMemory(LLAMA_3_8B, dtype="float8_e4m3", scales=scales)
    assert (memory.bytes_per_token, memory.scale_bytes) == (token_bytes, once)
    assert memory.num_blocks_in(7 * 16 * token_bytes + once) == 7
    assert memory.num_blocks_in(7 * 16 * token_bytes + once - 1) == 6


def test_scales_follow_the_heads_of_a_gpu():
    memory = KVMemory(LLAMA_3_8B, dtype="float8_e4m3", scales="per-head", tensor_parallel_size=4)
    assert memory.scale_bytes == 2 * 32 * 2 * 4


def test_a_budget_under_the_scales_holds_nothing():
    memory = KVMemory(LLAMA_3_8B, dtype="float8_e4m3", scales="per-head")
    assert memory.num_blocks_in(100) == 0


def test_scales_without_8_bits_and_unknown_ones_are_refused():
    with pytest.raises(ConfigError, match="scales must be none for a cache in bfloat16"):
        KVMemory(LLAMA_3_8B, scales="per-tensor")
    with pytest.raises(ConfigError, match=r"scales must be one of .*, not 'per-block'"):
        KVMemory(LLAMA_3_8B, dtype="float8_e4m3", scales="per-block")
    with pytest.raises(ConfigError, match="tensor_parallel_size must be a positive integer"):
        KVMemory(LLAMA_3_8B, tensor_parallel_size=0)


def test_layers_without_kv_cost_none():
    assert KVMemory(HYBRID).bytes_per_token == 2 * 1 * 8 * 128 * 2
    assert kv_bytes_per_token(HYBRID) == KVMemory(HYBRID).bytes_per_token
    assert KVMemory(HYBRID).pool_windows == (None,)
    assert num_blocks_in(GIB, HYBRID, 16) == GIB // (16 * 4096)


@pytest.mark.parametrize(
    ("num_tokens", "window", "held"),
    [(0, 3, 0), (1, 1, 1), (7, None, 2), (7, 3, 1), (7, 4, 2), (8, 4, 1), (9, 4, 2), (100, 1, 1)],
)
def test_blocks_before_the_window_of_the_newest_token_are_given_back(num_tokens, window, held):
    assert num_blocks_held(num_tokens, 4, window) == held
    assert num_blocks_held(np.array([[num_tokens]]), 4, window).tolist() == [[held]]


@settings(max_examples=60)
@given(st.integers(1, 5), st.integers(1, 12), st.integers(1, 40))
def test_a_sequence_holds_what_the_block_manager_says(block_size, window, num_tokens):
    manager = BlockManager(64, block_size, windows=(None, window))
    (sequence,) = manager.allocate([1])
    for length in range(1, num_tokens + 1):
        held = [num_blocks_held(length, block_size, w) for w in (None, window)]
        assert manager.num_blocks - manager.num_free_blocks == sum(held)
        manager.append([sequence])


def test_a_window_bounds_what_a_layer_keeps():
    lengths = np.arange(1, 5000)
    held = num_blocks_held(lengths, 16, 128)
    assert held.max() == 9
    assert held[lengths >= 128].min() == 8


def test_a_sequences_bytes_are_summed_over_its_layers_kinds():
    # 10 layers of full attention and 52 with a window of 1024; 2 * 16 heads * 128 * 2 bytes
    memory = KVMemory(GEMMA_3_27B)
    layer_block = 16 * 2 * 16 * 128 * 2
    assert memory.bytes_of(1000) == 63 * 62 * layer_block
    assert memory.bytes_of(16_384) == (1024 * 10 + 64 * 52) * layer_block
    several = memory.bytes_of(np.array([1000, 16_384]))
    assert several.tolist() == [memory.bytes_of(1000), memory.bytes_of(16_384)]
    assert type(memory.bytes_of(1000)) is int


@pytest.mark.parametrize(
    ("model", "windows", "layers"),
    [
        (LLAMA_3_8B, (None,), 32),
        (GPT_OSS_20B, (None, 128), 12),
        (GEMMA_3_27B, (None,) * 5 + (1024,) * 26, 2),
        (ModelConfig.preset("mistral-7b-v0.1"), (4096,), 32),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_pools_blocks_are_of_one_size_for_all_kinds_of_layers(model, windows, layers):
    memory = KVMemory(model)
    assert memory.pool_windows == windows
    assert memory.bytes_per_pool_block == layers * 16 * memory.bytes_per_token_and_layer
    assert memory.bytes_per_pool_block * len(windows) == memory.bytes_per_block
    assert memory.num_pool_blocks_in(GIB) == GIB // memory.bytes_per_pool_block


def test_a_managers_pool_and_the_arithmetic_agree_on_a_sequences_bytes():
    memory = KVMemory(GPT_OSS_20B)
    manager = BlockManager(400, 16, windows=memory.pool_windows)
    (sequence,) = manager.allocate([1999])
    manager.append([sequence])
    used = manager.num_blocks - manager.num_free_blocks
    assert used * memory.bytes_per_pool_block == memory.bytes_of(2000)


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_weights_are_shared_out(gpus):
    weights = KVMemory(LLAMA_3_8B, tensor_parallel_size=gpus).weight_bytes
    assert weights == -(-LLAMA_3_8B.num_parameters * 2 // gpus)


def test_projections_to_repeated_kv_heads_weigh_on_every_gpu():
    # 16 GPUs keep 8 KV heads twice: K's and V's matrices of 8 more heads in 32 layers
    extra = 2 * 32 * 8 * 128 * 4096 * 2
    weights = KVMemory(LLAMA_3_8B, tensor_parallel_size=16).weight_bytes
    assert weights == -(-(LLAMA_3_8B.num_parameters * 2 + extra) // 16)


def test_unknown_weights_are_none():
    assert KVMemory(dataclasses.replace(LLAMA_3_8B, num_parameters=None)).weight_bytes is None
