"""Writing K and V by slot puts each token where it belongs, and nothing anywhere else."""

import pytest
import torch

from pagedattn.kv_cache import FP8, KVCache

pytestmark = pytest.mark.implementations("reference", "torch", "triton", "vllm_cuda")


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


@pytest.mark.pairs(
    dtype=[torch.float16, torch.bfloat16, torch.float32],
    block_size=[1, 8, 16, 32, 64, 128, 256],
    heads=[(1, 64), (3, 80), (2, 96), (8, 128), (2, 256)],
)
def test_each_token_lands_in_its_slot_and_nothing_else_changes(
    write, implementation, device, dtype, block_size, heads
):
    num_kv_heads, head_size = heads
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
    cache.scales.uniform_(0.002, 0.004)  # of the normal numbers below, some are limited to 448
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


def fp8_numbers():
    """All finite numbers of fp8 e4m3, ascending, and whether the last bit of each is 0."""
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes.view(FP8).double()
    known = numbers.isfinite() & (codes != 128)  # without -0
    order = numbers[known].argsort()
    return numbers[known][order], (codes[known][order] % 2 == 0)


def nearest_fp8(wanted):
    """Round float64 to e4m3 by looking at all of its numbers; a tie goes to the even one."""
    numbers, even = fp8_numbers()
    distances = (wanted.clamp(-448, 448)[..., None] - numbers).abs()
    nearest = distances == distances.amin(-1, keepdim=True)
    return numbers[(nearest.int() + (nearest & even).int()).argmax(-1)]


def hard_to_round():
    """Float32 numbers at, beside and between those of fp8, of both signs, small and large."""
    numbers = fp8_numbers()[0].float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    far = torch.tensor([449.0, 464.0, 465.0, 480.0, 1e4, 6e4, 3e-3, 1e-3, 9.7e-4, 1e-4, 1e-7])
    either = [way for edge in (1e9, -1e9) for way in (middles.nextafter(torch.tensor(edge)),)]
    return torch.cat([numbers, middles, *either, far, -far, torch.tensor([torch.inf, -torch.inf])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [None, 1.0, 0.25, 8.0])
def test_fp8_is_the_nearest_number_the_even_one_of_two_and_bounded(
    write, implementation, device, dtype, scale
):
    cache = poisoned_cache(device, FP8, 16, 2, 64)
    layer = cache.layer(1)
    if scale is None:
        layer = type(layer)(layer.key, layer.value)
    else:
        cache.scales.fill_(scale)
    numbers = hard_to_round() * (scale or 1)
    rows = -(-numbers.numel() // 128)
    key = numbers.repeat(2)[: rows * 128].view(rows, 2, 64).to(dtype)
    slots = torch.randperm(layer.num_slots)[:rows]
    write(key.to(device), -key.to(device), layer, slots.to(device), implementation=implementation)
    expected = nearest_fp8(key.double() / (scale or 1))
    for part, wanted in ((layer.key, expected), (layer.value, -expected)):
        assert torch.equal(part.cpu()[slots // 16, :, slots % 16].double(), wanted)
    assert int((~cache.storage.float().isnan()).sum()) == 2 * key.numel()


def test_each_head_of_an_fp8_cache_has_scales_of_its_own(write, implementation, device):
    cache = poisoned_cache(device, FP8, 4, 3, 80)
    scales = torch.rand((2, 3)) + 0.01
    cache.scales[1] = scales
    layer = cache.layer(1)
    key, value = 30 * torch.randn(2, 9, 3, 80)
    slots = torch.randperm(layer.num_slots)[:9]
    write(key.to(device), value.to(device), layer, slots.to(device), implementation=implementation)
    for part, new, scale in ((layer.key, key, scales[0]), (layer.value, value, scales[1])):
        wanted = new.double() / scale.double()[:, None]
        got = part.cpu()[slots // 4, :, slots % 4].double()
        least = (nearest_fp8(wanted) - wanted).abs()
        assert ((got - wanted).abs() <= least + 1e-6 * wanted.abs()).all()


def test_what_is_nan_stays_nan_in_fp8(write, implementation, device):
    cache = poisoned_cache(device, FP8, 4, 2, 64)
    cache.storage.view(torch.uint8).zero_()
    key = torch.ones((1, 2, 64), device=device)
    key[0, 1, 5] = torch.nan
    slots = torch.tensor([3], device=device)
    write(key, key, cache.layer(0), slots, implementation=implementation)
    written = cache.layer(0).key[0, :, 3].float()
    assert written.isnan().sum() == 1
    assert written[1, 5].isnan()
