"""The block manager: sequences grow, fork and end; blocks are shared until written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pagedattn.block_manager.block_pool import BlockPool
from pagedattn.block_manager.sequence_rows import SequenceRows, ragged_columns, whole_numbers

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class BlockCopies:
    """Blocks whose contents must be copied before the next token is written.

    Attributes:
        sources: int32 [num_copies], blocks to read. May repeat.
        destinations: int32 [num_copies], blocks to write. Distinct, and never a source.

    """

    sources: NDArray[np.int32]
    destinations: NDArray[np.int32]

    def __len__(self) -> int:
        """Blocks to copy."""
        return int(self.sources.size)


class BlockManager:
    """Maps the tokens of many sequences to blocks of one pool (SOSP '23, §4.2 and §4.3).

    A sequence of n tokens holds `ceil(n / block_size)` blocks, so its waste is less than one
    block. Forks share all blocks; a shared block is copied when one of its owners is about to
    write into it (copy on write). Every operation takes a batch, and one that raises has changed
    nothing.

    Args:
        num_blocks: blocks in the pool.
        block_size: tokens a block.

    Example:
        >>> manager = BlockManager(num_blocks=8, block_size=4)
        >>> (sequence,) = manager.allocate([7])
        >>> manager.num_free_blocks
        6
        >>> copies = manager.append([sequence])  # the eighth token fits the second block
        >>> manager.num_free_blocks, len(copies)
        (6, 0)

    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}; it must be at least 1 token")
        self.block_size = block_size
        self._pool = BlockPool(num_blocks)
        self._sequences = SequenceRows()

    # -- what is there ---------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool, free or not."""
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence refers to."""
        return self._pool.num_free

    @property
    def num_sequences(self) -> int:
        """Live sequences."""
        return self._sequences.num_live

    def sequence_ids(self) -> NDArray[np.int64]:
        """Ids of all live sequences; int64 [num_sequences]."""
        return self._sequences.live_ids()

    def num_tokens(self, sequence_ids: ArrayLike) -> NDArray[np.int64]:
        """Tokens of each sequence; int64 [num_sequences]."""
        return self._sequences.num_tokens[self._sequences.rows_of(sequence_ids)]

    def ref_counts(self, block_ids: ArrayLike) -> NDArray[np.int32]:
        """How many block tables refer to each block; int32, in the shape of `block_ids`."""
        return self._pool.ref_counts(np.asarray(block_ids, dtype=np.int32))

    def block_tables(self, sequence_ids: ArrayLike) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Block tables of a batch, padded, and the sequences' lengths.

        Returns:
            block_tables: int32 [num_sequences, max_blocks], physical ids in logical order, 0
                past a sequence's last block; max_blocks is the longest sequence's.
            num_tokens: int64 [num_sequences].

        """
        rows = self._sequences.rows_of(sequence_ids)
        num_tokens = self._sequences.num_tokens[rows]
        max_blocks = -(-int(num_tokens.max(initial=0)) // self.block_size)
        return self._sequences.block_tables[rows, :max_blocks], num_tokens

    def can_allocate(self, num_tokens: ArrayLike) -> bool:
        """Whether `allocate` would find the blocks for prompts of these lengths."""
        lengths = self._lengths(num_tokens)
        return int(self._blocks_for(lengths).sum()) <= self.num_free_blocks

    # -- what changes ----------------------------------------------------------------------

    def allocate(self, num_tokens: ArrayLike) -> NDArray[np.int64]:
        """Make a sequence for each prompt length, all or none.

        Args:
            num_tokens: a length or a flat list of them, each at least 1.

        Returns:
            int64 [num_sequences], the new sequences' ids. An id is never used again.

        Raises:
            OutOfBlocksError: the pool has too few free blocks.
            ValueError: a length is not a whole number of at least 1.

        """
        lengths = self._lengths(num_tokens)
        blocks_each = self._blocks_for(lengths)
        total = int(blocks_each.sum())
        self._pool.require(total)
        self._sequences.reserve(lengths.size, int(blocks_each.max(initial=0)))
        rows = self._sequences.add(lengths.size)
        places, columns = ragged_columns(blocks_each)
        self._sequences.block_tables[rows[places], columns] = self._pool.take(total)
        self._sequences.num_tokens[rows] = lengths
        return self._sequences.ids(rows)

    def append(self, sequence_ids: ArrayLike, num_new_tokens: ArrayLike = 1) -> BlockCopies:
        """Make room for the next tokens of each sequence: the step of a decode batch.

        Args:
            sequence_ids: distinct live sequences.
            num_new_tokens: tokens to add, one number for all or one a sequence, at least 1.

        Returns:
            The copies to carry out before the new tokens' K and V are written: one for each
            sequence that was about to write into a block it shares, but for the last of a
            block's owners, who keeps it.

        Raises:
            OutOfBlocksError: the pool has too few free blocks.
            UnknownSequenceError: a sequence is not live.
            ValueError: a sequence is given twice, or a count is not at least 1.

        """
        sequences = self._sequences
        rows = sequences.rows_of(sequence_ids)
        if type(num_new_tokens) is int and num_new_tokens == 1:  # True is no count
            counts = np.int64(1)
        else:
            counts = self._lengths(num_new_tokens)
            if counts.size not in (1, rows.size):
                raise ValueError(f"{counts.size} token counts were given for {rows.size} sequences")
        lengths = sequences.num_tokens[rows]
        blocks_before, offsets = np.divmod(lengths, self.block_size)
        partly_filled = offsets > 0
        blocks_before += partly_filled
        grown = lengths + counts
        new_blocks = self._blocks_for(grown) - blocks_before

        last_columns = blocks_before - 1
        last_blocks = sequences.block_tables[rows, last_columns]
        shared = partly_filled & (self._pool.ref_counts(last_blocks) > 1)
        writers = self._copying_writers(last_blocks, np.flatnonzero(shared))

        num_new = int(new_blocks.sum())
        self._pool.require(writers.size + num_new)
        if num_new:
            sequences.reserve(0, int((blocks_before + new_blocks).max()))
        sources = last_blocks[writers]
        destinations = self._pool.take(writers.size)
        if writers.size:
            sequences.block_tables[rows[writers], last_columns[writers]] = destinations
            self._pool.release(sources)
        if num_new:
            places, columns = ragged_columns(new_blocks)
            columns += blocks_before[places]
            sequences.block_tables[rows[places], columns] = self._pool.take(num_new)
        sequences.num_tokens[rows] = grown
        return BlockCopies(sources, destinations)

    def fork(self, sequence_id: int, num_forks: int = 1) -> NDArray[np.int64]:
        """Make `num_forks` sequences that share all blocks of one (SOSP '23, §4.4).

        Returns:
            int64 [num_forks], the ids of the forks. No block is copied until one diverges.

        Raises:
            UnknownSequenceError: the sequence is not live.
            ValueError: `num_forks` is less than 1.

        """
        if num_forks < 1:
            raise ValueError(f"num_forks is {num_forks}; it must be at least 1")
        row = int(self._sequences.rows_of([sequence_id])[0])
        num_tokens = self._sequences.num_tokens[row]
        num_blocks = int(self._blocks_for(num_tokens))
        self._sequences.reserve(num_forks, num_blocks)
        rows = self._sequences.add(num_forks)
        table = self._sequences.block_tables[row, :num_blocks]
        self._sequences.block_tables[rows, :num_blocks] = table
        self._sequences.num_tokens[rows] = num_tokens
        self._pool.retain(table, num_forks)
        return self._sequences.ids(rows)

    def free(self, sequence_ids: ArrayLike) -> None:
        """End sequences; a block goes back to the pool with its last owner.

        Raises:
            UnknownSequenceError: a sequence is not live, for one because it was freed before.
            ValueError: a sequence is given twice.

        """
        rows = self._sequences.rows_of(sequence_ids)
        places, columns = ragged_columns(self._blocks_for(self._sequences.num_tokens[rows]))
        entries = (rows[places], columns)
        self._pool.release(self._sequences.block_tables[entries])
        self._sequences.block_tables[entries] = 0
        self._sequences.remove(rows)

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless counts, tables and the pool agree.

        Each block's reference count is the number of block-table entries that name it, and a
        block is free exactly if nothing names it. Cost: linear in the pool and the tables.
        """
        self._pool.check_integrity()
        self._sequences.check_integrity()
        tables = self._sequences.block_tables
        used = np.arange(tables.shape[1]) < self._blocks_for(self._sequences.num_tokens)[:, None]
        references = np.bincount(tables[used], minlength=self.num_blocks)
        assert not tables[~used].any(), "an entry past a sequence's end is not 0"
        counts = self._pool.ref_counts(np.arange(self.num_blocks, dtype=np.int32))
        assert np.array_equal(references, counts), "reference counts differ from the tables"

    # -- helpers ---------------------------------------------------------------------------

    def _blocks_for(self, num_tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        return -(-num_tokens // self.block_size)

    @staticmethod
    def _lengths(num_tokens: ArrayLike) -> NDArray[np.int64]:
        lengths = whole_numbers(num_tokens, "token counts")
        if lengths.size and lengths.min() < 1:
            raise ValueError(f"a token count is {lengths.min()}; each must be at least 1")
        return lengths

    def _copying_writers(
        self, last_blocks: NDArray[np.int32], writers: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Those of `writers` (places in the batch) that need a copy of their last block.

        If all owners of a block write in the same call, the first of them keeps it.
        """
        if writers.size == 0:
            return writers
        blocks, first, num_writers = np.unique(
            last_blocks[writers], return_index=True, return_counts=True
        )
        keeps = first[num_writers == self._pool.ref_counts(blocks)]
        return np.delete(writers, keeps)
