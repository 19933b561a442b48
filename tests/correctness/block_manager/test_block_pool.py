"""The pool of blocks, alone: the order of reuse, what is found and undone, what is refused."""

import numpy as np
import pytest

from pagedattn import OutOfBlocksError
from pagedattn.block_manager.block_pool import MAX_BLOCKS, BlockPool

from .pools import empty_pool, filled, ids, pool_with_digests


def test_blocks_that_were_never_used_are_handed_out_in_order():
    pool = BlockPool(5)
    assert pool.take(2).tolist() == [0, 1]
    assert pool.take(3).tolist() == [2, 3, 4]


def test_blocks_that_hold_nothing_are_reused_last_freed_first():
    pool = empty_pool(5)
    pool.release(ids(1, 4))
    pool.release(ids(0))
    assert pool.take(3).tolist() == [0, 4, 1]


def test_freed_blocks_go_before_those_never_used_and_these_before_cached_ones():
    pool = pool_with_digests(6)
    pool.take(4)
    pool.digests.hashed[[0, 3]] = True
    pool.release(ids(3, 1, 0))
    assert pool.take(5).tolist() == [1, 4, 5, 3, 0]
    assert pool.num_evicted == 2


def test_cached_blocks_are_evicted_least_recently_freed_first_and_first_of_a_call_first():
    pool = filled(6, hashed=range(6))
    pool.release(ids(5, 2))  # a sequence's tail first
    pool.release(ids(0))
    assert [pool.take(1).item() for _ in range(3)] == [5, 2, 0]


def test_an_evicted_block_can_no_longer_be_found():
    pool = filled(3, hashed=[0, 1])
    pool.release(ids(0, 1))
    pool.take(1)
    assert pool.digests.hashed.tolist() == [False, True, False]
    assert (pool.num_evicted, pool.num_cached) == (1, 1)


def test_a_block_shared_by_several_sequences_follows_the_tails_of_all():
    pool = filled(4, hashed=range(4))
    pool.retain_found(ids(0))
    pool.release(ids(2, 0, 3, 0))
    assert pool.take(3).tolist() == [2, 3, 0]


def test_a_block_stays_as_long_as_one_reference_is_left():
    pool = empty_pool(2)
    pool.retain_found(ids(1, 1))
    pool.release(ids(1, 1))
    assert pool.ref_counts(ids(0, 1)).tolist() == [1, 1]
    assert pool.num_free == 0
    pool.release(ids(1))
    assert pool.num_free == 1
    pool.check_integrity()


def test_taken_blocks_keep_their_ids_when_the_pool_goes_on():
    pool = empty_pool(4)
    pool.release(ids(0, 1, 2, 3))
    taken = pool.take(2)
    pool.release(taken[:1])
    pool.release(ids(*taken[1:]))
    assert taken.tolist() == [3, 2]


def test_a_found_block_leaves_the_queue():
    pool = filled(4, hashed=range(4))
    pool.release(ids(0, 1, 2, 3))
    pool.retain_found(ids(1, 1))
    assert pool.num_cached == 3
    assert pool.ref_counts(ids(1)).tolist() == [2]
    pool.check_integrity()
    assert pool.take(3).tolist() == [0, 2, 3]


def test_a_found_block_that_is_freed_again_is_the_most_recent():
    pool = filled(3, hashed=range(3))
    pool.release(ids(0, 1, 2))
    pool.retain_found(ids(0))
    pool.release(ids(0))
    assert pool.take(3).tolist() == [1, 2, 0]


def test_many_stale_entries_are_skipped():
    pool = filled(60, hashed=range(60))
    pool.release(np.arange(60, dtype=np.int32))
    pool.retain_found(np.arange(59, dtype=np.int32))  # more than one look into the queue
    assert pool.take(1).tolist() == [59]
    pool.check_integrity()


def test_free_blocks_among_some_are_counted():
    pool = filled(5, hashed=[1, 2, 3])
    pool.release(ids(1, 2))
    pool.busy_step = 1
    pool.release(ids(3))
    assert pool.num_reusable(ids(0, 1, 2, 3)) == 2


def test_forgotten_blocks_are_empty_and_reused_first():
    pool = filled(5, hashed=range(4))
    pool.release(ids(0, 1, 2))
    pool.forget(ids(1, 3, 4))  # free, referenced, never findable
    assert (pool.num_cached, pool.num_free) == (2, 3)
    assert pool.digests.hashed.tolist() == [True, False, True, False, False]
    pool.check_integrity()
    assert pool.take(3).tolist() == [1, 0, 2]
    assert pool.num_evicted == 2


