"""What bookkeeping itself costs: host memory a block, and a step that lengths do not slow."""

import gc
import time
import tracemalloc

import numpy as np
import pytest

from pagedattn import BlockManager
from pagedattn.workloads import AZURE_CONVERSATION

MOST_BYTES_A_BLOCK = 64


def bytes_a_block(lengths, block_size, **options):
    """Host memory of a full pool, all in it admitted with its tokens."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 128_000, length, dtype=np.int32) for length in lengths]
    num_blocks = int((-(-lengths // block_size)).sum())
    gc.collect()
    tracemalloc.start()
    try:
        manager = BlockManager(num_blocks, block_size, **options)
        manager.admit(prompts)
        gc.collect()
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert manager.num_free_blocks == 0
    return used / num_blocks


@pytest.mark.parametrize("caching", [True, False], ids=["caching", "no caching"])
@pytest.mark.parametrize("workload", ["uniform-100-1024", "azure-conversation", "one-long"])
def test_a_full_pool_takes_no_more_than_64_bytes_a_block(workload, caching):
    rng = np.random.default_rng(0)
    lengths = {
        "uniform-100-1024": lambda: rng.integers(100, 1025, 512),
        "azure-conversation": lambda: AZURE_CONVERSATION.sample(rng, 512)[0],
        "one-long": lambda: np.array([1_000_000, *rng.integers(200, 400, 200)]),
    }[workload]()
    assert bytes_a_block(lengths, 16, prefix_caching=caching) <= MOST_BYTES_A_BLOCK


def test_memory_does_not_grow_while_sequences_come_and_go():
    manager = BlockManager(4096, 16)
    rng = np.random.default_rng(0)

    def serve(rounds):
        for _ in range(rounds):
            prompts = [rng.integers(0, 1000, n) for n in rng.integers(1, 1500, 20)]
            ids = manager.admit(prompts).sequence_ids
            for _ in range(20):
                manager.append(ids, token_ids=rng.integers(0, 1000, ids.size))
            step = manager.start_step()
            manager.free(ids)
            manager.finish_step(step)

    serve(30)
    gc.collect()
    tracemalloc.start()
    try:
        serve(60)
        gc.collect()
        grown, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert manager.statistics().num_evicted_blocks > 4096
    assert grown < 8 * manager.num_blocks
    manager.check_integrity()


def fastest_steps(*shapes, rounds=1000):
    """The least seconds that a step takes, for each (sequences, length).

    They step by turns, so that a slow moment of the machine meets them all.
    """
    managers = []
    for num_sequences, length in shapes:
        manager = BlockManager(num_sequences * (length // 16 + rounds // 16 + 3), 16)
        managers.append((manager, manager.allocate(length + np.arange(num_sequences) % 16)))
    fastest = [float("inf")] * len(shapes)
    for _ in range(rounds):
        for number, (manager, ids) in enumerate(managers):
            start = time.perf_counter()
            manager.append(ids)
            fastest[number] = min(fastest[number], time.perf_counter() - start)
    return fastest


@pytest.mark.undisturbed
def test_a_steps_cost_does_not_grow_with_the_sequences_lengths():
    short, long = fastest_steps((256, 100), (256, 100_000))
    assert long < 1.5 * short


@pytest.mark.undisturbed
def test_a_steps_cost_grows_at_most_linearly_with_the_sequences():
    few, many = fastest_steps((256, 100), (4096, 100))
    assert many < 16 * few
