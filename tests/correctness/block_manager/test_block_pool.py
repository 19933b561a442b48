"""The pool of blocks, alone: against lists that say in which order blocks are reused."""

import numpy as np
import pytest

from pagedattn import OutOfBlocksError
from pagedattn.block_manager.block_pool import MAX_BLOCKS, BlockPool
from pagedattn.block_manager.prefix_index import BlockDigests


def ids(*blocks):
    return np.array(blocks, np.int32)


def pool_with_digests(num_blocks, hashed=()):
    """A pool whose digests say of `hashed` that their contents can be found."""
    pool = BlockPool(num_blocks)
    pool.digests = BlockDigests(num_blocks)
    pool.digests.hashed[list(hashed)] = True
    return pool


def filled(num_blocks, hashed=()):
    """Such a pool, all of whose blocks are taken."""
    pool = pool_with_digests(num_blocks)
    pool.take(num_blocks)
    pool.digests.hashed[list(hashed)] = True
    return pool


def empty_pool(num_blocks):
    pool = BlockPool(num_blocks)
    pool.take(num_blocks)
    return pool


# -- order of reuse ------------------------------------------------------------------------


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


# -- found blocks --------------------------------------------------------------------------


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


# -- work in flight ------------------------------------------------------------------------


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


# -- undoing -------------------------------------------------------------------------------


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


# -- limits --------------------------------------------------------------------------------


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


# -- a model -------------------------------------------------------------------------------


class Model:
    """A pool as lists: the next block to reuse stands at the end of `empty`, and first else."""

    def __init__(self, num_blocks, *, hashing):
        self.counts = [0] * num_blocks
        self.hashed = set()
        self.empty, self.cached = [], []
        self.unused = list(range(num_blocks))
        self.deferred = []  # step, block
        self.busy = 0
        self.evicted = 0
        self.hashing = hashing

    def take(self, count):
        taken = []
        for _ in range(count):
            if self.empty:
                block = self.empty.pop()
            elif self.unused:
                block = self.unused.pop(0)
            else:
                block = self.cached.pop(0)
                self.evicted += 1
                self.hashed.discard(block)
            self.counts[block] = 1
            taken.append(block)
        return taken

    def push(self, blocks):
        for block in blocks:
            (self.cached if block in self.hashed else self.empty).append(block)

    def release(self, blocks, *, at_once=False):
        for block in blocks:
            self.counts[block] -= 1
        last = {block: place for place, block in enumerate(blocks)}
        dead = [b for place, b in enumerate(blocks) if last[b] == place and not self.counts[b]]
        if self.busy and not at_once:
            self.deferred += [(self.busy, block) for block in dead]
        else:
            self.push(dead)

    def find(self, blocks):
        for block in blocks:
            self.counts[block] += 1
        self.cached = [block for block in self.cached if block not in blocks]
        self.deferred = [(step, block) for step, block in self.deferred if block not in blocks]

    def find_in_vain(self, blocks, count):
        """Find, take `count`, undo both."""
        cached, deferred, hashed = list(self.cached), list(self.deferred), set(self.hashed)
        counts = list(self.counts)
        self.find(blocks)
        taken = self.take(count)
        gone = [place for place, block in enumerate(cached) if block in taken]
        passed = [block for block in cached[: max(gone, default=0)] if block in blocks]
        self.cached = [b for b in cached if b not in taken and b not in passed]
        self.cached += sorted(passed)
        self.deferred, self.counts = deferred, counts
        self.hashed = hashed - set(taken)
        self.push(taken[::-1])
        return taken

    def forget(self, blocks):
        blocks = [block for block in blocks if block in self.hashed]
        self.hashed -= set(blocks)
        self.empty += [block for block in blocks if block in self.cached]
        self.cached = [block for block in self.cached if block not in blocks]

    def settle(self, done, newest):
        self.busy = newest
        self.push([block for step, block in self.deferred if step <= done])
        self.deferred = [(min(step, newest), b) for step, b in self.deferred if step > done]


