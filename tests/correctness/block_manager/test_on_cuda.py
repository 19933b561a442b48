"""The block manager drives a cache on a GPU: copies on write, swaps, and real work in flight."""

import numpy as np
import pytest
import torch

from pagedattn import BlockManager, KVCache, PageTable

pytestmark = pytest.mark.gpu

SIZES = {"num_layers": 3, "block_size": 4, "num_kv_heads": 2, "head_size": 64}


def caches(num_blocks, num_host_blocks):
    device = KVCache(**SIZES, num_blocks=num_blocks, dtype=torch.bfloat16, device="cuda")
    host = KVCache(**SIZES, num_blocks=num_host_blocks, dtype=torch.bfloat16)
    device.storage.fill_(torch.nan)
    return device, host


def gather(cache, manager, sequence):
    table, (length,) = manager.block_tables([sequence])
    parts = [torch.cat(cache.gather(layer, table[0], int(length))) for layer in range(3)]
    return torch.stack(parts).cpu()


def write(cache, manager, ids, counts):
    """Write random K and V for the last tokens of each sequence, in all layers."""
    slots = torch.from_numpy(PageTable.of(manager, ids).slots(counts)).cuda()
    for layer in range(3):
        key, value = torch.randn((2, slots.numel(), 2, 64), device="cuda")
        cache.write(layer, key, value, slots)


def test_forks_diverge_and_groups_go_to_the_host_and_back():
    manager = BlockManager(12, 4, num_host_blocks=20, prefix_caching=False)
    device, host = caches(12, 20)
    rng = np.random.default_rng(0)
    (parent,) = manager.allocate([10])
    write(device, manager, [parent], 10)
    family = [int(parent), *manager.fork(parent, 2).tolist()]
    expected = {i: gather(device, manager, i) for i in family}
    for _ in range(20):
        writer = family[rng.integers(3)]
        if manager.can_append([writer]):
            device.copy_blocks(manager.append([writer]))
            write(device, manager, [writer], 1)
            expected[writer] = gather(device, manager, writer)
        manager.swap_out([parent], copy=lambda copies: host.copy_blocks(copies, device))
        assert manager.num_free_blocks == 12
        device.storage.fill_(torch.nan)
        manager.free(manager.allocate(rng.integers(1, 17, 3)))
        manager.swap_in([parent], copy=lambda copies: device.copy_blocks(copies, host))
        for sequence, contents in expected.items():
            got = gather(device, manager, sequence)
            assert torch.equal(got[:, :, : contents.shape[2]], contents)
        manager.check_integrity()


def test_blocks_wait_for_the_event_of_the_kernel_that_reads_them():
    manager = BlockManager(4, 4)
    device, _ = caches(4, 1)
    (sequence,) = manager.allocate([16])
    write(device, manager, [sequence], 16)
    torch.cuda.synchronize()
    before = device.storage.clone()
    reader, done = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(reader):
        torch.cuda._sleep(200_000_000)  # about 0.1 s, after which the blocks are read
        seen = device.storage.clone()
        done.record()
    manager.start_step(is_done=done.query)
    manager.free([sequence])
    refused = 0
    while not manager.can_allocate([16]):
        assert not done.query() or manager.can_allocate([16])
        refused += 1
    (other,) = manager.allocate([16])
    write(device, manager, [other], 16)
    torch.cuda.synchronize()
    assert refused > 0
    assert torch.equal(seen, before)
    assert not torch.equal(device.storage, before)
