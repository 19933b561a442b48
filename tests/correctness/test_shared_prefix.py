"""The tree of shared blocks is what comparing all sequences block by block finds."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedattn import BlockManager, PageTable
from pagedattn.shared_prefix import PrefixTree, find_shared_blocks


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


def listed(nodes):
    return [(node.begin, node.end, node.members.tolist(), node.parent) for node in nodes]


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
    assert listed(find_shared_blocks(table, queries)) == listed(find_shared_blocks(other, queries))


@given(batches(), st.integers(0, 2**32 - 1))
def test_a_tree_that_still_holds_is_what_a_search_finds(batch, seed):
    table, queries = batch
    rng = np.random.default_rng(seed)
    tables, lengths = table.block_tables.copy(), table.num_tokens.copy()
    # few entries change, and few lengths by much, so that it holds often, and nearly
    changed = rng.random(tables.shape) < rng.choice([0, 0.1])
    tables[changed] = rng.integers(0, 3, changed.sum())
    lengths += rng.integers(0, 9, lengths.size) * rng.integers(-1, 2)
    tables = np.pad(tables, ((0, 0), (0, 4)))
    lengths = lengths.clip(queries, 4 * tables.shape[1])
    later = PageTable(4, tables[:, : -(-lengths.max(initial=0) // 4)], lengths)
    trees = [PrefixTree.of(table, queries), PrefixTree.of(later, queries)]
    found = [find_shared_blocks(table, queries), find_shared_blocks(later, queries)]
    for tree, nodes in zip(trees, found, strict=True):
        assert (tree is None) == (nodes == [])
        assert tree is None or listed(tree.nodes) == listed(nodes)
    if None not in trees and trees[0].still_holds(trees[1]):
        assert listed(found[0]) == listed(found[1])
        for node in found[0]:
            blocks = slice(node.begin, node.end)
            before, now = table.block_tables[node.members], tables[node.members]
            assert (before[:, blocks] == now[:, blocks]).all()


@given(batches(), st.integers(0, 2**32 - 1))
def test_a_tree_holds_while_sequences_with_a_block_of_their_own_grow(batch, seed):
    table, queries = batch
    rng = np.random.default_rng(seed)
    num_sequences, width = table.block_tables.shape
    is_theirs = np.arange(width + 6) < table.num_blocks()[:, None]
    own = 10 + np.arange(is_theirs.size, dtype=np.int32).reshape(is_theirs.shape)
    tables = np.where(is_theirs, np.pad(table.block_tables, ((0, 0), (0, 6))), own)
    lengths = 4 * (table.num_blocks() + 1) + queries
    tree = PrefixTree.of(PageTable(4, tables, lengths), queries)
    if tree is None:
        return
    for _ in range(3):
        lengths = lengths + rng.integers(0, 5, num_sequences)
        behind = np.arange(width + 6) >= -(-lengths // 4)[:, None]
        noisy = np.where(behind, rng.integers(0, 3, behind.shape, dtype=np.int32), tables)
        later = PageTable(4, noisy[:, : width + rng.integers(4, 7)], lengths)
        assert tree.still_holds(PrefixTree.of(later, queries))
        assert listed(tree.nodes) == listed(find_shared_blocks(later, queries))


# block size 4, one query token each
TABLES = ((5, 2, 7, 1), (5, 2, 8, 3), (5, 6, 4, 0), (9, 9, 9, 9), (5, 2, 8, 4))
LENGTHS = (13, 17, 9, 4, 17)  # the fourth has no whole block before its query token


@pytest.mark.parametrize(
    ("tables", "lengths", "holds"),
    [
        pytest.param({}, {}, True, id="nothing"),
        pytest.param({(0, 3): 8}, {0: 17}, True, id="a sequence grows by a block"),
        pytest.param({(2, 2): 9, (0, 3): 9}, {}, True, id="an entry behind changes"),
        pytest.param({(2, 1): 2}, {}, False, id="a sequence's next block becomes another's"),
        pytest.param({(0, 2): 8}, {}, False, id="the same deeper down"),
        pytest.param({(0, 2): 6}, {}, False, id="a sequence is replaced by one as long"),
        pytest.param({(0, 1): 6}, {}, False, id="a shared block is replaced for one"),
        pytest.param(dict.fromkeys([(i, 1) for i in (0, 1, 4)], 3), {}, False, id="for all"),
        pytest.param({(3, 0): 5}, {3: 5}, False, id="a sequence's first block is shared"),
        pytest.param({}, {1: 12}, False, id="a sequence ends within what it shares"),
        pytest.param({}, {0: 8}, False, id="a sequence ends where its own blocks began"),
        pytest.param({}, {1: 13}, False, id="a sequence loses the block that told it apart"),
    ],
)
def test_a_tree_holds_where_all_share_what_they_did(tables, lengths, holds):
    now, lengths_now = np.array(TABLES, np.int32), np.array(LENGTHS)
    for place, block in tables.items():
        now[place] = block
    for sequence, length in lengths.items():
        lengths_now[sequence] = length
    tree = PrefixTree.of(PageTable(4, np.array(TABLES, np.int32), np.array(LENGTHS)))
    assert tree.still_holds(PrefixTree.of(PageTable(4, now, lengths_now))) == holds
    assert not tree.still_holds(PrefixTree.of(PageTable(4, now[:3], lengths_now[:3])))


def test_a_tree_is_that_of_the_page_table_as_it_was():
    tables, lengths = np.array(TABLES, np.int32), np.array(LENGTHS)
    tree = PrefixTree.of(PageTable(4, tables, lengths))
    expected_nodes = listed(find_shared_blocks(PageTable(4, tables, lengths)))
    tables[:], lengths[:] = 0, 1
    assert listed(tree.nodes) == expected_nodes


def test_padding_sequences_share_nothing_whatever_their_entries_are():
    table = PageTable(
        4, np.array([[3, 1], [0, 0], [0, 0], [0, 1]], np.int32), np.array([8, 0, 0, 6])
    )
    assert PrefixTree.of(table, [1, 0, 0, 1]) is None


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


@pytest.mark.undisturbed
def test_a_batch_that_shares_nothing_is_told_from_its_first_blocks_in_microseconds():
    tables = np.arange(256 * 512, dtype=np.int32).reshape(256, 512)
    table = PageTable(16, tables, np.full(256, 512 * 16))
    samples = []
    for _ in range(2000):
        begin = time.perf_counter()
        assert find_shared_blocks(table) == []
        samples.append(time.perf_counter() - begin)
    # 8 µs on a quiet core; a search through the table would be a hundred times that
    assert min(samples) < 30e-6


@pytest.mark.parametrize("shape", [(0, 0), (1, 3), (3, 0)], ids=str)
def test_a_batch_without_two_tables_shares_nothing(shape):
    table = PageTable(4, np.zeros(shape, np.int32), np.full(shape[0], 4 * shape[1]))
    assert find_shared_blocks(table, 0) == []
