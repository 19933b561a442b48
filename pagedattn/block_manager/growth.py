"""What a batch needs when its sequences get more tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pagedattn.block_manager.copies import BlockCopies
from pagedattn.block_manager.ragged import nonzero, whole_sum

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pagedattn.block_manager.block_pool import BlockPool
    from pagedattn.block_manager.copies import CopyBlocks
    from pagedattn.block_manager.sequence_tables import SequenceTables

_NONE = np.empty(0, dtype=np.int64)
_MOST_TOKENS = np.int64(1) << 61  # more than fits any pool
NO_COPIES = BlockCopies(np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int32))


@dataclass(frozen=True)
class Growth:
    """A plan: nothing has changed yet.

    Attributes:
        rows: int64 [num_sequences].
        lengths: int64 [num_sequences], tokens before.
        grown: int64 [num_sequences], tokens after.
        opening: int64 [num_opening], places in the batch of those that need new blocks.
        first_new: int64 [num_opening], the logical block each opens first.
        end_new: int64 [num_opening], the logical block after the last.
        writers: int64 [num_writers], places in the batch of those that must copy their last
            block before they write into it.
        left: for each layer group that loses blocks to its window, the lists, their new first
            columns, and the places of the lost blocks in the block lists' entries.
        num_needed: blocks to take.
        num_free: blocks that are free for it, those that leave a window included.

    """

    rows: NDArray[np.int64]
    lengths: NDArray[np.int64]
    grown: NDArray[np.int64]
    opening: NDArray[np.int64]
    first_new: NDArray[np.int64]
    end_new: NDArray[np.int64]
    writers: NDArray[np.int64]
    left: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]
    num_needed: int
    num_free: int


def plan(
    tables: SequenceTables,
    pool: BlockPool,
    rows: NDArray[np.int64],
    counts: NDArray[np.int64] | np.int64,
) -> Growth:
    """Work out what `counts` (one for all, or one a row) more tokens ask for."""
    size, num_groups = tables.groups.block_size, tables.groups.count
    lengths = tables.rows.num_tokens[rows]
    if counts.size == 1 and counts == 1:
        grown = lengths + 1
        opening = nonzero(lengths % size == 0)
        first_new = lengths[opening] // size
        end_new = first_new + 1
    else:
        grown = lengths + np.minimum(counts, _MOST_TOKENS)
        first_new, end_new = tables.blocks_for(lengths), tables.blocks_for(grown)
        opening = nonzero(end_new > first_new)
        first_new, end_new = first_new[opening], end_new[opening]
    writers = _NONE
    if tables.rows.any_forked:
        forked = nonzero(tables.rows.forked[rows])
        writers = _writers(tables, pool, rows, lengths, forked)
    num_needed = num_groups * (whole_sum(end_new - first_new) + writers.size)
    num_free = pool.num_free
    left = _left(tables, rows, lengths) if tables.groups.has_window else []
    if left:
        blocks = np.concatenate([tables.lists.entries[places] for _, _, places in left])
        num_free += pool.num_freed_by(blocks)
    return Growth(
        rows, lengths, grown, opening, first_new, end_new, writers, left, num_needed, num_free
    )


def _writers(
    tables: SequenceTables,
    pool: BlockPool,
    rows: NDArray[np.int64],
    lengths: NDArray[np.int64],
    forked: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Places in the batch of those whose last block is partly filled and shared.

    If all owners of a block write in the same call, the first of them keeps it. Forks share in
    all layer groups alike, so the first group speaks for all.
    """
    size = tables.groups.block_size
    writers = forked[lengths[forked] % size > 0]
    columns = lengths[writers] // size
    last = tables.lists.entries[tables.at(rows[writers], 0, columns)]
    shared = pool.ref_counts(last) > 1
    writers, last = writers[shared], last[shared]
    if writers.size == 0:
        return writers
    blocks, first, num_writers = np.unique(last, return_index=True, return_counts=True)
    return np.delete(writers, first[num_writers == pool.ref_counts(blocks)])


def _left(
    tables: SequenceTables, rows: NDArray[np.int64], lengths: NDArray[np.int64]
) -> list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """Blocks that lie before the window of the first new token, by layer group."""
    left = []
    for group, window in enumerate(tables.groups.windows):
        if window is None:
            continue
        lists = tables.lists_of(rows, group)
        first = tables.groups.first_seen(group, lengths)
        moved = nonzero(first > tables.lists.first[lists])
        if moved.size:
            lists, first = lists[moved], first[moved]
            places = tables.lists.addresses(lists, tables.lists.first[lists], first)
            left.append((lists, first, places))
    return left


def carry_out(
    growth: Growth, tables: SequenceTables, pool: BlockPool, copy: CopyBlocks | None
) -> BlockCopies:
    """Do what a plan says, for which there must be room; if `copy` raises, change nothing.

    Args:
        growth: the plan.
        tables: the sequences; changed.
        pool: the blocks; changed.
        copy: carries out the copies before anything else changes, or None.

    """
    lists, entries = tables.lists, tables.lists.entries
    copies = _copy_on_write(growth, tables, pool, copy)
    for moved, first, places in growth.left:
        pool.release(entries[places])
        lists.first[moved] = first
    if growth.opening.size:
        rows = growth.rows[growth.opening]
        new_lists = tables.all_lists_of(rows)
        first, ends = tables.per_list(growth.first_new), tables.per_list(growth.end_new)
        lists.extend(new_lists, first, ends)
        num_new = growth.num_needed - len(copies)
        if num_new == new_lists.size:  # one each, as in a decode step
            addresses = lists.start[new_lists] + first
        else:
            addresses = lists.addresses(new_lists, first, ends)
        lists.entries[addresses] = pool.take(num_new)
    tables.rows.num_tokens[growth.rows] = growth.grown
    if tables.rows.any_forked:
        tables.rows.forked[growth.rows] = False
        tables.rows.any_forked = bool(tables.rows.forked.any())
    return copies


def _copy_on_write(
    growth: Growth, tables: SequenceTables, pool: BlockPool, copy: CopyBlocks | None
) -> BlockCopies:
    if growth.writers.size == 0:
        return NO_COPIES
    columns = growth.lengths[growth.writers] // tables.groups.block_size
    rows = growth.rows[growth.writers]
    places = tables.lists.start[tables.all_lists_of(rows)] + tables.per_list(columns)
    copies = BlockCopies(tables.lists.entries[places], pool.take(places.size))
    if copy is not None:
        try:
            copy(copies)
        except BaseException:
            pool.put_back(copies.destinations)
            raise
    tables.lists.entries[places] = copies.destinations
    tables.rows.renew(rows)
    pool.release(copies.sources)
    return copies
