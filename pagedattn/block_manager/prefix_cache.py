"""Prefix caching: full blocks become findable, by what they and their prefix hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pagedattn.block_manager.prefix_hash import PrefixHasher, digest_bytes
from pagedattn.block_manager.prefix_index import PrefixIndex
from pagedattn.block_manager.ragged import distinct, nonzero, ragged, ragged_numbers

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from pagedattn.block_manager.block_pool import BlockPool
    from pagedattn.block_manager.sequence_tables import SequenceTables


class PrefixCache:
    """Hashes tokens as they become known, and registers the blocks they fill.

    Args:
        index: digest to block; the pool evicts from it.
        hasher: how digests are made.

    """

    def __init__(self, num_blocks: int, block_size: int, seed: bytes | None) -> None:
        self.index = PrefixIndex(num_blocks)
        self.hasher = PrefixHasher(block_size, seed)
        self.num_lookup_tokens = 0
        self.num_hit_tokens = 0

    def register(
        self,
        pool: BlockPool,
        blocks: NDArray[np.int32],
        digests: NDArray[np.uint64],
        *,
        new: bool = False,
    ) -> NDArray[np.int32]:
        """Make full blocks findable; of several that hold the same, one.

        A block that is in use stays the one that is found. One that is free gives way to the
        block that is in use, and becomes empty.

        Args:
            pool: the blocks' pool.
            blocks: int32 [num_blocks], distinct and referenced.
            digests: uint64 [num_blocks, 4].
            new: whether the digests are known to be distinct, and of none that is in the index.

        Returns:
            int32, those that became findable.

        """
        if new:
            self.index.insert(blocks, digests)
            return blocks
        held = self.index.enter(blocks, digests)
        if (held < 0).all():
            return blocks
        idle = nonzero((held >= 0) & (pool.ref_counts(held) == 0))
        if idle.size:
            pool.forget(distinct(held[idle]))
            held[idle] = self.index.enter(blocks[idle], digests[idle])
        return blocks[held < 0]

    def record(
        self,
        tables: SequenceTables,
        pool: BlockPool,
        rows: NDArray[np.int64],
        tokens: NDArray[np.int32],
        counts: NDArray[np.int64] | np.int64,
        written: Callable[[NDArray[np.int32]], None],
    ) -> None:
        """Take in the next token ids of sequences and register the blocks they complete.

        Args:
            tables: the sequences; `num_known`, `tails` and `chain` change.
            pool: the blocks' pool.
            rows: int64 [num_sequences].
            tokens: int32 [sum of counts], sequence after sequence.
            counts: int64 [num_sequences], or one for all, at least 1.
            written: told of the blocks that became findable.

        """
        state, size = tables.rows, tables.groups.block_size
        known = state.num_known[rows]
        offsets = known % size
        state.num_known[rows] = known + counts
        with_media = [row for row in rows.tolist() if row in state.media] if state.media else ()
        if counts.size == 1 and counts == 1 and not with_media:
            state.tails[rows, offsets] = tokens
            full = nonzero(offsets == size - 1)
            if full.size == 0:
                return
            rows, columns = rows[full], known[full] // size
            parents = digest_bytes(state.chain.take(rows, axis=0))
            digests = self.hasher.extend(state.tails.take(rows, axis=0), parents)
            state.chain[rows] = digests
        else:
            # what was known of each last block, then what is new
            totals = offsets + counts
            starts = np.cumsum(totals) - totals
            joined = np.empty(int(totals.sum()), np.int32)
            places, columns = ragged(np.zeros_like(offsets), offsets)
            joined[starts[places] + columns] = state.tails[rows[places], columns]
            joined[ragged_numbers(offsets, totals, starts)] = tokens
            num_full = totals // size
            places, columns = ragged(num_full * size, totals)
            state.tails[rows[places], columns % size] = joined[starts[places] + columns]
            grew = nonzero(num_full)
            if grew.size == 0:
                return
            rows, known, num_full = rows[grew], known[grew], num_full[grew]
            parents = digest_bytes(state.chain[rows])
            first = known // size
            media = {
                number: {column - int(first[number]): added for column, added in hashed.items()}
                for number, row in enumerate(rows.tolist() if with_media else ())
                if (hashed := state.take_media(row, int(first[number] + num_full[number])))
            }
            digests = self.hasher.chain(joined, starts[grew], num_full, parents, media)
            state.chain[rows] = digests[np.cumsum(num_full) - 1]
            places, columns = ragged(first, first + num_full)
            rows = rows[places]
        for group in range(tables.groups.count):
            blocks = tables.lists.entries[tables.at(rows, group, columns)]
            keys = tables.groups.keys(digests, group)
            if tables.groups.windows[group] is not None:
                kept = columns >= tables.lists.first[tables.lists_of(rows, group)]
                blocks, keys = blocks[kept], keys[kept]
            if pool.any_shared:  # forks may be told of one after the other
                fresh = ~self.index.hashed[blocks]
                blocks, keys = blocks[fresh], keys[fresh]
            written(self.register(pool, blocks, keys))
