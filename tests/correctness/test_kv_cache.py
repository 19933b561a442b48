"""The cache's layout, and what writing, copying and gathering do to it."""

import numpy as np
import pytest
import torch

from pagedattn import BlockCopies, CacheConfig, KVCache, LayerCache, ModelConfig
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
