"""Everything works on another GPU than the current one, which stays what it was."""

import numpy as np
import pytest
import torch

from pagedattn import BlockManager, KVCache, PageTable
from pagedattn.attention import AttentionBatch, Rotary, attention, rotary_write_kv
from pagedattn.kv_swap import BlockSwapper, HostKVCache
from pagedattn.testing import AttentionInputs, check_attention, make_inputs
from pagedattn.workloads import AttentionShape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

OTHER = "cuda:1"
BLOCK = 16


@pytest.fixture(autouse=True)
def the_current_gpu_stays():
    assert torch.cuda.current_device() == 0
    yield
    assert torch.cuda.current_device() == 0


def made(num_blocks):
    cache = KVCache(
        num_layers=2, num_blocks=num_blocks, block_size=BLOCK, num_kv_heads=2,
        head_size=64, dtype=torch.bfloat16, device=OTHER,
    )  # fmt: skip
    cache.storage.normal_()
    return cache


@pytest.mark.implementations("own")
@pytest.mark.parametrize("queries", [1, 200])
def test_attention_reads_and_writes_there(attend, implementation, write, queries):
    shape = AttentionShape("other", (queries,) * 2, (300, 200), 8, 2, 64, 16, "bfloat16")
    inputs = make_inputs(shape, device=OTHER)
    slots = inputs.batch.slots
    write(inputs.key, inputs.value, inputs.cache, slots, implementation=implementation)
    check_attention(attend(inputs, implementation), inputs, implementation=implementation)


@pytest.mark.parametrize("heads", [(8, 2), (8, 1)], ids=str)
def test_a_long_row_is_merged_there(heads):
    shape = AttentionShape("long", (1,), (20_000,), *heads, 128, 16, "bfloat16")
    inputs = make_inputs(shape, device=OTHER)
    for _ in range(3):
        check_attention(attention(inputs.query, inputs.cache, inputs.batch), inputs)


def test_a_captured_graph_decodes_there_step_by_step_over_a_shared_prefix():
    manager = BlockManager(400, BLOCK)
    ids = manager.fork(manager.allocate([100 * BLOCK]), 12)
    manager.append(ids, np.arange(1, 13))
    cache = made(400)
    batch = AttentionBatch.of(PageTable.of(manager, ids), 1, OTHER, 200 * BLOCK, share=True)
    query = torch.randn((12, 8, 64), dtype=torch.bfloat16, device=OTHER)
    key, value = torch.randn((2, 12, 2, 64), dtype=torch.bfloat16, device=OTHER)
    positions = torch.full((12,), 7, device=OTHER)
    rotary = Rotary.of(10_000.0 ** (-torch.arange(0, 64, 2, device=OTHER) / 64), 100)
    turned, out = torch.empty_like(query), torch.empty_like(query)

    def step():
        rotary_write_kv(
            query, key, value, cache.layer(0), batch.slots, positions, rotary, out=turned
        )
        attention(turned, cache.layer(0), batch, out=out)

    step()
    torch.cuda.synchronize(OTHER)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(OTHER)):
        step()
    for grown in (1, 1, 16, 1):
        cache.copy_blocks(manager.append(ids, grown))
        batch.advance(PageTable.of(manager, ids))
        for drawn in (query, key, value):
            drawn.normal_()
        out.fill_(torch.nan)
        with torch.cuda.device(OTHER):
            graph.replay()
        inputs = AttentionInputs(turned, key, value, cache.layer(0), batch.without_sharing())
        check_attention(out, inputs)
        stored = cache.layer(0).value[batch.slots // BLOCK, :, batch.slots % BLOCK]
        assert torch.equal(stored, value)


def test_blocks_are_copied_and_swapped_there():
    manager = BlockManager(12, BLOCK, num_host_blocks=20, prefix_caching=False)
    cache = made(12)
    host = HostKVCache(cache, 20)
    swapper = BlockSwapper(cache, host, staging_bytes=4 * host.blocks[0].nbytes)
    (first,) = manager.allocate([5 * BLOCK + 3])
    table, (length,) = manager.block_tables([first])
    expected = [cache.gather(layer, table[0], int(length)) for layer in range(2)]
    manager.swap_out([first], copy=swapper.swap_out)
    cache.storage.fill_(torch.nan)
    manager.swap_in([first], copy=swapper.swap_in)
    (second,) = manager.fork([first])
    copies = manager.append([second], 1)
    assert len(copies)
    cache.copy_blocks(copies)
    for sequence, more in ((first, 0), (second, 1)):
        table, (length,) = manager.block_tables([sequence])
        assert length == 5 * BLOCK + 3 + more
        for layer, parts in enumerate(expected):
            got = cache.gather(layer, table[0], 5 * BLOCK + 3)
            assert all(torch.equal(a, b) for a, b in zip(got, parts, strict=True))
