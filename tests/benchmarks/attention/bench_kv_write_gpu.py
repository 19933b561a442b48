"""Writing a step's K and V into random slots on a GPU."""

import pytest
import torch

from pagedattn.attention import write_kv
from pagedattn.benchmarking import DEVICE_CLOCK, LaunchGraph, rotation_size
from pagedattn.benchmarking.attention_rows import peak_memory
from pagedattn.kv_cache import KVCache
from pagedattn.peers import IndexPut, register_kernels

pytestmark = [pytest.mark.gpu, pytest.mark.benchmark(timer=DEVICE_CLOCK)]

register_kernels()

NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 8, 128, 16


@pytest.mark.parametrize(
    "implementation",
    [
        *("triton", "index_put"),
        # vLLM and what it imports warn of their own affairs
        pytest.param("vllm_cuda", marks=[pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]),
    ],
)
@pytest.mark.parametrize("num_tokens", [256, 8192])
def bench_kv_write(benchmark, num_tokens, implementation, roofs):
    token_bytes = 2 * NUM_KV_HEADS * HEAD_SIZE * torch.bfloat16.itemsize
    moved = num_tokens * (2 * token_bytes + 8)
    count = rotation_size(moved)
    num_blocks = -(-count * num_tokens // BLOCK_SIZE)
    cache = KVCache(
        num_layers=1,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        num_kv_heads=NUM_KV_HEADS,
        head_size=HEAD_SIZE,
        dtype=torch.bfloat16,
        device="cuda",
    ).layer(0)
    new = torch.randn(
        (2, count, num_tokens, NUM_KV_HEADS, HEAD_SIZE), dtype=torch.bfloat16, device="cuda"
    )
    slots = torch.randperm(cache.num_slots, device="cuda")[: count * num_tokens]
    slots = slots.view(count, num_tokens)

    def prepare(key, value, places):
        if implementation == "index_put":
            return IndexPut().prepare(key, value, cache, places)
        return lambda: write_kv(key, value, cache, places, implementation=implementation)

    launches = [prepare(new[0, i], new[1, i], slots[i]) for i in range(count)]
    cache.key.fill_(torch.nan)
    cache.value.fill_(torch.nan)
    peak_bytes = peak_memory(launches[0])
    blocks, offsets = slots[0] // BLOCK_SIZE, slots[0] % BLOCK_SIZE
    assert torch.equal(cache.key[blocks, :, offsets], new[0, 0])
    assert torch.equal(cache.value[blocks, :, offsets], new[1, 0])
    assert int(cache.key.isnan().sum()) == cache.key.numel() - new[0, 0].numel()

    graph = LaunchGraph(launches)
    benchmark.group = f"kv-write-{num_tokens}"
    benchmark.pedantic(lambda: DEVICE_CLOCK.advance(graph.replay()), rounds=20, warmup_rounds=3)
    benchmark.extra_info.update(
        area="kv_write",
        implementation=implementation,
        workload=f"kv-write-{num_tokens}",
        device="cuda",
        num_tokens=num_tokens,
        num_kv_heads=NUM_KV_HEADS,
        head_size=HEAD_SIZE,
        block_size=BLOCK_SIZE,
        dtype="bfloat16",
        bytes=moved,
        limit_us=moved / roofs.copy_gb_per_s * 1e-3,
        error=0.0,
        error_budget=0.0,
        peak_memory_bytes=peak_bytes,
        host_us=graph.host_seconds * 1e6,
        rotation=count,
    )
    if benchmark.enabled:
        rate = moved / benchmark.stats.stats.median * 1e-9
        benchmark.extra_info.update(
            gb_per_s=rate,
            measured_read_gb_per_s=roofs.read_gb_per_s,
            share_of_bandwidth=rate / roofs.read_gb_per_s,
        )
