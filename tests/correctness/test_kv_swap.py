"""Swapping between a device's cache and the host's: contents, order, and blocks in flight."""

import gc

import numpy as np
import pytest
import torch

from pagedattn import BlockCopies, BlockManager, KVCache
from pagedattn.kv_swap import BlockSwapper, HostKVCache

SIZES = {"num_layers": 3, "block_size": 4, "num_kv_heads": 2, "head_size": 8}
BLOCK_BYTES = 3 * 2 * 2 * 4 * 8 * 2
GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["cpu", GPU])
def device(request):
    return request.param


def caches(device, num_blocks=12, num_host_blocks=20, dtype=torch.float16):
    cache = KVCache(**SIZES, num_blocks=num_blocks, dtype=dtype, device=device)
    cache.storage.copy_(torch.randn(cache.storage.shape).to(dtype))
    host = HostKVCache(cache, num_host_blocks)
    host.blocks.copy_(torch.randn(host.blocks.shape).to(dtype))
    return cache, host


def numbers(*rows):
    return BlockCopies(*(np.array(row, np.int32) for row in rows))


def test_a_block_s_layers_lie_together_on_the_host_and_it_is_a_cache_like_others():
    cache, host = caches("cpu")
    assert host.blocks[3].is_contiguous()
    assert host.storage.shape == (3, 20, 2, 2, 4, 8)
    assert (host.num_layers, host.nbytes) == (3, 20 * BLOCK_BYTES)
    key, value = torch.randn(2, 2, 2, 8).half()
    host.write(1, key, value, torch.tensor([9, 50]))
    assert torch.equal(host.blocks[2, 1, 0, :, 1], key[0])
    assert torch.equal(host.layer(1).value[12, :, 2], value[1])
    cache.copy_blocks(numbers([12, 2], [0, 1]), host)
    assert torch.equal(cache.storage[:, [0, 1]], host.storage[:, [12, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("staged_blocks", [1, 2, 5, 100])
def test_blocks_go_out_and_come_back_to_other_places(device, dtype, staged_blocks):
    cache, host = caches(device, dtype=dtype)
    swapper = BlockSwapper(cache, host, staging_bytes=2 * staged_blocks * host.blocks[0].nbytes)
    before, hosted = cache.storage.float().cpu(), host.storage.float()
    out = numbers([7, 0, 3, 11, 2, 5, 9], [4, 5, 6, 19, 0, 18, 9])
    swapper.swap_out(out)
    swapper.synchronize()
    hosted[:, out.destinations] = before[:, out.sources]
    assert torch.equal(host.storage.float(), hosted)
    assert torch.equal(cache.storage.float().cpu(), before)
    back = numbers(out.destinations, [1, 2, 3, 4, 10, 11, 0])
    swapper.swap_in(back)
    before[:, back.destinations] = hosted[:, back.sources]
    assert torch.equal(cache.storage.float().cpu(), before)
    assert torch.equal(host.storage.float(), hosted)


def test_no_blocks_are_no_work(device):
    cache, host = caches(device)
    before = cache.storage.clone()
    swapper = BlockSwapper(cache, host)
    swapper.swap_out(numbers([], []))
    swapper.swap_in(numbers([], []))
    swapper.synchronize()
    assert torch.equal(cache.storage, before)


def test_the_manager_s_swaps_keep_what_sequences_hold(device):
    manager = BlockManager(12, 4, num_host_blocks=20, prefix_caching=False)
    cache, host = caches(device)
    swapper = BlockSwapper(cache, host, staging_bytes=4 * BLOCK_BYTES)
    first, second = manager.allocate([17, 10]).tolist()
    expected = {}
    for sequence in (first, second):
        table, (length,) = manager.block_tables([sequence])
        expected[sequence] = [cache.gather(layer, table[0], int(length)) for layer in range(3)]
    for _ in range(6):
        manager.swap_out([first], copy=swapper.swap_out)
        filler = manager.allocate([4 * manager.num_free_blocks])
        taken, _ = manager.block_tables(filler)
        cache.storage[:, taken[0].tolist()] = torch.nan  # a step that writes after the swap
        manager.free(filler)
        manager.swap_in([first], copy=swapper.swap_in)
        first, second = second, first
    for sequence, layers in expected.items():
        table, (length,) = manager.block_tables([sequence])
        for layer, parts in enumerate(layers):
            got = cache.gather(layer, table[0], int(length))
            assert all(torch.equal(a, b) for a, b in zip(got, parts, strict=True))
    manager.check_integrity()


def test_caches_of_two_kinds_are_refused():
    cache, host = caches("cpu")
    other = KVCache(**SIZES | {"head_size": 16}, num_blocks=2, dtype=torch.float16)
    with pytest.raises(ValueError, match="differ in their number of blocks alone"):
        BlockSwapper(other, host)
    with pytest.raises(ValueError, match="num_blocks is 0; it must be at least 1"):
        HostKVCache(cache, 0)


@pytest.mark.gpu
class TestOnAGpu:
    def test_host_memory_is_page_locked_as_long_as_the_cache_is_there(self):
        _, host = caches("cuda")
        blocks = host.blocks
        assert blocks.is_pinned()
        assert host.storage.is_pinned()
        del host
        gc.collect()
        assert not blocks.is_pinned()

    def test_a_swap_comes_after_the_work_before_it_and_before_the_work_after_it(self):
        cache, host = caches("cuda")
        swapper = BlockSwapper(cache, host, staging_bytes=4 * BLOCK_BYTES)
        order = np.arange(12)
        for value in range(1, 6):
            torch.cuda._sleep(20_000_000)
            cache.storage.fill_(value)
            swapper.swap_out(numbers(order, order + 3))
            cache.storage.fill_(-value)
            swapper.swap_in(numbers(order + 3, order[::-1]))
            kept = cache.storage.clone()
            assert (kept == value).all()

    def test_the_host_goes_on_while_the_gpu_swaps(self):
        cache, host = caches("cuda")
        swapper = BlockSwapper(cache, host)
        copies = numbers(np.arange(12), np.arange(12))
        swapper.swap_out(copies)
        swapper.synchronize()
        torch.cuda._sleep(400_000_000)  # some 0.2 s
        event = swapper.swap_out(copies)
        assert not event.query()
        swapper.synchronize()
        assert event.query()

    def test_without_waiting_blocks_are_kept_for_the_swap_by_a_step_of_the_manager(self):
        manager = BlockManager(12, 4, num_host_blocks=12, prefix_caching=False)
        cache, host = caches("cuda", num_host_blocks=12)
        cache.storage.fill_(1)
        swapper = BlockSwapper(cache, host)
        swapper.swap_out(numbers([0], [0]))  # compiles
        (sequence,) = manager.allocate([48])
        torch.cuda.synchronize()
        launched = []
        manager.start_step(is_done=lambda: bool(launched) and launched[0].query())
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(200_000_000)  # some 0.1 s that the swap has to wait for
            launched.append(swapper.swap_out(manager.swap_out([sequence]), wait=False))
        assert not manager.can_allocate([48])
        while not manager.can_allocate([48]):
            pass
        manager.allocate([48])
        cache.storage.fill_(2)
        swapper.synchronize()
        assert (host.blocks == 1).all()
