"""How sequences leave: to the host and back, dropped, and while steps still read their blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pagedattn.block_manager import growth, swapping
from pagedattn.block_manager.block_pool import OutOfBlocksError
from pagedattn.block_manager.ragged import distinct, ragged
from pagedattn.block_manager.state import ManagerState

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike, NDArray

    from pagedattn.block_manager.copies import BlockCopies, CopyBlocks


class Preemption(ManagerState):
    """The part of a `BlockManager` that takes blocks from sequences."""

    def swap_out(self, sequence_ids: ArrayLike, *, copy: CopyBlocks | None = None) -> BlockCopies:
        """Preempt by swapping: move whole groups to the host's pool, all or none.

        Args:
            sequence_ids: live sequences; all members of their groups move with them.
            copy: carries out the copies; if it raises, no sequence has moved.

        Returns:
            Copies from blocks of the pool to blocks of the host's, each block once. Unless `copy`
            did, carry them out before the next step writes to the pool.

        Raises:
            OutOfBlocksError: the host's pool has too few free blocks.
            SwappedOutError: a group is there already.

        """
        rows = self._tables.rows.group_rows(self._tables.rows.resident_rows_of(sequence_ids))
        self._poll()
        move = swapping.plan_out(self._tables, self._host, rows)
        if rows.size == 0:
            return growth.NO_COPIES
        if self._host is None:
            raise OutOfBlocksError(move.num_needed, 0, "host")
        self._host.require(move.num_needed)
        copies = swapping.carry_out(move, self._tables, self._pool, self._host, copy)
        if self._cache is not None and self._host.digests is not None:
            hashed = self._cache.index.hashed[copies.sources]
            digests = self._cache.index.digests[copies.sources[hashed]]
            self._host.digests.insert(copies.destinations[hashed], digests)
        self._tables.rows.set_swapped(rows, swapped=True)
        self.num_swapped_out_blocks += len(copies)
        return copies

    def swap_in(self, sequence_ids: ArrayLike, *, copy: CopyBlocks | None = None) -> BlockCopies:
        """Bring whole groups back from the host's pool, all or none.

        Args:
            sequence_ids: live sequences that are swapped out; their whole groups move.
            copy: carries out the copies; if it raises, no sequence has moved, but cached blocks
                that were to be written are evicted.

        Returns:
            Copies from blocks of the host's pool to blocks of the pool. A block whose contents
            the prefix cache still holds is shared, and not copied.

        Raises:
            OutOfBlocksError: the pool has too few free blocks.
            ValueError: a sequence is not swapped out.

        """
        rows = self._swapped_groups(sequence_ids)
        if rows.size == 0:
            return growth.NO_COPIES
        assert self._host is not None
        self._poll()
        move = self._plan_in(rows)
        self._pool.require(move.num_needed + self._num_kept_free, move.num_free)
        held = self._tables.held(rows)
        hosted = self._tables.lists.entries[held]
        copies = swapping.carry_out(move, self._tables, self._host, self._pool, copy)
        if self._cache is not None and self._host.digests is not None:
            hashed = self._host.digests.hashed[copies.sources]
            digests = self._host.digests.digests[copies.sources[hashed]]
            self._cache.register(self._pool, copies.destinations[hashed], digests)
            self._host.forget(distinct(hosted))
        self._tables.rows.set_swapped(rows, swapped=False)
        self.num_swapped_in_blocks += len(copies)
        return copies

    def drop(self, sequence_ids: ArrayLike) -> NDArray[np.int64]:
        """Preempt by recomputation: end the whole groups of these sequences (SOSP '23, §4.5).

        Returns:
            int64 [num_dropped], all members' ids. Admitted again with their tokens, they find
            what the prefix cache still holds.

        """
        rows = self._tables.rows.group_rows(self._tables.rows.rows_of(sequence_ids))
        ids = self._tables.rows.ids(rows)
        self._poll()
        self._end(rows)
        return ids

    def start_step(self, is_done: Callable[[], bool] | None = None) -> int:
        """Say that work was launched that reads blocks as the tables name them now.

        Blocks that are freed from now on are handed out again only when this step is done.

        Args:
            is_done: asked when blocks are needed, for one `torch.cuda.Event.query`; without it,
                call `finish_step`. What it raises comes out of the operation that asked, which
                then has changed nothing.

        Returns:
            The step's number: 1, 2, ...

        """
        step = self._steps.start(is_done)
        self._settle()
        return step

    def finish_step(self, step: int) -> None:
        """Say that `step` and all before it are done: what waited for them is free.

        Raises:
            ValueError: no such step was started.

        """
        self._steps.finish(step)
        self._settle()

    def fail_step(self, step: int) -> NDArray[np.int64]:
        """Say that `step` and all after it did not do their work, and read no more.

        The blocks that they were to write cannot be found any longer, here or on the host.

        Returns:
            int64 [num_tainted], sequences that may hold what was never written: those whose
            tables name a block that these steps were to fill, and all that are swapped out, of
            which this is not known. `drop` them, and the groups that were in these steps.

        Raises:
            ValueError: no such step was started, or it is done.

        """
        lost = self._steps.fail(step)
        self._settle()
        if self._host is not None and self._host.digests is not None:
            self._host.forget(np.flatnonzero(self._host.digests.hashed).astype(np.int32))
        rows, tables = self._tables.rows.live_rows(), self._tables
        if lost is None:
            self.reset_prefix_cache()
            return tables.rows.ids(rows)
        if self._cache is not None:
            self._pool.forget(lost[self._cache.index.hashed[lost]])
        tainted = tables.rows.swapped[rows]
        resident = rows[~tainted]
        lists = tables.all_lists_of(resident)
        ends = tables.per_list(tables.blocks_for(tables.rows.num_tokens[resident]))
        numbers, _ = ragged(tables.lists.first[lists], ends)
        named = np.isin(tables.lists.entries[tables.held(resident)], lost)
        holders = np.zeros(resident.size, dtype=bool)
        holders[numbers[named] // tables.groups.count] = True
        tainted[~tainted] = holders
        return tables.rows.ids(rows[tainted])

    def cancel_step(self) -> NDArray[np.int64]:
        """Say that what was admitted and appended since the last `start_step` is not launched.

        The blocks that the step was to write cannot be found, as after `fail_step`.

        Returns:
            int64, as by `fail_step`: those that are still launched, by a later step and with what
            they share, may stay; free those that are given up.

        """
        return self.fail_step(self.start_step())

    def reset_prefix_cache(self) -> None:
        """Make nothing findable that is there now, as after new weights were loaded.

        Sequences stay; what they hold, and go on to fill, is not found by later prompts.
        """
        if self._cache is not None:
            self._pool.forget(np.flatnonzero(self._cache.index.hashed).astype(np.int32))
            self._cache.index.clear()
            self._cache.hasher.move_on()

    # -- helpers ---------------------------------------------------------------------------

    def _end(self, rows: NDArray[np.int64]) -> None:
        swapped = self._tables.rows.swapped[rows] if self._tables.rows.num_swapped else None
        resident = rows
        if swapped is not None and swapped.any():
            resident = rows[~swapped]
            self._release_host(self._tables.held(rows[swapped]))
        self._pool.release(self._tables.lists.entries[self._tables.tails_first(resident)])
        self._tables.lists.close(self._tables.all_lists_of(rows))
        self._tables.rows.remove(rows)

    def _release_host(self, places: NDArray[np.int64]) -> None:
        assert self._host is not None
        blocks = self._tables.lists.entries[places]
        self._tables.lists.entries[places] = 0
        self._host.release(blocks)
        if self._host.digests is not None:
            blocks = distinct(blocks)
            self._host.forget(blocks[self._host.ref_counts(blocks) == 0])
