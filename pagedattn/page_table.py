"""The page table of a batch, and the slots its tokens have in the KV cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from pagedattn.block_manager.ragged import whole_numbers

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from pagedattn.block_manager import BlockManager, Lineage


@dataclass(frozen=True)
class CsrPageTable:
    """A page table without padding, in the form that FlashInfer takes.

    Worked example, block size 4, lengths 7 and 4, blocks (5, 2) and (9): indptr [0, 2, 3],
    indices [5, 2, 9], last_block_len [3, 4].

    Attributes:
        indptr: int32 [num_sequences + 1]; sequence i has `indices[indptr[i] : indptr[i + 1]]`.
        indices: int32 [num_entries], physical block ids in logical order.
        last_block_len: int32 [num_sequences], tokens in the last block, 1 to block_size.

    """

    indptr: NDArray[np.int32]
    indices: NDArray[np.int32]
    last_block_len: NDArray[np.int32]


@dataclass(frozen=True)
class PageTable:
    """The block tables of a batch, padded to the longest.

    Worked example, block size 4: a sequence of 7 tokens in blocks (5, 2) has the row [5, 2];
    its token 6 is in logical block 6 // 4 = 1 at offset 6 % 4 = 2, which is physical block 2,
    slot 2 * 4 + 2 = 10.

    Attributes:
        block_size: tokens a block.
        block_tables: int32 [num_sequences, max_blocks]; entries past a sequence's last block
            mean nothing, but are ids of blocks in the pool.
        num_tokens: int64 [num_sequences], the lengths.
        lineage: tells a later step what has changed. Set by `of`, whose arrays cannot be written;
            None for other tables, `dataclasses.replace` of such a one among them.

    """

    block_size: int
    block_tables: NDArray[np.int32]
    num_tokens: NDArray[np.int64]
    lineage: Lineage | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, manager: BlockManager, sequence_ids: ArrayLike, layer_group: int = 0) -> PageTable:
        """Take the page table of a batch from a block manager, as a copy that stays as it is.

        Args:
            manager: the block manager; unchanged.
            sequence_ids: distinct live sequences, in the batch's order.
            layer_group: which group of layers; one with a sliding window has entries of 0 for
                blocks that have left it.

        Raises:
            UnknownSequenceError: a sequence is not live.
            SwappedOutError: a sequence is in host memory.

        """
        block_tables, num_tokens, lineage = manager.page_table(sequence_ids, layer_group)
        block_tables.flags.writeable = num_tokens.flags.writeable = False
        made = cls(manager.block_size, block_tables, num_tokens)
        object.__setattr__(made, "lineage", lineage)
        return made

    def __reduce__(self) -> tuple[type[PageTable], tuple[object, ...]]:
        """Copy and pickle without the lineage, as arrays of a copy can be written."""
        return PageTable, (self.block_size, self.block_tables, self.num_tokens)

    @property
    def num_sequences(self) -> int:
        """Sequences in the batch."""
        return int(self.num_tokens.size)

    def num_blocks(self) -> NDArray[np.int64]:
        """Blocks of each sequence; int64 [num_sequences]."""
        return -(-self.num_tokens // self.block_size)

    def slots(self, num_last_tokens: ArrayLike = 1) -> NDArray[np.int64]:
        """Slots of the last tokens of each sequence: where a step writes their K and V.

        Args:
            num_last_tokens: how many tokens at the end of each sequence, one number for all or
                one a sequence; 1 is a decode step, the whole length is a prefill.

        Returns:
            int64 [num_slots]: `block_id * block_size + offset`, sequence after sequence, in
            token order.

        Raises:
            ValueError: a count is no whole number, is negative or more than the sequence has, or
                there is not one for each sequence.

        """
        if type(num_last_tokens) is int and num_last_tokens == 1 and self.num_tokens.all():
            return self._slots_at(np.arange(self.num_sequences), self.num_tokens - 1)
        counts = whole_numbers(num_last_tokens, "num_last_tokens")
        if counts.size not in (1, self.num_sequences):
            raise ValueError(
                f"{counts.size} counts were given as num_last_tokens of {self.num_sequences} "
                "sequences"
            )
        counts = np.broadcast_to(counts, self.num_tokens.shape)
        if ((counts < 0) | (counts > self.num_tokens)).any():
            raise ValueError(
                "num_last_tokens must be from 0 to each sequence's length; "
                f"given {counts.tolist()} for lengths {self.num_tokens.tolist()}"
            )
        ends = np.cumsum(counts)
        rows = np.repeat(np.arange(counts.size), counts)
        # the k-th slot overall is token k - ends[row] of its row, counted from the row's end
        return self._slots_at(rows, np.arange(rows.size) + (self.num_tokens - ends)[rows])

    def _slots_at(self, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        logical = positions // self.block_size
        # block * size + offset, where the offset is position - logical * size; int64
        return (self.block_tables[rows, logical] - logical) * self.block_size + positions

    def csr(self) -> CsrPageTable:
        """Return the same table without padding."""
        num_blocks = self.num_blocks()
        indptr = np.zeros(num_blocks.size + 1, dtype=np.int32)
        np.cumsum(num_blocks, out=indptr[1:])
        # entry k overall is entry k - indptr[row] of its row, in a flat view of the padded table
        row_starts = np.arange(num_blocks.size) * self.block_tables.shape[1]
        flat = np.repeat(row_starts - indptr[:-1], num_blocks) + np.arange(indptr[-1])
        last = self.num_tokens - (num_blocks - 1) * self.block_size
        return CsrPageTable(indptr, self.block_tables.reshape(-1)[flat], last.astype(np.int32))
