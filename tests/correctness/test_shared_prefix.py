"""The tree of shared blocks is what comparing all sequences block by block finds."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedattn import BlockManager, PageTable
from pagedattn.shared_prefix import find_shared_blocks


def expected(table, query_lengths):
    """Sequences that begin with the same blocks, with the least and largest number of blocks."""
    counts = np.maximum(table.num_tokens - query_lengths, 0) // table.block_size
    by_prefix = {}
    for sequence, count in enumerate(counts):
        for blocks in range(1, count + 1):
            prefix = tuple(table.block_tables[sequence, :blocks].tolist())
            by_prefix.setdefault(prefix, []).append(sequence)
    depths = {}
    for prefix, members in by_prefix.items():
        if len(members) > 1:
            depths.setdefault(tuple(members), []).append(len(prefix))
    return {(min(found) - 1, max(found), members) for members, found in depths.items()}


@st.composite
def batches(draw):
    num_sequences, width = draw(st.integers(0, 8)), draw(st.integers(1, 6))
    most = draw(st.integers(1, 3))  # few ids, so that many are the same
    sizes = (num_sequences, width)
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 4 * width + 1, num_sequences)
    queries = np.minimum(rng.integers(0, 6, num_sequences), lengths)
    return PageTable(4, rng.integers(0, most, sizes, dtype=np.int32), lengths), queries


@pytest.mark.parametrize("seed", range(10))
def test_the_tree_of_many_sequences_that_branch_often_is_found(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 33, 60)
    table = PageTable(4, rng.integers(0, 1 + seed, (60, 8), dtype=np.int32), lengths)
    check_tree(table, np.minimum(lengths, 1))


@given(batches())
def test_the_tree_has_every_set_of_sequences_that_share_blocks(batch):
    check_tree(*batch)


def check_tree(table, queries):
    before = table.block_tables.copy()
    nodes = find_shared_blocks(table, queries)
    found = {(node.begin, node.end, tuple(node.members.tolist())) for node in nodes}
    assert len(found) == len(nodes)
    assert found == expected(table, queries)
    for place, node in enumerate(nodes):
        if node.parent is None:
            assert node.begin == 0
        else:
            parent = nodes[node.parent]
            assert node.parent < place
            assert parent.end == node.begin
            assert set(node.members) < set(parent.members)
    assert (table.block_tables == before).all()


@given(batches(), st.integers(0, 2**32 - 1))
def test_what_lies_past_a_sequences_whole_blocks_decides_nothing(batch, seed):
    table, queries = batch
    counts = np.maximum(table.num_tokens - queries, 0) // table.block_size
    past = np.arange(table.block_tables.shape[1]) >= counts[:, None]
    noise = np.random.default_rng(seed).integers(0, 3, past.shape, dtype=np.int32)
    other = PageTable(4, np.where(past, noise, table.block_tables), table.num_tokens)
    first, second = (
        [(node.begin, node.end, node.members.tolist(), node.parent) for node in nodes]
        for nodes in (find_shared_blocks(table, queries), find_shared_blocks(other, queries))
    )
    assert first == second


def test_the_example_of_the_docstring():
    tables = np.array([[5, 2, 7, 1], [5, 2, 8, 3], [5, 6, 4, 0]], np.int32)
    first, second = find_shared_blocks(PageTable(4, tables, np.array([13, 14, 9])))
    assert (first.begin, first.end, first.members.tolist(), first.parent) == (0, 1, [0, 1, 2], None)
    assert (second.begin, second.end, second.members.tolist(), second.parent) == (1, 2, [0, 1], 0)


def test_a_fork_shares_what_was_written_before_and_not_what_is_copied_on_write():
    manager = BlockManager(num_blocks=32, block_size=4)
    parent = manager.admit([list(range(10))]).sequence_ids
    children = manager.fork(parent.repeat(2))
    batch = np.concatenate([parent, children])
    for _ in range(5):
        manager.append(batch)
    (node,) = find_shared_blocks(PageTable.of(manager, batch))
    assert (node.begin, node.end, node.members.tolist()) == (0, 2, [0, 1, 2])


def test_a_batch_that_shares_nothing_is_told_from_its_first_blocks_in_microseconds():
    tables = np.arange(256 * 512, dtype=np.int32).reshape(256, 512)
    table = PageTable(16, tables, np.full(256, 512 * 16))
    samples = []
    for _ in range(200):
        begin = time.perf_counter()
        assert find_shared_blocks(table) == []
        samples.append(time.perf_counter() - begin)
    # 8 µs on a quiet core; a search through the table would be a hundred times that
    assert min(samples) < 30e-6


@pytest.mark.parametrize("shape", [(0, 0), (1, 3), (3, 0)], ids=str)
def test_a_batch_without_two_tables_shares_nothing(shape):
    table = PageTable(4, np.zeros(shape, np.int32), np.full(shape[0], 4 * shape[1]))
    assert find_shared_blocks(table, 0) == []
