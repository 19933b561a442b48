"""What only a GPU can show: graphs that follow new lengths, and pools past 32-bit offsets."""

import dataclasses

import numpy as np
import pytest
import torch

from pagedattn import KVCache, PageTable
from pagedattn.attention import AttentionBatch, attention, write_kv
from pagedattn.kv_cache import dequantised, quantised
from pagedattn.testing import AttentionInputs, check_attention, make_inputs
from pagedattn.workloads import AttentionShape, find_shape

pytestmark = pytest.mark.gpu

BLOCK_SIZE, HEADS, KV_HEADS, HEAD_SIZE = 16, 8, 2, 128


def random_step(rng, query_lengths, num_blocks, longest):
    """A page table over shuffled blocks, with random lengths that fit the queries."""
    lengths = rng.integers(np.maximum(query_lengths, 1), longest + 1)
    width = -(-longest // BLOCK_SIZE)
    tables = rng.permutation(num_blocks)[: len(lengths) * width].reshape(len(lengths), width)
    table = PageTable(BLOCK_SIZE, tables.astype(np.int32), lengths)
    return AttentionBatch.of(table, query_lengths, "cuda")


@pytest.mark.parametrize("longest", [40, 3000])
@pytest.mark.parametrize("query_lengths", [[1] * 9, [4] * 3, [200, 1, 1, 17]], ids=str)
def test_a_captured_step_follows_lengths_tables_and_slots_updated_in_place(query_lengths, longest):
    rng = np.random.default_rng(0)
    query_lengths = np.array(query_lengths)
    longest += int(query_lengths.max())
    num_blocks = len(query_lengths) * (-(-longest // BLOCK_SIZE))
    cache = KVCache(
        num_layers=1, num_blocks=num_blocks, block_size=BLOCK_SIZE, num_kv_heads=KV_HEADS,
        head_size=HEAD_SIZE, dtype=torch.bfloat16, device="cuda",
    )  # fmt: skip
    cache.storage.normal_()
    batch = dataclasses.replace(
        random_step(rng, query_lengths, num_blocks, longest), max_kv_length=longest
    )
    tokens = int(query_lengths.sum())
    query = torch.randn((tokens, HEADS, HEAD_SIZE), dtype=torch.bfloat16, device="cuda")
    key, value = torch.randn((2, tokens, KV_HEADS, HEAD_SIZE), dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(query)

    def step():
        write_kv(key, value, cache.layer(0), batch.slots)
        attention(query, cache.layer(0), batch, out=out)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(5):
        batch.update(random_step(rng, query_lengths, num_blocks, longest))
        query.normal_()
        key.normal_()
        value.normal_()
        out.fill_(torch.nan)
        graph.replay()
        inputs = AttentionInputs(query, key, value, cache.layer(0), batch)
        check_attention(out, inputs)
        blocks, offsets = batch.slots // BLOCK_SIZE, batch.slots % BLOCK_SIZE
        assert torch.equal(cache.layer(0).key[blocks, :, offsets], key)
        assert torch.equal(cache.layer(0).value[blocks, :, offsets], value)


@pytest.mark.parametrize("queries", [1, 40])
def test_a_captured_step_with_every_option_follows_a_table_that_grows(queries):
    cache = KVCache(
        num_layers=1, num_blocks=400, block_size=BLOCK_SIZE, num_kv_heads=KV_HEADS,
        head_size=HEAD_SIZE, dtype=torch.float8_e4m3fn, device="cuda",
    )  # fmt: skip
    cache.scales.uniform_(0.0125, 0.0375)
    layer, longest = cache.layer(0), 200 * BLOCK_SIZE
    everything = torch.randn((2, cache.layer(0).num_slots, KV_HEADS, HEAD_SIZE), device="cuda")
    write_kv(*everything, layer, torch.arange(layer.num_slots, device="cuda"))
    tables = np.random.default_rng(0).permutation(400).astype(np.int32).reshape(2, 200)

    def step_of(lengths, bound=None):
        width = -(-lengths.max() // BLOCK_SIZE)
        table = PageTable(BLOCK_SIZE, np.ascontiguousarray(tables[:, :width]), lengths)
        return AttentionBatch.of(table, queries, "cuda", max_kv_length=bound)

    batch = step_of(np.array([queries, queries]), longest)
    query = torch.randn((2 * queries, HEADS, HEAD_SIZE), dtype=torch.bfloat16, device="cuda")
    slopes, sinks = torch.rand((2, HEADS), device="cuda")
    inputs = AttentionInputs(query, query, query, layer, batch, 700, 20.0, slopes, sinks)

    def step():
        return attention(query, layer, batch, return_lse=True, **inputs.options)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = step()
    for length in (40, 48, 49, 700, 740, 2049, longest):
        batch.update(step_of(np.array([length, max(queries, length // 2)])))
        graph.replay()
        check_attention(out, inputs, lse)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_step_never_waits_for_the_gpu():
    inputs = make_inputs(find_shape("decode-B8-1k"), device="cuda")
    write_kv(inputs.key, inputs.value, inputs.cache, inputs.batch.slots)
    attention(inputs.query, inputs.cache, inputs.batch)
    try:
        torch.cuda.set_sync_debug_mode("error")
        write_kv(inputs.key, inputs.value, inputs.cache, inputs.batch.slots)
        attention(inputs.query, inputs.cache, inputs.batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("query_length", [1, 40])
def test_a_pool_of_more_than_2_to_the_31_elements_is_addressed(
    attend, write, implementation, query_length, dtype
):
    block_elements = 2 * KV_HEADS * BLOCK_SIZE * HEAD_SIZE
    num_blocks = 2**31 // block_elements + 64
    free_bytes, _ = torch.cuda.mem_get_info()
    if free_bytes < 1.5 * num_blocks * block_elements * dtype.itemsize:
        pytest.skip("needs 6 GB of free GPU memory")
    cache = KVCache(
        num_layers=1, num_blocks=num_blocks, block_size=BLOCK_SIZE, num_kv_heads=KV_HEADS,
        head_size=HEAD_SIZE, dtype=dtype, device="cuda",
    )  # fmt: skip
    cache.storage.fill_(torch.nan)
    if cache.scales is not None:
        cache.scales.uniform_(0.0125, 0.0375)
    lengths = np.array([300, 47])
    tables = np.zeros((2, 19), dtype=np.int32)
    tables[0] = np.arange(num_blocks - 20, num_blocks - 1)[::-1]
    tables[1, :3] = [0, num_blocks - 1, 5]
    table = PageTable(BLOCK_SIZE, tables, lengths)
    everything = torch.from_numpy(table.slots(lengths)).cuda()
    assert int(everything.max()) * KV_HEADS * HEAD_SIZE * 2 > 2**31
    key, value = torch.randn(
        (2, int(lengths.sum()), KV_HEADS, HEAD_SIZE), dtype=torch.float16, device="cuda"
    )
    layer = cache.layer(0)
    write(key, value, layer, everything, implementation=implementation)
    gathered, _ = cache.gather(0, tables[0], 300)
    stored = quantised(key[:300], layer.key_scale, dtype)
    assert torch.equal(gathered, dequantised(stored, layer.key_scale, dtype))
    batch = AttentionBatch.of(table, query_length, "cuda")
    query = torch.randn((2 * query_length, HEADS, HEAD_SIZE), dtype=torch.float16, device="cuda")
    inputs = AttentionInputs(query, key, value, layer, batch)
    check_attention(attend(inputs, implementation), inputs, implementation=implementation)


@pytest.mark.parametrize("num_sequences", [1, 2, 131, 132, 133, 300, 1025])
def test_work_is_cut_right_for_any_number_of_sequences(num_sequences):
    rng = np.random.default_rng(num_sequences)
    lengths = tuple(int(n) for n in rng.integers(1, 700, num_sequences))
    shape = AttentionShape("cut", (1,) * num_sequences, lengths, 4, 2, 64, 16, "bfloat16")
    inputs = make_inputs(shape, device="cuda")
    check_attention(attention(inputs.query, inputs.cache, inputs.batch), inputs)


@pytest.mark.parametrize("context", [5_000, 131_072])
def test_one_long_sequence_is_spread_over_the_gpu_and_merged(context):
    shape = AttentionShape("long", (1,), (context,), 8, 1, 128, 16, "bfloat16")
    inputs = make_inputs(shape, device="cuda")
    check_attention(attention(inputs.query, inputs.cache, inputs.batch), inputs)
