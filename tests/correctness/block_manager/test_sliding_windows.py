"""Blocks leave a sequence's windows, each layer group on its own, and go back to the pool."""

import pytest

from pagedattn import BlockManager, PageTable

from .managers import tables


@pytest.mark.parametrize("window", [1, 2, 4, 5, 6, 9, 100])
@pytest.mark.parametrize("block_size", [1, 4])
def test_blocks_that_no_query_will_see_go_back(window, block_size):
    manager = BlockManager(64, block_size, windows=(window,), prefix_caching=False)
    (sequence,) = manager.allocate([7])
    for position in range(7, 30):
        manager.append([sequence])
        first_seen = max(0, position - window + 1)
        held = position // block_size - first_seen // block_size + 1
        assert manager.num_free_blocks == 64 - held
        table = tables(manager, [sequence])[0]
        assert not any(table[: first_seen // block_size])
        manager.check_integrity()


def test_a_sequence_longer_than_the_pool_fits_its_window():
    manager = BlockManager(4, 4, windows=(8,))
    (sequence,) = manager.allocate([4])
    for _ in range(400):
        manager.append([sequence])
    assert manager.num_tokens([sequence]).tolist() == [404]
    manager.check_integrity()


def test_blocks_that_leave_a_window_serve_the_same_call():
    manager = BlockManager(2, 4, windows=(4,), prefix_caching=False)
    (sequence,) = manager.allocate([8])
    manager.append([sequence])
    assert manager.num_free_blocks == 0  # the window of token 8 reaches back to token 5
    manager.append([sequence], 3)
    manager.append([sequence])  # token 12 sees 9 to 11: block 1 leaves, a new one comes
    assert manager.num_free_blocks == 0
    manager.check_integrity()


def test_each_layer_group_has_tables_of_its_own_on_one_pool():
    manager = BlockManager(64, 4, windows=(None, 6), prefix_caching=False)
    (sequence,) = manager.allocate([16])
    manager.append([sequence])
    full, sliding = (PageTable.of(manager, [sequence], group) for group in (0, 1))
    assert full.block_tables.shape == sliding.block_tables.shape == (1, 5)
    assert (sliding.block_tables[0] > 0).tolist() == [False, False, True, True, True]
    held = [*full.block_tables[0], *sliding.block_tables[0, 2:]]
    assert len(set(held)) == 8
    assert manager.num_free_blocks == 64 - 8
    assert full.slots().tolist() != sliding.slots().tolist()
    with pytest.raises(ValueError, match="layer_group is 2; there are 2"):
        PageTable.of(manager, [sequence], 2)


def test_forks_of_all_layer_groups_copy_on_write():
    manager = BlockManager(64, 4, windows=(None, 6, 100))
    (parent,) = manager.allocate([6])
    (child,) = manager.fork(parent)
    copies = manager.append([child])
    assert len(copies) == 3
    for group in range(3):
        (one,), (two,) = (tables(manager, [i], group) for i in (parent, child))
        assert one[0] == two[0]
        assert one[1] != two[1]
    manager.check_integrity()


def test_a_window_needs_only_its_last_blocks_from_the_cache():
    """After a long prompt's first blocks were evicted, a window still finds its last ones."""
    manager = BlockManager(12, 4, windows=(5,), seed=b"s")
    (sequence,) = manager.admit([range(32)]).sequence_ids
    manager.append([sequence], token_ids=[1])  # seven blocks leave the window, head last freed
    manager.free([sequence])
    again = manager.admit([range(33)])
    assert again.num_cached_tokens.tolist() == [32]
    table = tables(manager, again.sequence_ids)[0]
    assert sum(block > 0 for block in table) <= 2
    manager.check_integrity()


@pytest.mark.parametrize(("evicted", "found"), [(0, 12), (2, 12), (3, 8), (4, 8), (5, 4), (8, 0)])
def test_a_prompt_is_cached_as_far_as_all_layer_groups_have_it(evicted, found):
    manager = BlockManager(16, 4, windows=(None, 5))
    manager.free(manager.admit([range(16)]).sequence_ids)
    assert manager.num_cached_blocks == 8
    # the last block of either group goes first
    manager._pool.put_back(manager._pool.take(8 + evicted))
    assert manager.num_cached_blocks == 8 - evicted
    admission = manager.admit([range(16)])
    assert admission.num_cached_tokens.tolist() == [found]
    manager.check_integrity()