def assert_same(pool, model):
    state = pool.state()
    assert state["ref_counts"].tolist() == model.counts
    assert state["empty"].tolist() == model.empty[::-1]
    assert state["cached"].tolist() == model.cached
    steps = zip(state["deferred_steps"].tolist(), state["deferred"].tolist(), strict=True)
    assert list(steps) == model.deferred
    assert state["counters"].tolist() == [len(model.counts) - len(model.unused), model.evicted]
    assert pool.num_free == len(model.empty) + len(model.cached) + len(model.unused)
    assert (pool.num_cached, pool.num_deferred) == (len(model.cached), len(model.deferred))
    assert pool.num_used == sum(count > 0 for count in model.counts)
    if model.hashing:
        assert np.flatnonzero(pool.digests.hashed).tolist() == sorted(model.hashed)


@pytest.mark.parametrize("steps", [False, True], ids=["no-steps", "steps"])
@pytest.mark.parametrize("hashing", [False, True], ids=["no-digests", "digests"])
@pytest.mark.parametrize("num_blocks", [1, 2, 9, 70])
def test_thousands_of_random_operations_agree_with_lists(num_blocks, hashing, steps):
    rng = np.random.default_rng(num_blocks)
    pool = pool_with_digests(num_blocks) if hashing else BlockPool(num_blocks)
    model = Model(num_blocks, hashing=hashing)
    started = done = 0

    def some(blocks, most):
        """At most so many of these, in any order."""
        count = min(len(blocks), int(rng.integers(0, most + 1)))
        return rng.permutation(np.array(sorted(blocks), np.int32))[:count]

    for turn in range(2500):
        referenced = [b for b, count in enumerate(model.counts) if count]
        draw = rng.random()
        most = num_blocks // 3 + 1
        if draw < 0.3:
            count = min(pool.num_free, int(rng.integers(0, most + 1)))
            assert pool.take(count).tolist() == model.take(count)
        elif draw < 0.6:
            blocks = some(referenced, most)
            extra = [b for b in blocks.tolist() if model.counts[b] > 1]
            blocks = rng.permutation(np.concatenate([blocks, np.array(extra, np.int32)]))
            pool.release(blocks)
            model.release(blocks.tolist())
        elif draw < 0.75 and hashing:
            blocks = some(model.hashed, most)
            blocks = np.concatenate([blocks, blocks[:1]])
            if rng.random() < 0.5:
                pool.retain_found(blocks)
                model.find(blocks.tolist())
            else:
                idle = pool.retain_found(blocks)
                count = min(pool.num_free, int(rng.integers(0, most + 1)))
                taken = pool.take(count)
                pool.undo_retain(blocks, idle)
                pool.put_back(taken)
                assert taken.tolist() == model.find_in_vain(blocks.tolist(), count)
        elif draw < 0.85 and hashing:
            blocks = [b for b in some(referenced, most).tolist() if b not in model.hashed]
            pool.digests.hashed[blocks] = True
            model.hashed |= set(blocks)
        elif draw < 0.88 and hashing:
            blocks = some(range(num_blocks), most)
            pool.forget(blocks)
            model.forget(blocks.tolist())
        elif steps and draw < 0.94:
            started += rng.random() < 0.6 or started == done
            newest = started if rng.random() < 0.8 else int(rng.integers(done, started + 1))
            newest = 0 if newest == done else newest
            if newest == 0:
                done = started
            pool.settle(done, newest)
            model.settle(done, newest)
        elif steps:
            done = int(rng.integers(done, started + 1))
            newest = 0 if done == started else started
            pool.settle(done, newest)
            model.settle(done, newest)
        else:
            blocks = some(referenced, most)
            pool.retain_found(np.repeat(blocks, 2))
            model.find(blocks.tolist() * 2)
        assert_same(pool, model)
        if turn % 20 == 0:
            pool.check_integrity()


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
