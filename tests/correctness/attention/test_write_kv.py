"""Writing K and V by slot puts each token where it belongs, and nothing anywhere else."""

import pytest
import torch

from pagedattn.kv_cache import KVCache


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
    write, implementation, device, dtype, block_size, num_kv_heads, head_size
):
    cache = poisoned_cache(device, dtype, block_size, num_kv_heads, head_size)
    generator = torch.Generator().manual_seed(block_size)
    layer = cache.layer(1)
    slots = torch.randperm(layer.num_slots, generator=generator)[: min(6, layer.num_slots)]
    key, value = torch.randn((2, slots.numel(), num_kv_heads, head_size), generator=generator).to(
        dtype
    )
    write(key.to(device), value.to(device), layer, slots.to(device), implementation=implementation)
    expected = torch.full(cache.storage.shape, torch.nan, dtype=dtype)
    for token, slot in enumerate(slots.tolist()):
        block, offset = divmod(slot, block_size)
        for head in range(num_kv_heads):
            expected[1, block, 0, head, offset] = key[token, head]
            expected[1, block, 1, head, offset] = value[token, head]
    torch.testing.assert_close(cache.storage.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def test_slots_outside_the_cache_are_skipped(write, implementation, device):
    cache = poisoned_cache(device, torch.float16, 4, 2, 64)
    layer = cache.layer(0)
    slots = torch.tensor([-1, 5, layer.num_slots, 2**40], device=device)
    key = torch.ones((4, 2, 64), dtype=torch.float16, device=device)
    write(key, key, layer, slots, implementation=implementation)
    written = ~cache.storage.isnan()
    assert written.sum() == 2 * 2 * 64
    assert written[0, 1, :, :, 1].all()


def test_no_tokens_write_nothing(write, implementation, device):
    cache = poisoned_cache(device, torch.float16, 4, 2, 64)
    key = torch.ones((0, 2, 64), dtype=torch.float16, device=device)
    slots = torch.zeros(0, dtype=torch.int64, device=device)
    write(key, key, cache.layer(0), slots, implementation=implementation)
    assert cache.storage.isnan().all()


def test_parts_of_a_fused_projection_are_taken_by_strides_and_cast(write, implementation, device):
    cache = poisoned_cache(device, torch.float16, 4, 2, 64)
    fused = torch.randn((3, 8, 64), device=device)  # 4 query, 2 key, 2 value heads
    slots = torch.tensor([9, 0, 30], device=device)
    write(fused[:, 4:6], fused[:, 6:], cache.layer(0), slots, implementation=implementation)
    blocks, offsets = slots // 4, slots % 4
    assert torch.equal(cache.layer(0).key[blocks, :, offsets], fused[:, 4:6].half())
    assert torch.equal(cache.layer(0).value[blocks, :, offsets], fused[:, 6:].half())


@pytest.mark.parametrize("block_size", [1, 5, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_an_fp8_cache_gets_what_its_scales_make_of_keys_and_values(
    write, implementation, device, dtype, block_size
):
    cache = poisoned_cache(device, torch.float8_e4m3fn, block_size, 3, 80)
    torch.manual_seed(block_size)
    cache.scales.uniform_(0.002, 0.03)
    layer = cache.layer(1)
    slots = torch.randperm(layer.num_slots, device=device)[: min(6, layer.num_slots)]
    key, value = torch.randn((2, slots.numel(), 3, 80), device=device).to(dtype)
    key[0, 0, 0], value[-1, -1, -1] = 1e4, -1e4  # limited to 448
    write(key, value, layer, slots, implementation=implementation)
    expected = torch.full(cache.storage.shape, 0x7F, dtype=torch.uint8, device=device)
    for index, (part, scale) in enumerate(((key, layer.key_scale), (value, layer.value_scale))):
        stored = (part.float() / scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
        blocks, offsets = slots // block_size, slots % block_size
        expected[1, blocks, index, :, offsets] = stored.view(torch.uint8)
    assert torch.equal(cache.storage.view(torch.uint8), expected)
