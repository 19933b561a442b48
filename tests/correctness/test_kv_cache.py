"""The cache's layout, and what writing, copying and gathering do to it."""

import numpy as np
import pytest
import torch

from pagedattn import BlockCopies, CacheConfig, KVCache, LayerCache, ModelConfig
from pagedattn.kv_cache import FP8, dequantised, quantised
from pagedattn.memory import kv_bytes_per_block


def made(dtype=torch.float32):
    cache = KVCache(
        num_layers=3, num_blocks=6, block_size=4, num_kv_heads=2, head_size=8, dtype=dtype
    )
    cache.storage.fill_(torch.nan)
    return cache


def test_a_head_of_a_block_is_contiguous_and_so_is_a_block():
    layer = made().layer(1)
    assert layer.key.shape == layer.value.shape == (6, 2, 4, 8)
    assert layer.key[3, 1].is_contiguous()
    assert made().storage[1, 3].is_contiguous()
    assert (layer.num_blocks, layer.num_kv_heads, layer.block_size, layer.head_size) == (6, 2, 4, 8)
    assert layer.num_slots == 24


def test_a_layer_is_a_view():
    cache = made()
    cache.layer(2).value[5, 1, 3, 7] = 9.0
    assert cache.storage[2, 5, 1, 1, 3, 7] == 9.0
    assert cache.storage.isnan().sum() == cache.storage.numel() - 1


