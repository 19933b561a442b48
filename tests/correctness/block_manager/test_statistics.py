"""What is counted of a pool, against a count slot by slot."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedattn import BlockManager, BlockStatistics


def by_slot(manager, finals=None):
    """Count used blocks' slots one by one: `(tokens, reserved, internal)`."""
    size = manager.block_size
    ids = manager.sequence_ids()
    finals = manager.num_tokens(ids) if finals is None else finals
    slots = {}
    for group in range(manager.num_layer_groups):
        for sequence, final in zip(ids.tolist(), finals, strict=True):
            if manager.is_swapped_out([sequence])[0]:
                continue
            (table,), (length,) = manager.block_tables([sequence], group)
            row = manager._tables.rows.rows_of([sequence])
            (first,) = manager._tables.lists.first[manager._tables.lists_of(row, group)].tolist()
            for column in range(first, len(table)):
                for offset in range(size):
                    slot = int(table[column]), offset
                    position = column * size + offset
                    use = 0 if position < length else 1 if position < final else 2
                    slots[slot] = min(use, slots.get(slot, 2))
    uses = list(slots.values())
    assert len({block for block, _ in slots}) * size == len(uses)
    return tuple(uses.count(use) for use in range(3))


def counted(stats):
    return stats.num_token_slots, stats.num_reserved_slots, stats.num_internal_slots


def test_a_small_case_is_as_worked_out_by_hand():
    manager = BlockManager(10, 4)
    long, short = manager.allocate([9, 2])  # 3 blocks and 1
    manager.fork(long)  # shares all 3
    manager.free(manager.allocate([4]))
    assert manager.statistics([11, 4, 9]) == BlockStatistics(
        num_blocks=10,
        num_used_blocks=4,
        num_cached_blocks=0,
        num_empty_blocks=6,
        num_deferred_blocks=0,
        num_shared_blocks=3,
        num_unshared_blocks=7,
        num_token_slots=11,
        num_reserved_slots=4,  # 2 of the long one's last block, 2 of the short one's
        num_internal_slots=1,
        num_external_slots=0,
        num_lookup_tokens=0,
        num_hit_tokens=0,
        num_evicted_blocks=0,
        num_copied_blocks=0,
        num_swapped_out_blocks=0,
        num_swapped_in_blocks=0,
    )
    assert manager.statistics().waste == 5 / 16
    assert manager.statistics([11, 4, 9]).waste == 5 / 16
    assert short in manager.sequence_ids()


def test_an_unused_pool_wastes_and_hits_nothing():
    stats = BlockManager(3, 4).statistics()
    assert (stats.waste, stats.hit_rate, stats.num_empty_blocks) == (0, 0, 3)
    assert counted(stats) == (0, 0, 0)


def test_hits_are_counted_in_tokens():
    manager = BlockManager(16, 4)
    manager.admit([[1, 2, 3, 4, 5, 6, 7, 8, 9]])
    manager.admit([[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 9, 9, 9]])
    stats = manager.statistics()
    assert (stats.num_lookup_tokens, stats.num_hit_tokens) == (25, 12)
    assert stats.hit_rate == 12 / 25


def test_without_a_prefix_cache_nothing_is_looked_up():
    manager = BlockManager(16, 4, prefix_caching=False)
    manager.admit([[1, 2, 3, 4, 5]] * 2)
    stats = manager.statistics()
    assert (stats.num_lookup_tokens, stats.num_hit_tokens, stats.hit_rate) == (0, 0, 0)


def test_every_free_block_is_cached_or_empty_or_waits():
    manager = BlockManager(10, 4)
    full, other = manager.admit([[1, 2, 3, 4, 5], [6, 7, 8, 9]]).sequence_ids
    manager.free([full])
    step = manager.start_step()
    manager.free([other])
    stats = manager.statistics()
    assert (stats.num_cached_blocks, stats.num_empty_blocks, stats.num_deferred_blocks) == (1, 8, 1)
    assert stats.num_used_blocks == 0
    manager.finish_step(step)
    assert manager.statistics().num_cached_blocks == 2


def test_copied_moved_and_evicted_blocks_are_counted():
    manager = BlockManager(4, 4, num_host_blocks=4)
    (parent,) = manager.admit([[1, 2, 3, 4, 5, 6]]).sequence_ids
    (fork,) = manager.fork(parent)
    manager.append([parent])
    manager.swap_out([fork])
    manager.free(manager.allocate([16]))  # evicts the one full block
    manager.swap_in([fork])
    stats = manager.statistics()
    moved = stats.num_swapped_out_blocks, stats.num_swapped_in_blocks
    assert (stats.num_copied_blocks, moved, stats.num_evicted_blocks) == (1, (3, 3), 1)


def test_a_swapped_out_sequence_uses_no_slot():
    manager = BlockManager(8, 4, num_host_blocks=8)
    gone, stays = manager.allocate([6, 5])
    manager.swap_out([gone])
    assert counted(manager.statistics()) == (5, 0, 3)
    assert counted(manager.statistics([9, 7])) == (5, 2, 1)
    assert manager.statistics().num_unshared_blocks == 2
    assert stays in manager.sequence_ids()


@pytest.mark.parametrize(
    ("finals", "reserved"), [((5, 5), 0), ((6, 5), 1), ((5, 8), 3), ((7, 6), 2), ((99, 1), 3)]
)
def test_a_shared_block_waits_for_the_most_tokens_of_its_owners(finals, reserved):
    manager = BlockManager(8, 4)
    manager.fork(manager.allocate([5]))
    assert counted(manager.statistics(finals)) == (5, reserved, 3 - reserved)


def test_final_lengths_that_are_passed_already_reserve_nothing():
    manager = BlockManager(8, 4)
    manager.allocate([6])
    assert counted(manager.statistics([2])) == (6, 0, 2)


@pytest.mark.parametrize("finals", [[], [5], [5, 5, 5]], ids=str)
def test_a_wrong_number_of_final_lengths_is_refused(finals):
    manager = BlockManager(8, 4)
    manager.allocate([5, 5])
    message = f"{len(finals)} final lengths were given for 2 sequences"
    with pytest.raises(ValueError, match=message):
        manager.statistics(finals)


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["admit", "fork", "append", "free", "swap"]), st.integers(1, 9)),
    max_size=12,
)


@given(
    st.integers(1, 4), st.sampled_from([(None,), (3,), (None, 5)]), OPERATIONS, st.integers(0, 9)
)
@settings(max_examples=120)
def test_random_states_are_counted_slot_by_slot(block_size, windows, operations, more):
    manager = BlockManager(200, block_size, windows=windows, num_host_blocks=100)
    for name, number in operations:
        ids = manager.sequence_ids()
        resident = ids[~manager.is_swapped_out(ids)]
        some = resident[number % 3 :: 2]
        if name == "admit":
            manager.admit([[1] * number, [1] * (number // 2 + 1)])
        elif name == "fork":
            manager.fork(some[:2])
        elif name == "append":
            manager.append(some, number)
        elif name == "free":
            manager.free(some[:1])
        else:
            manager.swap_out(some[:1])
    lengths = manager.num_tokens(manager.sequence_ids())
    finals = np.maximum(1, lengths + more - np.arange(lengths.size))
    assert counted(manager.statistics()) == by_slot(manager)
    stats = manager.statistics(finals)
    assert counted(stats) == by_slot(manager, finals)
    assert sum(counted(stats)) == stats.num_used_blocks * block_size
    parts = stats.num_cached_blocks + stats.num_empty_blocks + stats.num_deferred_blocks
    assert stats.num_used_blocks + parts == 200
