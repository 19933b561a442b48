"""Random operations on the pool of blocks, against lists that say in which order it reuses them."""

import numpy as np
import pytest

from pagedattn.block_manager.block_pool import BlockPool

from .pools import pool_with_digests


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
