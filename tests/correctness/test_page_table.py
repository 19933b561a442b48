"""The page table and its slots, against loops over every element."""

import numpy as np
import pytest

from pagedattn import BlockManager, PageTable

LENGTHS = [1, 3, 4, 5, 8, 17]


def made(block_size, lengths=LENGTHS):
    """A table over shuffled blocks."""
    manager = BlockManager(64, block_size)
    rng = np.random.default_rng(block_size)
    for _ in range(3):
        manager.free(rng.permutation(manager.allocate(rng.integers(1, 4, 10))))
    ids = manager.allocate(lengths)
    return manager, ids, PageTable.of(manager, ids)


@pytest.mark.parametrize("block_size", [1, 2, 4, 16])
def test_slots_are_block_times_size_plus_offset(block_size):
    _, _, table = made(block_size)
    for counts in (1, 0, LENGTHS, [0, 3, 1, 5, 0, 2]):
        expected = []
        for row, length in enumerate(LENGTHS):
            count = counts if isinstance(counts, int) else counts[row]
            for token in range(length - count, length):
                block = int(table.block_tables[row, token // block_size])
                expected.append(block * block_size + token % block_size)
        slots = table.slots(counts)
        assert slots.tolist() == expected
        assert slots.dtype == np.int64


@pytest.mark.parametrize("block_size", [1, 2, 4, 16])
def test_csr_lists_the_same_blocks_without_padding(block_size):
    _, _, table = made(block_size)
    csr = table.csr()
    assert csr.indptr.dtype == csr.indices.dtype == csr.last_block_len.dtype == np.int32
    for row, length in enumerate(LENGTHS):
        blocks = -(-length // block_size)
        part = csr.indices[csr.indptr[row] : csr.indptr[row + 1]]
        assert part.tolist() == table.block_tables[row, :blocks].tolist()
        assert csr.last_block_len[row] == length - (blocks - 1) * block_size
    assert csr.indptr[0] == 0
    assert csr.indptr[-1] == csr.indices.size


def test_the_worked_examples_of_the_docstrings_hold():
    tables = np.array([[5, 2], [9, 0]], dtype=np.int32)
    table = PageTable(4, tables, np.array([7, 4]))
    assert table.slots([1, 0]).tolist() == [2 * 4 + 2]
    csr = table.csr()
    assert csr.indptr.tolist() == [0, 2, 3]
    assert csr.indices.tolist() == [5, 2, 9]
    assert csr.last_block_len.tolist() == [3, 4]


def test_padding_names_blocks_of_the_pool_and_the_width_is_the_longest_table():
    manager, _, table = made(4)
    assert table.block_tables.dtype == np.int32
    assert table.block_tables.shape == (6, 5)
    assert (table.block_tables >= 0).all()
    assert (table.block_tables < manager.num_blocks).all()


def test_no_id_of_the_hosts_larger_pool_stands_in_the_padding():
    manager = BlockManager(8, 1, num_host_blocks=1000, prefix_caching=False)
    (first,) = manager.allocate([8])
    manager.swap_out([first])  # takes the host's ids 0 to 7
    stays, goes = manager.allocate([1, 4])
    manager.swap_out([goes])
    (long,) = manager.allocate([6])
    assert PageTable.of(manager, [stays, long]).block_tables.max() < 8
    manager.free([first, goes])
    assert PageTable.of(manager, [stays, long]).block_tables.max() < 8


def test_rows_come_in_the_order_asked_for():
    manager, ids, table = made(4)
    reverse = PageTable.of(manager, ids[::-1])
    assert (reverse.block_tables == table.block_tables[::-1]).all()
    assert reverse.num_tokens.tolist() == LENGTHS[::-1]


def test_a_table_is_a_copy():
    manager, ids, table = made(4)
    tables, lengths = table.block_tables.copy(), table.num_tokens.copy()
    manager.append(ids, 9)
    manager.free(ids)
    assert (table.block_tables == tables).all()
    assert (table.num_tokens == lengths).all()


def test_an_empty_batch_has_an_empty_table():
    manager, _, _ = made(4)
    table = PageTable.of(manager, [])
    assert table.num_sequences == 0
    assert table.slots().size == 0
    assert table.csr().indptr.tolist() == [0]
    assert table.csr().indices.size == 0


@pytest.mark.parametrize("counts", [2, -1, [1, 3, 4, 5, 8, 18], [0, 0, -1, 0, 0, 0]])
def test_more_tokens_than_a_sequence_has_are_refused(counts):
    _, _, table = made(4)
    with pytest.raises(ValueError, match="must be from 0 to each sequence's length"):
        table.slots(counts)


@pytest.mark.parametrize(
    "counts", [1.9, "2", True, [], [1, 2], 2**63, 2**64, float("inf"), None], ids=repr
)
def test_what_is_no_count_for_each_sequence_is_refused(counts):
    _, _, table = made(4)
    with pytest.raises(ValueError, match="num_last_tokens"):
        table.slots(counts)


def test_slots_of_a_large_pool_pass_32_bits():
    table = PageTable(256, np.array([[2**31 - 2]], dtype=np.int32), np.array([200]))
    assert table.slots().tolist() == [(2**31 - 2) * 256 + 199]
