"""Moving whole sequence groups between the device's pool and the host's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pagedattn.block_manager.copies import BlockCopies
from pagedattn.block_manager.ragged import distinct

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pagedattn.block_manager.block_pool import BlockPool
    from pagedattn.block_manager.copies import CopyBlocks
    from pagedattn.block_manager.prefix_cache import PrefixCache
    from pagedattn.block_manager.sequence_tables import SequenceTables


@dataclass(frozen=True)
class Move:
    """A plan to move the blocks of `rows` to another pool: nothing has changed yet.

    Attributes:
        rows: int64 [num_sequences], all members of the groups that move.
        places: int64 [num_entries], where the rows' blocks stand in the block lists.
        blocks: int32 [num_distinct], the distinct blocks.
        which: int64 [num_entries], the distinct block of each entry.
        found: int32 [num_distinct], where the other pool has the contents already, or -1.
        num_needed: blocks to take from the other pool.
        num_free: blocks that are free for it.

    """

    rows: NDArray[np.int64]
    places: NDArray[np.int64]
    blocks: NDArray[np.int32]
    which: NDArray[np.int64]
    found: NDArray[np.int32]
    num_needed: int
    num_free: int

    def fits(self, kept_free: int = 0) -> bool:
        """Whether the blocks are free, and `kept_free` more."""
        return self.num_needed + kept_free <= self.num_free


def plan_out(tables: SequenceTables, host: BlockPool | None, rows: NDArray[np.int64]) -> Move:
    """Plan to move groups to the host: each block once, however many sequences share it."""
    places = tables.held(rows)
    blocks, which = np.unique(tables.lists.entries[places], return_inverse=True)
    found = np.full(blocks.size, -1, np.int32)
    num_free = host.num_free if host is not None else 0
    return Move(rows, places, blocks, which.reshape(-1), found, blocks.size, num_free)


def plan_in(
    tables: SequenceTables,
    pool: BlockPool,
    host: BlockPool,
    cache: PrefixCache | None,
    rows: NDArray[np.int64],
) -> Move:
    """Plan to move groups back; a block that the prefix cache still holds is not copied."""
    places = tables.held(rows)
    blocks, which = np.unique(tables.lists.entries[places], return_inverse=True)
    found = np.full(blocks.size, -1, np.int32)
    num_free = pool.num_free
    if cache is not None and host.digests is not None:
        hashed = host.digests.hashed[blocks]
        found[hashed] = cache.index.find(host.digests.digests[blocks[hashed]])
        num_free -= pool.num_reusable(distinct(found[found >= 0]))
    missing = int(np.count_nonzero(found < 0))
    return Move(rows, places, blocks, which.reshape(-1), found, missing, num_free)


def carry_out(
    move: Move,
    tables: SequenceTables,
    source: BlockPool,
    target: BlockPool,
    copy: CopyBlocks | None,
) -> BlockCopies:
    """Move the blocks, for which there must be room; if `copy` raises, change nothing.

    Returns:
        The copies: `sources` are blocks of `source`, `destinations` of `target`.

    """
    missing = move.found < 0
    moved = move.found.copy()
    # what is found is held first, so that taking new blocks cannot evict it
    held = move.found[~missing]
    idle = target.retain_found(held)
    moved[missing] = target.take(move.num_needed)
    copies = BlockCopies(move.blocks[missing], moved[missing])
    if copy is not None and len(copies):
        try:
            copy(copies)
        except BaseException:
            target.undo_retain(held, idle)
            target.put_back(copies.destinations)
            raise
    references = moved[move.which]
    target.retain_found(references)
    target.release(moved)  # by which each was held until now
    source.release(tables.lists.entries[move.places][::-1])
    tables.lists.entries[move.places] = references
    return copies
