"""A token's way, step by step: read this file first.

A prompt of seven tokens goes through a cache of blocks of four. Each step asserts what the step
before it promised, in plain numbers.
"""

import numpy as np
import pytest
import torch

from pagedattn import BlockManager, KVCache, PageTable, Sequence
from pagedattn.attention import AttentionBatch, attention, write_kv

BLOCK_SIZE = 4
NUM_QUERY_HEADS, NUM_KV_HEADS, HEAD_SIZE = 4, 2, 64

IMPLEMENTATIONS = ["reference", "torch", "triton"]


def shuffled_manager():
    """Eight blocks, some of which were used and given back, so that new ones are in no order."""
    manager = BlockManager(num_blocks=8, block_size=BLOCK_SIZE)
    first, second, third, fourth = manager.allocate([4, 4, 4, 4])  # blocks 0, 1, 2, 3
    for sequence in (first, fourth, second, third):
        manager.free([sequence])  # the last that is freed is reused first
    return manager


def dense_attention(query, key, value):
    """Causal attention without any paging: the definition, for the last tokens of a sequence."""
    group = NUM_QUERY_HEADS // NUM_KV_HEADS
    out = torch.empty_like(query)
    for row in range(query.shape[0]):
        visible = key.shape[0] - query.shape[0] + row + 1
        for head in range(NUM_QUERY_HEADS):
            scores = key[:visible, head // group] @ query[row, head] / HEAD_SIZE**0.5
            out[row, head] = torch.softmax(scores, 0) @ value[:visible, head // group]
    return out


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_prompt_becomes_attention_output(implementation):
    if implementation == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("beside a GPU, Triton compiles for it and does not interpret")

    # 1. The prompt: seven tokens.
    sequence = Sequence([11, 22, 33, 44, 55, 66, 77])
    assert sequence.num_tokens == 7

    # 2. The block manager: seven tokens need two blocks of four.
    manager = shuffled_manager()
    (sequence_id,) = manager.allocate([sequence.num_tokens])
    assert manager.num_free_blocks == 8 - 2

    # 3. The page table: logical blocks 0 and 1 are some physical blocks, here not neighbours
    #    in ascending order.
    table = PageTable.of(manager, [sequence_id])
    first, second = table.block_tables[0].tolist()
    assert (first, second) == (2, 1)
    assert table.num_tokens.tolist() == [7]

    # 4. The slots: token t is in logical block t // 4 at offset t % 4.
    slots = table.slots(sequence.num_tokens)
    assert slots.tolist() == [8, 9, 10, 11, 4, 5, 6]

    # 5. The KV cache: each token's K and V lie in its slot, and nowhere else.
    cache = KVCache(
        num_layers=1,
        num_blocks=8,
        block_size=BLOCK_SIZE,
        num_kv_heads=NUM_KV_HEADS,
        head_size=HEAD_SIZE,
        dtype=torch.float32,
    )
    cache.storage.fill_(torch.nan)
    torch.manual_seed(0)
    key, value = torch.randn(2, 7, NUM_KV_HEADS, HEAD_SIZE)
    batch = AttentionBatch.of(table, query_lengths=7)
    write_kv(key, value, cache.layer(0), batch.slots, implementation=implementation)
    for token in range(7):
        block, offset = (first, second)[token // 4], token % 4
        assert torch.equal(cache.layer(0).key[block, :, offset], key[token])
        assert torch.equal(cache.layer(0).value[block, :, offset], value[token])
    assert int(cache.storage.isnan().sum()) == cache.storage.numel() - 2 * key.numel()

    # 6. Attention over the paged cache is attention.
    query = torch.randn(7, NUM_QUERY_HEADS, HEAD_SIZE)
    out = attention(query, cache.layer(0), batch, implementation=implementation)
    torch.testing.assert_close(out, dense_attention(query, key, value), rtol=1e-5, atol=1e-5)

    # Decoding goes the same way, a token at a time: the eighth token fills the second block,
    # the ninth opens a third.
    for free_blocks, slot in ((6, 7), (5, 12)):
        sequence.append(88)
        copies = manager.append([sequence_id])
        assert len(copies) == 0  # nobody shares these blocks
        assert manager.num_free_blocks == free_blocks
        table = PageTable.of(manager, [sequence_id])
        batch = AttentionBatch.of(table)
        assert batch.slots.tolist() == [slot]
        new_key, new_value = torch.randn(2, 1, NUM_KV_HEADS, HEAD_SIZE)
        write_kv(new_key, new_value, cache.layer(0), batch.slots, implementation=implementation)
        key, value = torch.cat([key, new_key]), torch.cat([value, new_value])
        query = torch.randn(1, NUM_QUERY_HEADS, HEAD_SIZE)
        out = attention(query, cache.layer(0), batch, implementation=implementation)
        torch.testing.assert_close(out, dense_attention(query, key, value), rtol=1e-5, atol=1e-5)
    gathered_key, gathered_value = cache.gather(0, table.block_tables[0], 9)
    assert torch.equal(gathered_key, key)
    assert torch.equal(gathered_value, value)

    # The end: all blocks are free again.
    manager.free([sequence_id])
    assert manager.num_free_blocks == 8
    manager.check_integrity()


def test_forks_share_blocks_until_they_write():
    # Two samples of one prompt share its blocks; the one that writes first gets a copy.
    manager = shuffled_manager()
    (parent,) = manager.allocate([7])
    (child,) = manager.fork(parent)
    assert manager.num_free_blocks == 6
    shared = PageTable.of(manager, [parent, child]).block_tables
    assert (shared[0] == shared[1]).all()
    assert manager.ref_counts(shared[0]).tolist() == [2, 2]

    copies = manager.append([child])
    assert copies.sources.tolist() == [shared[0, 1]]
    after = PageTable.of(manager, [parent, child]).block_tables
    assert after[0].tolist() == shared[0].tolist()
    assert after[1].tolist() == [shared[0, 0], copies.destinations[0]]
    assert manager.ref_counts(np.append(after[0], after[1, 1])).tolist() == [2, 1, 1]
