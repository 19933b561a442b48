"""Blocks that are freed while steps run wait in the pool for the newest of these."""

import numpy as np
import pytest

from pagedattn import OutOfBlocksError

from .pools import empty_pool, filled, ids


def test_blocks_that_are_freed_while_a_step_runs_wait_for_it():
    pool = empty_pool(4)
    pool.busy_step = 1
    pool.release(ids(0, 1))
    assert (pool.num_free, pool.num_deferred, pool.num_used) == (0, 2, 2)
    with pytest.raises(OutOfBlocksError):
        pool.take(1)
    pool.settle(0, 1)
    assert pool.num_deferred == 2
    pool.settle(1, 0)
    assert (pool.num_free, pool.num_deferred) == (2, 0)
    assert pool.take(2).tolist() == [1, 0]


def test_blocks_wait_for_the_newest_step_that_ran_when_they_were_freed():
    pool = empty_pool(3)
    for step in (1, 2, 3):
        pool.busy_step = step
        pool.release(ids(step - 1))
    pool.settle(2, 3)
    assert (pool.num_free, pool.num_deferred) == (2, 1)
    assert pool.state()["deferred"].tolist() == [2]
    assert pool.state()["deferred_steps"].tolist() == [3]


def test_a_waiting_block_that_is_found_is_not_freed_by_its_step():
    pool = filled(3, hashed=range(3))
    pool.busy_step = 1
    pool.release(ids(0, 1))
    pool.retain_found(ids(0))
    assert pool.num_deferred == 1
    pool.settle(1, 0)
    assert pool.num_cached == 1
    assert pool.ref_counts(ids(0, 1)).tolist() == [1, 0]
    pool.check_integrity()


def test_a_waiting_block_that_is_found_and_freed_again_waits_for_the_later_step():
    pool = filled(3, hashed=range(3))
    pool.busy_step = 1
    pool.release(ids(0, 1))
    pool.retain_found(ids(0))
    pool.settle(0, 2)
    pool.release(ids(0))
    pool.settle(1, 2)
    assert pool.state()["cached"].tolist() == [1]
    assert pool.state()["deferred"].tolist() == [0]
    pool.check_integrity()
    pool.settle(2, 0)
    assert pool.state()["cached"].tolist() == [1, 0]


def test_what_waited_for_a_step_that_failed_waits_for_the_newest_left():
    pool = empty_pool(4)
    pool.busy_step = 1
    pool.release(ids(0))
    pool.busy_step = 3
    pool.release(ids(1))
    pool.settle(0, 2)  # step 3 failed; 1 and 2 run
    assert pool.state()["deferred_steps"].tolist() == [1, 2]
    pool.settle(2, 0)
    assert pool.num_free == 2
    assert pool.num_deferred == 0


def test_a_forgotten_block_that_waits_is_empty_when_it_is_free():
    pool = filled(2, hashed=range(2))
    pool.busy_step = 1
    pool.release(ids(0, 1))
    pool.forget(ids(0))
    assert pool.num_deferred == 2
    pool.settle(1, 0)
    assert pool.state()["empty"].tolist() == [0]
    assert pool.state()["cached"].tolist() == [1]


def test_blocks_that_are_put_back_do_not_wait_and_are_taken_next_in_the_same_order():
    pool = empty_pool(3)
    pool.release(ids(0, 1, 2))
    pool.busy_step = 5
    pool.put_back(pool.take(2))
    assert pool.state()["empty"].tolist() == [2, 1, 0]
    pool.take(1)
    assert (pool.num_free, pool.num_deferred, pool.busy_step) == (2, 0, 5)


@pytest.mark.parametrize("busy_step", [0, 1, 2])
def test_blocks_that_a_release_would_free_are_counted(busy_step):
    pool = empty_pool(4)
    pool.retain_found(ids(1, 2, 2))
    pool.busy_step = busy_step
    blocks = ids(0, 1, 1, 2, 2)
    counted, free = pool.num_freed_by(blocks), pool.num_free
    pool.release(blocks)
    assert pool.num_free - free == counted == (0 if busy_step else 2)


def test_undoing_a_find_of_waiting_blocks_makes_them_wait_again():
    pool = filled(3, hashed=range(3))
    pool.busy_step = 1
    pool.release(ids(0, 1))
    before = pool.state()
    found = ids(1, 2)
    idle = pool.retain_found(found)
    assert pool.num_deferred == 1
    pool.undo_retain(found, idle)
    after = pool.state()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    pool.check_integrity()