def test_tokens_are_written_to_their_slots_of_one_layer():
    cache = made()
    slots = torch.tensor([9, 0, 23])
    key, value = torch.randn(2, 3, 2, 8)
    cache.write(1, key, value, slots)
    for token, slot in enumerate(slots.tolist()):
        assert torch.equal(cache.storage[1, slot // 4, 0, :, slot % 4], key[token])
        assert torch.equal(cache.storage[1, slot // 4, 1, :, slot % 4], value[token])
    assert cache.storage.isnan().sum() == cache.storage.numel() - 2 * key.numel()


def test_slots_outside_the_cache_are_skipped():
    cache = made()
    key = torch.ones(3, 2, 8)
    cache.write(0, key, key, torch.tensor([-1, 24, 5]))
    assert (~cache.storage.isnan()).sum() == 2 * 2 * 8


def test_blocks_are_copied_in_all_layers_and_no_other_changes():
    cache = made()
    cache.storage.normal_()
    before = cache.storage.clone()
    copies = BlockCopies(np.array([2, 2, 0], dtype=np.int32), np.array([5, 1, 3], dtype=np.int32))
    cache.copy_blocks(copies)
    expected = before.clone()
    for source, destination in ((2, 5), (2, 1), (0, 3)):
        expected[:, destination] = before[:, source]
    assert torch.equal(cache.storage, expected)
    cache.copy_blocks(BlockCopies(np.zeros(0, np.int32), np.zeros(0, np.int32)))
    assert torch.equal(cache.storage, expected)


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 8])
def test_gathering_inverts_writing(num_tokens):
    cache = made()
    table = np.array([4, 1, 0], dtype=np.int32)
    key, value = torch.randn(2, num_tokens, 2, 8)
    slots = [int(table[token // 4]) * 4 + token % 4 for token in range(num_tokens)]
    cache.write(0, key, value, torch.tensor(slots))
    gathered_key, gathered_value = cache.gather(0, table, num_tokens)
    assert torch.equal(gathered_key, key)
    assert torch.equal(gathered_value, value)


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen3-0.6b"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float8_e4m3"])
def test_a_model_s_cache_takes_the_bytes_that_the_arithmetic_says(name, dtype):
    model = ModelConfig.preset(name)
    config = CacheConfig(block_size=16, num_blocks=3, dtype=dtype)
    cache = KVCache.of(model, config)
    assert cache.nbytes == 3 * kv_bytes_per_block(model, 16, dtype)
    assert cache.num_layers == model.num_layers
    assert cache.layer(0).head_size == model.head_size


def test_an_impossible_size_is_refused():
    with pytest.raises(ValueError, match=r"must be at least 1; given .* num_blocks=0"):
        KVCache(
            num_layers=1, num_blocks=0, block_size=4, num_kv_heads=2, head_size=8,
            dtype=torch.float32,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        (torch.ones(2, 2, 4), torch.ones(2, 2, 4), "key must be"),
        (torch.ones(2, 2, 8, 4).transpose(2, 3), torch.ones(2, 2, 4, 8), "contiguous in the last"),
        (torch.ones(2, 2, 4, 8), torch.ones(2, 2, 4, 9), "key has shape"),
        (torch.ones(2, 2, 4, 8), torch.ones(2, 2, 4, 8).half(), "key has dtype"),
        (torch.ones(2, 2, 4, 8), torch.ones(2, 4, 2, 8).transpose(1, 2), "key has strides"),
        (torch.ones(2, 2, 4, 8), torch.ones(2, 2, 4, 8, device="meta"), "key has device"),
    ],
)
def test_keys_and_values_of_two_kinds_are_refused(key, value, sentence):
    with pytest.raises(ValueError, match=sentence):
        LayerCache(key, value)


@pytest.mark.parametrize("name", ["key_scale", "value_scale"])
@pytest.mark.parametrize(
    ("dtype", "scale", "sentence"),
    [
        (torch.float16, torch.ones(2), "the cache is torch.float16, and only torch.float8"),
        (FP8, torch.ones(3), r"_scale is torch.float32 .3,.; it must be .* here .2,."),
        (FP8, torch.ones(2).half(), r"_scale is torch.float16 .2,.; it must be torch.float32"),
        (FP8, torch.ones(2, device="meta"), "must be contiguous and on cpu; .* on meta"),
        (FP8, torch.ones(4)[::2], "must be contiguous"),
    ],
    ids=["dtype", "shape", "precision", "device", "strides"],
)
def test_scales_that_do_not_fit_are_refused(name, dtype, scale, sentence):
    parts = torch.empty((2, 5, 2, 4, 8), dtype=dtype)
    with pytest.raises(ValueError, match=sentence):
        LayerCache(*parts, **{name: scale})


def test_an_fp8_cache_has_a_scale_for_each_layer_and_head_and_others_have_none():
    cache = made(FP8)
    assert cache.scales.shape == (3, 2, 2)
    assert (cache.scales == 1).all()
    cache.scales[2, 1, 0] = 0.5  # a layer's scales are views, as its blocks are
    assert cache.layer(2).value_scale.tolist() == [0.5, 1.0]
    assert cache.layer(2).key_scale.tolist() == [1.0, 1.0]
    assert made().scales is None
    assert made().layer(0).key_scale is None


def test_fp8_keys_are_divided_by_their_head_s_scale_limited_and_rounded_to_nearest():
    cache = made(FP8)
    cache.scales[1] = torch.tensor([[0.25, 2.0], [1.0, 0.5]])
    key = torch.tensor([100.0, 104.0, 120.0, -9999.0, 0.5, 0.26, 0.0, float("nan")])
    cache.write(1, key.expand(1, 2, 8), key.expand(1, 2, 8), torch.tensor([5]))
    stored = cache.storage[1, 1, :, :, 1].float()
    expected = {  # e4m3 has three bits behind the leading one
        (0, 0): [384, 416, 448, -448, 2, 1, 0],  # 400 is a tie, and goes to even
        (0, 1): [48, 52, 60, -448, 0.25, 0.125, 0],
        (1, 0): [96, 104, 120, -448, 0.5, 0.25, 0],
        (1, 1): [192, 208, 240, -448, 1, 0.5, 0],
    }
    for place, numbers in expected.items():
        assert stored[place][:7].tolist() == numbers
        assert stored[place][7].isnan()
    assert cache.storage.isnan().sum() == cache.storage.numel() - 2 * 2 * 8 + 4
    gathered, _ = cache.gather(1, np.array([1], dtype=np.int32), 2)
    assert gathered.dtype == torch.float32
    assert gathered[1, 0, :3].tolist() == [96, 104, 112]
    assert gathered[1, 1, :3].tolist() == [96, 104, 120]


@pytest.mark.parametrize("scale", [0.013, 1.0, 3.7])
def test_quantising_inverts_dequantising(scale):
    stored = torch.arange(256, dtype=torch.uint8).view(FP8)
    stored = stored[~stored.isnan()].view(1, -1)
    scales = torch.tensor([scale])
    numbers = dequantised(stored, scales, torch.float32)
    assert torch.equal(quantised(numbers, scales, FP8).view(torch.uint8), stored.view(torch.uint8))


def test_fp8_blocks_are_copied():
    cache = made(FP8)
    cache.write(0, *torch.ones(2, 1, 2, 8), torch.tensor([9]))
    cache.copy_blocks(BlockCopies(np.array([2], np.int32), np.array([0], np.int32)))
    assert (cache.storage[0, 0, :, :, 1].float() == 1).all()


def test_blocks_are_copied_from_another_cache():
    cache, host = made(), made()
    host.storage.normal_()
    copies = BlockCopies(np.array([4, 0], dtype=np.int32), np.array([1, 4], dtype=np.int32))
    cache.copy_blocks(copies, host)
    assert torch.equal(cache.storage[:, [1, 4]], host.storage[:, [4, 0]])
    assert cache.storage[:, [0, 2, 3, 5]].isnan().all()


@pytest.mark.parametrize(
    "change",
    [{"num_layers": 2}, {"block_size": 8}, {"num_kv_heads": 1}, {"dtype": torch.float16}],
    ids=lambda change: next(iter(change)),
)
def test_caches_that_differ_in_more_than_their_blocks_are_refused(change):
    sizes = {"num_layers": 3, "num_blocks": 6, "block_size": 4, "num_kv_heads": 2, "head_size": 8}
    other = KVCache(**{**sizes, "dtype": torch.float32, **change})
    cache = made()
    copies = BlockCopies(np.array([0], dtype=np.int32), np.array([1], dtype=np.int32))
    with pytest.raises(ValueError, match="differ in their number of blocks alone"):
        cache.copy_blocks(copies, other)
    assert cache.storage.isnan().all()
