"""The physical blocks: how many references each has, and in which order free ones are reused."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

from pagedattn.block_manager.ragged import distinct, nonzero

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from pagedattn.block_manager.prefix_index import BlockDigests

MAX_BLOCKS = 2**30  # positions in the queue are int32
_NOT_QUEUED = 0

# unreferenced blocks, and where each was queued
Idle = tuple["NDArray[np.int32]", "NDArray[np.int32]"]


class OutOfBlocksError(RuntimeError):
    """More blocks were asked for than are free; nothing was changed.

    Attributes:
        needed: blocks the operation needs.
        free: blocks that were free for it.

    Args:
        needed: as above.
        free: as above.
        pool: which pool, if not the device's.
        num_blocks: blocks of the pool, free or not, if that is known.

    """

    def __init__(
        self, needed: int, free: int, pool: str = "", num_blocks: int | None = None
    ) -> None:
        blocks = f"{pool} blocks" if pool else "blocks"
        advice = "free or preempt a sequence first"
        if num_blocks is not None and needed > num_blocks:
            advice = f"the pool has {num_blocks}, so it never fits"
        super().__init__(f"the operation needs {needed} {blocks} and {free} are free: {advice}")
        self.needed = needed
        self.free = free


class BlockPool:
    """A pool of `num_blocks` blocks with reference counts.

    Free blocks are reused in this order: those that hold nothing, last freed first; those never
    used; those whose contents can still be found, least recently freed first. All but the
    never used stand in one queue, an array with room at both ends:

        queue:  [ ... | empty, empty | cached, (stale), cached, ... | ... ]
                      ^ head, next                              tail ^

    A cached entry counts while `place` of its block points back at it. A block that is found
    again leaves by resetting its place; its stale entry is skipped later. Blocks that may still be
    read by work in flight are held back under the step's number until `settle`.

    Host memory: 13 bytes a block.

    Args:
        num_blocks: blocks in the pool, 1 to 2**30.
        name: what errors call its blocks, for one "host".

    Attributes:
        digests: which blocks hold what can be found, or None; evicted blocks are forgotten there.
        busy_step: newest step that may still read blocks; 0 if none.
        num_evicted: blocks that were handed out although their contents could be found.

    """

    def __init__(self, num_blocks: int, name: str = "") -> None:
        if not 1 <= num_blocks <= MAX_BLOCKS:
            raise ValueError(f"num_blocks is {num_blocks}; it must be from 1 to {MAX_BLOCKS}")
        self.num_blocks = num_blocks
        self.name = name
        self.digests: BlockDigests | None = None
        self.num_evicted = 0
        self.busy_step = 0
        self._ref_counts = np.zeros(num_blocks, dtype=np.int32)
        self._num_extra = 0  # references beyond the first of each block
        # of cached blocks, position in the queue + 1; of deferred ones, minus their batch; else 0
        self._place = np.zeros(num_blocks, dtype=np.int32)
        self._queue = np.empty(num_blocks + num_blocks // 4 + 16, dtype=np.int32)
        self._head = self._tail = self._queue.size
        self._num_empty = 0
        self._num_cached = 0
        self._next_unused = 0
        self._deferred: deque[tuple[int, int, NDArray[np.int32]]] = deque()  # step, batch, blocks
        self._batch = 0
        self._num_deferred = 0

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out, those whose contents can be found included."""
        return self._num_empty + self._num_cached + self.num_blocks - self._next_unused

    @property
    def num_cached(self) -> int:
        """Free blocks whose contents can still be found."""
        return self._num_cached

    @property
    def num_deferred(self) -> int:
        """Unreferenced blocks that work in flight may still read."""
        return self._num_deferred

    @property
    def num_used(self) -> int:
        """Blocks that something refers to."""
        return self.num_blocks - self.num_free - self._num_deferred

    def ref_counts(self, blocks: NDArray[np.int32]) -> NDArray[np.int32]:
        """How many block-table entries refer to each of `blocks`; same shape, int32."""
        return self._ref_counts[blocks]

    @property
    def any_shared(self) -> bool:
        """Whether a block has more than one reference."""
        return self._num_extra > 0

    def num_reusable(self, blocks: NDArray[np.int32]) -> int:
        """How many of the distinct `blocks` are free, so that using them takes free blocks."""
        return int(np.count_nonzero(self._place[blocks] > 0))

    def require(self, count: int, free: int | None = None) -> None:
        """Raise `OutOfBlocksError` unless `count` blocks are free."""
        free = self.num_free if free is None else free
        if count > free:
            raise OutOfBlocksError(count, free, self.name, self.num_blocks)

    def take(self, count: int) -> NDArray[np.int32]:
        """Hand out `count` free blocks, each with one reference; their contents are forgotten.

        Returns:
            int32 [count], distinct ids.

        Raises:
            OutOfBlocksError: fewer are free; the pool is unchanged.

        """
        self.require(count)
        recycled = min(count, self._num_empty)
        blocks = self._queue[self._head : self._head + recycled]
        self._head += recycled
        self._num_empty -= recycled
        unused = min(count - recycled, self.num_blocks - self._next_unused)
        if unused:
            fresh = np.arange(self._next_unused, self._next_unused + unused, dtype=np.int32)
            self._next_unused += unused
            blocks = np.concatenate([blocks, fresh]) if recycled else fresh
        if recycled + unused < count:
            blocks = np.concatenate([blocks, self._evict(count - recycled - unused)])
        elif not unused:
            blocks = blocks.copy()
        self._ref_counts[blocks.astype(np.intp)] = 1
        return blocks

    def _evict(self, count: int) -> NDArray[np.int32]:
        """Take `count` cached blocks from the head of the queue, least recently freed first."""
        evicted = []
        self._num_cached -= count
        window = count + 16
        while count:
            entries = self._queue[self._head : min(self._head + window, self._tail)]
            positions = np.arange(self._head + 1, self._head + 1 + entries.size, dtype=np.int32)
            valid = nonzero(self._place[entries] == positions)[:count]
            evicted.append(entries[valid])
            count -= valid.size
            self._head += entries.size if count else int(valid[-1]) + 1
            window *= 2
        blocks = np.concatenate(evicted)
        self._place[blocks] = _NOT_QUEUED
        self.num_evicted += blocks.size
        if self.digests is not None:
            self.digests.forget(blocks)
        return blocks

    def retain_found(self, blocks: NDArray[np.int32]) -> Idle:
        """Add a reference for each entry of `blocks` (ids may repeat), free or not.

        Returns:
            What `undo_retain` needs.

        """
        idle = blocks[self._ref_counts[blocks.astype(np.intp)] == 0]
        if idle.size:
            idle = distinct(idle)
        places = self._place[idle]
        if idle.size:
            queued = int(np.count_nonzero(places > 0))
            self._num_cached -= queued
            self._num_deferred -= idle.size - queued
            self._place[idle] = _NOT_QUEUED
        np.add.at(self._ref_counts, blocks.astype(np.intp), np.int32(1))
        self._num_extra += blocks.size - idle.size
        return idle, places

    def undo_retain(self, blocks: NDArray[np.int32], idle: Idle) -> None:
        """Undo `retain_found(blocks)`, after which blocks may have been taken, and no more."""
        np.subtract.at(self._ref_counts, blocks.astype(np.intp), np.int32(1))
        ids, places = idle
        self._num_extra -= blocks.size - ids.size
        stays = (places < 0) | (places > self._head)
        self._place[ids[stays]] = places[stays]
        self._num_deferred += int(np.count_nonzero(places < 0))
        self._num_cached += int(np.count_nonzero(places[stays] > 0))
        self._push(ids[~stays])  # blocks that were queued behind these have been taken

    def release(self, blocks: NDArray[np.int32]) -> None:
        """Drop one reference for each entry of `blocks` (ids may repeat).

        A block whose count reaches zero is free again, or waits for the work in flight. Of those
        that can be found, the first in `blocks` are evicted first.
        """
        places = blocks.astype(np.intp)  # with these, numpy gathers three times faster
        if self._num_extra == 0:  # nothing is shared, so no id is repeated
            self._ref_counts[places] = 0
            dead = blocks
        else:
            np.subtract.at(self._ref_counts, places, np.int32(1))
            dead = blocks[self._ref_counts[places] == 0]
            # an id may stand in `dead` several times: keep the last, so that a block shared by
            # several sequences follows the tails of all of them
            marks = np.arange(dead.size, dtype=np.int32)
            places = dead.astype(np.intp)
            self._place[places] = marks
            dead = dead[self._place[places] == marks]
            self._place[dead] = _NOT_QUEUED
            self._num_extra -= blocks.size - dead.size
        if dead.size == 0:
            return
        if self.busy_step:
            self._defer(dead, self.busy_step)
        else:
            self._push(dead)

    def _defer(self, blocks: NDArray[np.int32], step: int) -> None:
        self._batch = self._batch % MAX_BLOCKS + 1
        self._place[blocks] = -self._batch
        self._deferred.append((step, self._batch, blocks))
        self._num_deferred += blocks.size

    def put_back(self, blocks: NDArray[np.int32]) -> None:
        """Release blocks that an operation which failed had taken, to be taken next."""
        busy_step, self.busy_step = self.busy_step, 0  # nothing reads them
        self.release(blocks[::-1])
        self.busy_step = busy_step

    def num_freed_by(self, blocks: NDArray[np.int32]) -> int:
        """How many blocks `release(blocks)` would make free at once."""
        if self.busy_step:
            return 0
        each, counts = np.unique(blocks, return_counts=True)
        return int(np.count_nonzero(self._ref_counts[each] == counts))

    def settle(self, done: int, newest_running: int) -> None:
        """Free what waited for work that is done, unless it was found meanwhile.

        Args:
            done: the newest step that is done with all before it.
            newest_running: the newest step that may still read blocks, 0 if none; what waited
                for a later one, which failed, waits for this.

        """
        self.busy_step = newest_running
        while self._deferred and self._deferred[0][0] <= done:
            _, batch, blocks = self._deferred.popleft()
            blocks = blocks[self._place[blocks] == -batch]
            self._num_deferred -= blocks.size
            self._place[blocks] = _NOT_QUEUED
            self._push(blocks)
        if self._deferred and self._deferred[-1][0] > newest_running:
            self._deferred = deque(
                (min(step, newest_running), batch, blocks) for step, batch, blocks in self._deferred
            )

    def forget(self, blocks: NDArray[np.int32]) -> None:
        """Make the contents of the distinct `blocks` impossible to find; free ones are empty."""
        assert self.digests is not None
        blocks = blocks[self.digests.hashed[blocks]]
        self.digests.forget(blocks)
        cached = blocks[self._place[blocks] > 0]
        self._place[cached] = _NOT_QUEUED
        self._num_cached -= cached.size
        self._push_empty(cached)

    def _push(self, blocks: NDArray[np.int32]) -> None:
        """Queue unreferenced blocks: those that can be found at the tail, others at the head."""
        if self.digests is None:
            self._push_empty(blocks)
            return
        hashed = self.digests.hashed[blocks.astype(np.intp)]
        self._push_empty(blocks[~hashed])
        cached = blocks[hashed]
        if cached.size:
            self._make_room(0, cached.size)
            stop = self._tail + cached.size
            self._queue[self._tail : stop] = cached
            positions = np.arange(self._tail + 1, stop + 1, dtype=np.int32)
            self._place[cached.astype(np.intp)] = positions
            self._tail = stop
            self._num_cached += cached.size

    def _push_empty(self, blocks: NDArray[np.int32]) -> None:
        if blocks.size == 0:
            return
        self._make_room(blocks.size, 0)
        start = self._head - blocks.size
        self._queue[start : self._head] = blocks[::-1]
        self._head = start
        self._num_empty += blocks.size

    def _make_room(self, before: int, after: int) -> None:
        """Drop stale entries and centre the queue when one of its ends is reached."""
        if before <= self._head and self._tail + after <= self._queue.size:
            return
        empty, cached = self._queued()
        spare = self._queue.size - empty.size - cached.size - before - after
        # without a prefix cache only the head moves
        self._head = before + (spare if self.digests is None else spare // 2)
        middle = self._head + empty.size
        self._tail = middle + cached.size
        self._queue[self._head : middle] = empty
        self._queue[middle : self._tail] = cached
        self._place[cached] = np.arange(middle + 1, self._tail + 1, dtype=np.int32)

    def _queued(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Copies of the queue's empty blocks and of its cached ones, without stale entries."""
        middle = self._head + self._num_empty
        entries = self._queue[middle : self._tail if self._num_cached else middle]
        positions = np.arange(middle + 1, middle + 1 + entries.size, dtype=np.int32)
        return self._queue[self._head : middle].copy(), entries[self._place[entries] == positions]

    def state(self) -> dict[str, NDArray[Any]]:
        """Copies of what `restore` needs: counts, and ids in the order of their reuse."""
        live = [blocks[self._place[blocks] == -batch] for _, batch, blocks in self._deferred]
        steps = [
            np.full(b.size, step) for b, (step, _, _) in zip(live, self._deferred, strict=True)
        ]
        empty, cached = self._queued()
        return {
            "ref_counts": self._ref_counts.copy(),
            "empty": empty,
            "cached": cached,
            "deferred": np.concatenate([np.empty(0, np.int32), *live]),
            "deferred_steps": np.concatenate([np.empty(0, np.int64), *steps]),
            "counters": np.array([self._next_unused, self.num_evicted]),
        }

    def restore(self, state: Mapping[str, NDArray[Any]], busy_step: int) -> None:
        """Make this pool, which is as new but for its digests, what `state` says."""
        self._ref_counts[:] = state["ref_counts"]
        self._num_extra = int(self._ref_counts.sum()) - int(np.count_nonzero(self._ref_counts))
        self._next_unused, self.num_evicted = state["counters"].tolist()
        if not 0 <= self._next_unused <= self.num_blocks or self.num_evicted < 0:
            raise ValueError(f"the pool's counters are {state['counters'].tolist()}")
        if (state["deferred_steps"] > busy_step).any():
            raise ValueError("a block waits for a step that does not run")
        self._push_empty(state["empty"][::-1])
        self._push(state["cached"])
        for step in np.unique(state["deferred_steps"]).tolist():
            blocks = state["deferred"][state["deferred_steps"] == step]
            self._defer(blocks, step)
        self.busy_step = busy_step

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless each unreferenced block waits in exactly one place."""
        assert (self._ref_counts >= 0).all(), "a reference count is negative"
        extra = int(self._ref_counts.sum()) - int(np.count_nonzero(self._ref_counts))
        assert extra == self._num_extra, "shared references are miscounted"
        empty, cached = self._queued()
        assert cached.size == self._num_cached, "cached blocks are miscounted"
        assert not self._place[empty].any(), "an empty block has a place"
        waiting = [blocks[self._place[blocks] == -batch] for _, batch, blocks in self._deferred]
        deferred = np.concatenate([np.empty(0, np.int32), *waiting])
        assert deferred.size == self._num_deferred, "deferred blocks are miscounted"
        unused = np.arange(self._next_unused, self.num_blocks)
        free = np.sort(np.concatenate([empty, cached, deferred, unused]))
        idle = nonzero(self._ref_counts == 0)
        assert np.array_equal(free, idle), "the queue and the reference counts disagree"
        if self.digests is not None:
            hashed = self.digests.hashed
            assert hashed[cached].all(), "a cached block cannot be found"
            assert not hashed[empty].any(), "an empty block can be found"
            assert not hashed[unused].any(), "a block that was never used can be found"
        assert not self._place[self._ref_counts > 0].any(), "a referenced block is queued"
