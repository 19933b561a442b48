"""Writing K and V by slot puts each token where it belongs, and nothing anywhere else."""

import pytest
import torch

from pagedattn.attention import write_kv
from pagedattn.kv_cache import KVCache


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture(params=["torch", "triton", "reference"])
def implementation(request, device):
    if request.param == "triton" and device == "cpu":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("beside a GPU, Triton compiles for it and does not interpret")
    return request.param


def poisoned_cache(device, dtype, block_size, num_kv_heads, head_size, num_blocks=8):
    cache = KVCache(
        num_layers=2,
        num_blocks=num_blocks,
        block_size=block_size,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        dtype=dtype,
        device=device,
    )
    cache.storage.fill_(torch.nan)
    return cache


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("block_size", [1, 8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize(
    ("num_kv_heads", "head_size"), [(1, 64), (3, 80), (2, 96), (8, 128), (2, 256)]
)
def test_each_token_lands_in_its_slot_and_nothing_else_changes(
    implementation, device, dtype, block_size, num_kv_heads, head_size
):
    cache = poisoned_cache(device, dtype, block_size, num_kv_heads, head_size)
    generator = torch.Generator().manual_seed(block_size)
    layer = cache.layer(1)
    slots = torch.randperm(layer.num_slots, generator=generator)[: min(6, layer.num_slots)]
    key, value = torch.randn((2, slots.numel(), num_kv_heads, head_size), generator=generator).to(
        dtype
    )
    write_kv(
        key.to(device), value.to(device), layer, slots.to(device), implementation=implementation
    )
    expected = torch.full(cache.storage.shape, torch.nan, dtype=dtype)
    for token, slot in enumerate(slots.tolist()):
        block, offset = divmod(slot, block_size)
        for head in range(num_kv_heads):
            expected[1, block, 0, head, offset] = key[token, head]
            expected[1, block, 1, head, offset] = value[token, head]
    torch.testing.assert_close(cache.storage.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def test_slots_outside_the_cache_are_skipped(implementation, device):
    cache = poisoned_cache(device, torch.float16, 4, 2, 64)
    layer = cache.layer(0)
    slots = torch.tensor([-1, 5, layer.num_slots, 2**40], device=device)
    key = torch.ones((4, 2, 64), dtype=torch.float16, device=device)
    write_kv(key, key, layer, slots, implementation=implementation)
    written = ~cache.storage.isnan()
    assert written.sum() == 2 * 2 * 64
    assert written[0, 1, :, :, 1].all()


def test_no_tokens_write_nothing(implementation, device):
    cache = poisoned_cache(device, torch.float16, 4, 2, 64)
    key = torch.ones((0, 2, 64), dtype=torch.float16, device=device)
    slots = torch.zeros(0, dtype=torch.int64, device=device)
    write_kv(key, key, cache.layer(0), slots, implementation=implementation)
    assert cache.storage.isnan().all()


def test_parts_of_a_fused_projection_are_taken_by_strides_and_cast(implementation, device):
    cache = poisoned_cache(device, torch.float16, 4, 2, 64)
    fused = torch.randn((3, 8, 64), device=device)  # 4 query, 2 key, 2 value heads
    slots = torch.tensor([9, 0, 30], device=device)
    write_kv(fused[:, 4:6], fused[:, 6:], cache.layer(0), slots, implementation=implementation)
    blocks, offsets = slots // 4, slots % 4
    assert torch.equal(cache.layer(0).key[blocks, :, offsets], fused[:, 4:6].half())
    assert torch.equal(cache.layer(0).value[blocks, :, offsets], fused[:, 6:].half())
