"""The launch that copies blocks of all layers, and the lists that it reads when it runs."""

import numpy as np
import pytest
import torch

from pagedattn import BlockCopies, KVCache

pytest.importorskip("triton")
from pagedattn.block_copy import launch_block_copy, pairs_on


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("beside a GPU, Triton compiles for it and does not interpret")
    return torch.device(request.param)


def made(device, dtype=torch.float16, num_blocks=9, block_size=4, num_kv_heads=2, head_size=8):
    cache = KVCache(
        num_layers=3, num_blocks=num_blocks, block_size=block_size, num_kv_heads=num_kv_heads,
        head_size=head_size, dtype=dtype, device=device,
    )  # fmt: skip
    words = torch.randint(0, 256, (cache.nbytes,), dtype=torch.uint8)
    cache.storage.view(torch.uint8).copy_(words.view(cache.storage.view(torch.uint8).shape))
    return cache


def contents(cache):
    return cache.storage.view(torch.uint8).cpu().clone()


def numbers(*rows):
    return (np.array(row, np.int32) for row in rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(
    ("block_size", "num_kv_heads", "head_size"),
    [(1, 1, 64), (4, 2, 8), (16, 3, 80), (16, 8, 128), (2, 1, 7)],
)
def test_bytes_of_whole_blocks_arrive_in_all_layers_and_nothing_else_changes(
    device, dtype, block_size, num_kv_heads, head_size
):
    cache = made(device, dtype, 6, block_size, num_kv_heads, head_size)
    before = contents(cache)
    pairs = pairs_on(device, *numbers([2, 2, 0], [5, 1, 3]))
    launch_block_copy(cache.storage, cache.storage, pairs)
    before[:, [5, 1, 3]] = before[:, [2, 2, 0]]
    assert torch.equal(contents(cache), before)


@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
def test_pairs_of_a_tensor_are_copied_and_those_outside_the_cache_are_skipped(device, integer):
    cache = made(device)
    before = contents(cache)
    pairs = torch.tensor([[2, -1, 7, 9, 0], [5, 3, -1, 1, 2**30]], dtype=integer, device=device)
    cache.copy_block_pairs(pairs)
    launch_block_copy(cache.storage, cache.storage, pairs)  # once more changes nothing
    before[:, 5] = before[:, 2]
    assert torch.equal(contents(cache), before)


def test_no_pairs_copy_nothing(device):
    cache = made(device)
    before = contents(cache)
    cache.copy_block_pairs(torch.empty((2, 0), dtype=torch.int32, device=device))
    launch_block_copy(
        cache.storage, cache.storage, torch.empty((2, 0), dtype=torch.int32, device=device)
    )
    assert torch.equal(contents(cache), before)


@pytest.mark.parametrize(
    "pairs",
    [torch.zeros((3, 2), dtype=torch.int32), torch.zeros(2, dtype=torch.int32), torch.zeros(2, 3)],
    ids=["three rows", "one dimension", "floats"],
)
def test_a_list_of_another_shape_or_type_is_refused(pairs):
    with pytest.raises(ValueError, match=r"must be int32 or int64 \[2, num_pairs\]"):
        made(torch.device("cpu")).copy_block_pairs(pairs)


@pytest.mark.parametrize(
    ("sources", "destinations", "sentence"),
    [
        ([0], [2, 3], r"given shapes \(1,\) and \(2,\)"),
        ([0, 1], [2], "as many sources as destinations"),
        ([0, 1], [2, 2], "destinations name a block twice"),
        ([0.5], [2.0], "sources must be an array of whole numbers"),
    ],
    ids=str,
)
def test_lists_that_are_no_copies_are_refused_and_nothing_is_copied(
    device, sources, destinations, sentence
):
    cache = made(device)
    before = contents(cache)
    with pytest.raises(ValueError, match=sentence):
        cache.copy_blocks(BlockCopies(np.array(sources), np.array(destinations)))
    assert torch.equal(contents(cache), before)


def test_an_empty_list_of_any_numbers_copies_nothing(device):
    cache = made(device)
    before = contents(cache)
    cache.copy_blocks(BlockCopies(np.array([]), np.array([])))
    assert torch.equal(contents(cache), before)


def test_sources_are_read_before_they_are_written(device):
    cache = made(device)
    before = contents(cache)
    cache.copy_blocks(BlockCopies(*numbers([0, 1, 2, 3], [1, 2, 3, 0])))
    before[:, [1, 2, 3, 0]] = before[:, [0, 1, 2, 3]]
    assert torch.equal(contents(cache), before)


def test_many_blocks_are_copied_through_the_cache(device):
    cache = made(device, num_blocks=40)
    before = contents(cache)
    rng = np.random.default_rng(1)
    blocks = rng.permutation(40).astype(np.int32)
    cache.copy_blocks(BlockCopies(blocks[:15], blocks[20:35]))
    before[:, blocks[20:35]] = before[:, blocks[:15]]
    assert torch.equal(contents(cache), before)


@pytest.mark.gpu
class TestOnAGpu:
    def test_a_captured_copy_follows_its_list(self):
        cache = made("cuda", num_blocks=20)
        pairs = torch.full((2, 6), -1, dtype=torch.int32, device="cuda")
        cache.copy_block_pairs(pairs)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            cache.copy_block_pairs(pairs)
        rng = np.random.default_rng(0)
        for count in (0, 1, 4, 6):
            before = contents(cache)
            chosen = torch.from_numpy(rng.permutation(20)[:12].astype(np.int32)).view(2, 6)
            chosen[:, count:] = -1
            pairs.copy_(chosen)
            graph.replay()
            before[:, chosen[1, :count].long()] = before[:, chosen[0, :count].long()]
            assert torch.equal(contents(cache), before)

    def test_a_list_of_the_host_is_refused_while_a_graph_is_captured(self):
        cache = made("cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            cache.storage.zero_()  # an empty graph is warned of
            with pytest.raises(ValueError, match="copy_block_pairs reads its list when it runs"):
                cache.copy_blocks(BlockCopies(*numbers([0], [1])))

    @pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
    def test_the_host_does_not_wait_for_the_gpu(self):
        cache = made("cuda")
        copies = BlockCopies(*numbers([0, 2], [1, 3]))
        cache.copy_blocks(copies)
        try:
            torch.cuda.set_sync_debug_mode("error")
            cache.copy_blocks(copies)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_a_pool_of_more_than_2_to_the_31_elements_is_addressed(self):
        num_blocks = 2**31 // (3 * 2 * 8 * 16 * 128) + 40
        if torch.cuda.mem_get_info()[0] < 3 << 31:
            pytest.skip("needs 6 GB of free GPU memory")
        cache = KVCache(
            num_layers=3, num_blocks=num_blocks, block_size=16, num_kv_heads=8, head_size=128,
            dtype=torch.float16, device="cuda",
        )  # fmt: skip
        last = num_blocks - 1
        cache.storage[:, [0, last - 1]] = torch.randn((3, 2, 2, 8, 16, 128), device="cuda").half()
        cache.copy_blocks(BlockCopies(*numbers([0, last - 1], [last, 7])))
        assert torch.equal(cache.storage[:, last], cache.storage[:, 0])
        assert torch.equal(cache.storage[:, 7], cache.storage[:, last - 1])
