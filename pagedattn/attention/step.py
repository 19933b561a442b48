"""A step's numbers on the host, before they are brought to a batch's tensors."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from pagedattn.page_table import PageTable


@dataclass(frozen=True)
class Step:
    """A step's page table and what follows from it, on the host.

    Attributes:
        page_table: counts the query tokens.
        query_lengths: int64 [num_sequences], not the caller's array.
        query_starts: int64 [num_sequences + 1].
        slots: int64 [num_query_tokens].
        max_query_length: the longest sequence's query tokens.
        max_kv_length: the longest sequence's tokens.

    """

    page_table: PageTable
    query_lengths: NDArray[np.int64]
    query_starts: NDArray[np.int64]
    slots: NDArray[np.int64]
    max_query_length: int
    max_kv_length: int

    @classmethod
    def of(cls, page_table: PageTable, query_lengths: ArrayLike) -> Step:
        """Work it out; ValueError where a query length is none, or a length is not the table's."""
        longest = _longest(page_table)
        slots = page_table.slots(query_lengths)
        size = page_table.num_sequences
        if type(query_lengths) is int:
            lengths, starts = _even(size, query_lengths)
            return cls(page_table, lengths, starts, slots, query_lengths if size else 0, longest)
        lengths = np.empty(size, np.int64)
        lengths[:] = query_lengths
        starts = np.zeros(size + 1, np.int64)
        np.cumsum(lengths, out=starts[1:])
        return cls(page_table, lengths, starts, slots, int(lengths.max(initial=0)), longest)


def _longest(page_table: PageTable) -> int:
    """Return the longest sequence's tokens; raise ValueError unless tables have room for them."""
    tables, lengths = page_table.block_tables, page_table.num_tokens
    if page_table.lineage is not None:  # a block manager's
        return int(lengths.max(initial=0))
    if page_table.block_size < 1:
        raise ValueError(f"block_size is {page_table.block_size}; a block has at least 1 token")
    if tables.ndim != 2 or lengths.shape != tables.shape[:1]:
        raise ValueError(
            f"block_tables has shape {tables.shape} and num_tokens {lengths.shape}; they must be "
            "[num_sequences, max_blocks] and [num_sequences]"
        )
    longest = int(lengths.max(initial=0))
    if lengths.min(initial=0) < 0:
        raise ValueError(f"a sequence has {lengths.min()} tokens; it must have at least 0")
    room = tables.shape[1] * page_table.block_size
    if longest > room:
        raise ValueError(
            f"a sequence has {longest} tokens; a block table of {tables.shape[1]} blocks of "
            f"{page_table.block_size} has room for {room}"
        )
    return longest


@functools.lru_cache(maxsize=64)
def _even(size: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Query lengths and starts where all sequences have as many; they cannot be written."""
    lengths, starts = np.full(size, length), np.arange(size + 1) * length
    lengths.flags.writeable = starts.flags.writeable = False
    return lengths, starts
