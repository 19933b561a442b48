"""A lineage is another when, and only when, a block table no longer begins as it did."""

import numpy as np
import pytest

from pagedattn import BlockManager, PageTable


def lineage(manager, ids, layer_group=0):
    return PageTable.of(manager, ids, layer_group).lineage


def numbers(manager, ids):
    return lineage(manager, ids).numbers.tolist()


def fails(_):
    raise RuntimeError


def test_sequences_that_grow_keep_their_lineage():
    manager = BlockManager(64, 4)
    ids = manager.allocate([3, 4, 9])
    before = numbers(manager, ids)
    for count in (1, 1, 5, 1):
        manager.append(ids, count)
        assert numbers(manager, ids) == before
    assert lineage(manager, ids).goes_on_in(lineage(manager, ids))
    assert not lineage(manager, ids).goes_on_in(lineage(manager, ids[::-1]))
    assert not lineage(manager, ids).goes_on_in(lineage(manager, ids[:2]))
    assert not lineage(manager, ids).goes_on_in(None)


def test_who_copies_on_write_gets_another_and_who_keeps_the_block_does_not():
    manager = BlockManager(64, 4)
    parent = manager.allocate([6])
    ids = np.concatenate([parent, manager.fork(parent, 2)])
    before = numbers(manager, ids)
    assert len(set(before)) == 3
    with pytest.raises(RuntimeError):
        manager.append(ids[:1], copy=fails)
    assert numbers(manager, ids) == before
    tables = manager.block_tables(ids)[0]
    manager.append(ids)
    moved = (manager.block_tables(ids)[0] != tables).any(axis=1)
    assert moved.sum() == 2
    assert (np.array(before) != numbers(manager, ids)).tolist() == moved.tolist()


def test_a_swap_gives_another_even_into_the_blocks_of_before():
    manager = BlockManager(8, 4, num_host_blocks=8)
    ids = manager.allocate([6, 5])
    before = numbers(manager, ids)
    manager.swap_out(ids[:1])
    manager.swap_in(ids[:1])
    after = numbers(manager, ids)
    assert after[0] != before[0]
    assert after[1] == before[1]


def test_a_sequence_in_the_row_of_one_that_ended_has_another():
    manager = BlockManager(8, 4)
    seen = set()
    for _ in range(20):
        (sequence,) = manager.allocate([5])
        seen.update(numbers(manager, [sequence]))
        manager.free([sequence])
    assert len(seen) == 20


def test_lineages_of_two_managers_or_layer_groups_do_not_go_on_in_each_other():
    managers = [BlockManager(8, 4, windows=(None, None)) for _ in range(2)]
    managers.append(BlockManager.restore(managers[0].snapshot()))
    for manager in managers:
        manager.allocate([5])
    lineages = [lineage(m, m.sequence_ids(), group) for m in managers for group in (0, 1)]
    for i, one in enumerate(lineages):
        assert [one.goes_on_in(other) for other in lineages] == [i == j for j in range(6)]


def test_a_restored_manager_has_a_number_for_each_sequence():
    manager = BlockManager(16, 4)
    ids = manager.allocate([5, 6, 7])
    restored = BlockManager.restore(manager.snapshot())
    assert len(set(numbers(restored, ids))) == 3


def test_tables_that_lose_entries_to_a_window_have_none():
    manager = BlockManager(16, 4, windows=(None, 4))
    ids = manager.allocate([9])
    assert lineage(manager, ids, 0) is not None
    assert lineage(manager, ids, 1) is None