def test_undoing_a_find_restores_the_order():
    pool = filled(5, hashed=range(5))
    pool.release(ids(4, 3, 2, 1))
    before = pool.state()
    found = ids(3, 1, 3, 0)
    pool.undo_retain(found, pool.retain_found(found))
    after = pool.state()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    pool.check_integrity()
    assert pool.take(4).tolist() == [4, 3, 2, 1]


def test_a_find_that_is_undone_after_blocks_behind_it_were_taken_is_the_most_recent():
    pool = filled(5, hashed=range(5))
    pool.release(ids(0, 1, 2, 3))
    found = ids(0, 2)
    idle = pool.retain_found(found)
    taken = pool.take(1)
    assert taken.tolist() == [1]
    pool.undo_retain(found, idle)
    pool.check_integrity()
    assert pool.state()["cached"].tolist() == [2, 3, 0]
    pool.put_back(taken)
    assert pool.state()["empty"].tolist() == [1]
    assert pool.num_cached == 3


@pytest.mark.parametrize("num_blocks", [-1, 0, MAX_BLOCKS + 1])
def test_an_impossible_number_of_blocks_is_refused(num_blocks):
    with pytest.raises(ValueError, match=f"num_blocks is {num_blocks}; it must be from 1 to "):
        BlockPool(num_blocks)


def test_taking_more_than_is_free_says_so_and_changes_nothing():
    pool = filled(4, hashed=[0])
    pool.release(ids(0, 1))
    before = pool.state()
    with pytest.raises(OutOfBlocksError, match="needs 3 blocks and 2 are free") as caught:
        pool.take(3)
    assert (caught.value.needed, caught.value.free) == (3, 2)
    after = pool.state()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_requiring_blocks_accepts_just_as_many_as_are_free():
    pool = BlockPool(3)
    pool.require(3)
    pool.require(5, free=5)
    for count, free in ((4, None), (6, 5), (1, 0)):
        with pytest.raises(OutOfBlocksError):
            pool.require(count, free)


def test_taking_and_releasing_nothing_changes_nothing():
    pool = BlockPool(1)
    assert pool.take(0).size == 0
    pool.take(1)
    assert pool.take(0).size == 0
    pool.release(ids())
    pool.retain_found(ids())
    assert pool.num_used == 1
    pool.check_integrity()


def test_a_state_is_a_copy_and_makes_an_equal_pool():
    pool = filled(9, hashed=[0, 2, 4, 6])
    pool.release(ids(0, 1, 2, 3))
    pool.take(2)
    pool.busy_step = 1
    pool.release(ids(4, 5))
    pool.settle(0, 2)
    pool.release(ids(6))
    state = pool.state()
    twin = pool_with_digests(9, np.flatnonzero(pool.digests.hashed))
    twin.restore(state, 2)
    kept = {name: array.copy() for name, array in state.items()}
    twin.check_integrity()
    assert all(np.array_equal(twin.state()[name], state[name]) for name in state)
    assert (twin.num_cached, twin.num_deferred, twin.busy_step) == (2, 3, 2)
    pool.settle(2, 0)
    pool.take(4)
    assert all(np.array_equal(kept[name], state[name]) for name in state)
    twin.settle(2, 0)
    assert twin.num_free == 5


def test_entries_of_blocks_that_come_and_go_never_fill_the_queue():
    pool = filled(8, hashed=range(8))
    pool.release(np.arange(8, dtype=np.int32))
    for _ in range(1000):  # each leaves a stale entry behind
        pool.retain_found(ids(7, 6))
        pool.release(ids(7, 6))
    pool.check_integrity()
    assert pool.take(8).tolist() == [0, 1, 2, 3, 4, 5, 7, 6]


@pytest.mark.parametrize("damage", ["count", "cached", "deferred", "queue", "digest", "place"])
def test_damage_to_a_pool_is_found(damage):
    pool = filled(6, hashed=[1, 2])
    pool.release(ids(0, 1, 2))
    pool.busy_step = 1
    pool.release(ids(3))
    pool.check_integrity()
    if damage == "count":
        pool._ref_counts[4] = -1
    elif damage == "cached":
        pool._num_cached += 1
    elif damage == "deferred":
        pool._num_deferred += 1
    elif damage == "queue":
        pool._queue[pool._head] = 2
    elif damage == "digest":
        pool.digests.hashed[1] = False
    else:
        pool._place[5] = 1
    with pytest.raises(AssertionError):
        pool.check_integrity()
