"""Where the tensors of a batch lie, and how a step's numbers come there: one copy, mostly."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from pagedattn.block_manager.ragged import ragged

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from pagedattn.block_manager import Lineage
    from pagedattn.page_table import PageTable

NUM_ARRIVALS = 8192
"""Counters of a batch: 16 a program of the decode kernel, two programs a multiprocessor."""
ROOM = 1024
"""Entries of block tables that a step can change besides one of each sequence."""
ALIGNED = 32  # int32: 128 bytes
_NO_ENTRIES = np.empty(0, np.int64), np.empty(0, np.int32)


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
        """Work it out; ValueError where a query length is none."""
        slots = page_table.slots(query_lengths)
        longest = int(page_table.num_tokens.max(initial=0))
        size = page_table.num_sequences
        if type(query_lengths) is int:
            lengths, starts = _even(size, query_lengths)
            return cls(page_table, lengths, starts, slots, query_lengths if size else 0, longest)
        lengths = np.empty(size, np.int64)
        lengths[:] = query_lengths
        starts = np.zeros(size + 1, np.int64)
        np.cumsum(lengths, out=starts[1:])
        return cls(page_table, lengths, starts, slots, int(lengths.max(initial=0)), longest)


@functools.lru_cache(maxsize=64)
def _even(size: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Query lengths and starts where all sequences have as many; they cannot be written."""
    lengths, starts = np.full(size, length), np.arange(size + 1) * length
    lengths.flags.writeable = starts.flags.writeable = False
    return lengths, starts


@dataclass(frozen=True)
class _Layout:
    """Where in one piece of int32 the parts lie, each at a multiple of 128 bytes.

    Attributes:
        size: of the piece.
        lengths: the parts, in their order; lengths of the sequences.
        starts: of the queries.
        slots: int64.
        own_lengths: see `BatchMemory`.
        places: int64, of entries that are new.
        values: new entries.
        arrivals: counters.

    """

    size: int
    lengths: slice
    starts: slice
    slots: slice
    own_lengths: slice
    places: slice
    values: slice
    arrivals: slice

    @classmethod
    @functools.lru_cache(maxsize=64)
    def of(cls, num_sequences: int, num_query_tokens: int, num_arrivals: int) -> _Layout:
        """Lay out a batch."""
        room = num_sequences + ROOM
        sizes = [num_sequences, num_sequences + 1, 2 * num_query_tokens, num_sequences]
        sizes += [2 * room, room, num_arrivals]
        ends = list(itertools.accumulate(size + -size % ALIGNED for size in sizes))
        begins = [0, *ends[:-1]]
        parts = [slice(begin, begin + size) for begin, size in zip(begins, sizes, strict=True)]
        return cls(ends[-1], *parts)


@dataclass(frozen=True)
class _Held:
    """What of a page table is in the block tables on the device.

    Attributes:
        lineage: of the page table.
        num_blocks: int64 [num_sequences], entries of each sequence.

    """

    lineage: Lineage
    num_blocks: NDArray[np.int64]


def staged_for(target: torch.Tensor) -> torch.Tensor:
    """Return host memory to be filled and sent to a tensor: pinned, or on a CPU the tensor itself.

    What is in it is anything. PyTorch hands pinned memory out again only when copies from it have
    been done, so it may be let go as soon as it is sent.
    """
    if target.device.type == "cpu":
        return target
    return torch.empty(target.shape, dtype=target.dtype, pin_memory=True)


def send(staged: torch.Tensor, target: torch.Tensor) -> None:
    """Copy what `staged_for` returned to its tensor, in the current stream; nothing waits."""
    if staged is not target:
        target.copy_(staged, non_blocking=True)


class BatchMemory:
    """The tensors of a batch, all but the block tables in one piece.

    A step's numbers are put in order on the host and go to the device by one copy, from pinned
    memory, so that nothing waits for the GPU. The copy and the launches are in the current stream,
    behind what reads the numbers of the step before. Block tables whose lineage is known are not
    sent as a whole: entries that are new go with the other numbers, and one launch puts them in
    their places.

    Attributes:
        block_tables: int32 [num_sequences, width].
        kv_lengths: int32 [num_sequences].
        query_starts: int32 [num_sequences + 1].
        slots: int64 [num_query_tokens].
        arrivals: int32 [NUM_ARRIVALS], zeros after the first `write`; None on a CPU.
        num_changes: how often the block tables may have changed; int.

    Args:
        num_sequences: of the batch.
        num_query_tokens: of the batch.
        width: blocks of the longest sequence there may be.
        device: where the tensors go.

    """

    def __init__(
        self, num_sequences: int, num_query_tokens: int, width: int, device: torch.device
    ) -> None:
        self._is_cuda = device.type == "cuda"
        num_arrivals = NUM_ARRIVALS if self._is_cuda else 0
        self._layout = layout = _Layout.of(num_sequences, num_query_tokens, num_arrivals)
        self._packed = torch.empty(layout.size, dtype=torch.int32, device=device)
        self.kv_lengths = self._packed[layout.lengths]
        self.query_starts = self._packed[layout.starts]
        self.slots = self._packed[layout.slots].view(torch.int64)
        self.arrivals = self._packed[layout.arrivals] if self._is_cuda else None
        self.block_tables = torch.empty((num_sequences, width), dtype=torch.int32, device=device)
        self._room = layout.values.stop - layout.values.start
        self._is_written = self._own_are_taken = False
        self.num_changes = 0
        self._held: _Held | None = None

    @cached_property
    def _entries(self) -> torch.Tensor:
        return self.block_tables.view(-1)

    @cached_property
    def _of_new_entries(self) -> tuple[torch.Tensor, torch.Tensor]:
        places, values = self._layout.places, self._layout.values
        return self._packed[places].view(torch.int64), self._packed[values]

    def take_own_lengths(self) -> torch.Tensor | None:
        """Hand out int32 [num_sequences] that `write` fills too, once; then None."""
        if self._own_are_taken:
            return None
        self._own_are_taken = True
        return self._packed[self._layout.own_lengths]

    def write(self, step: Step, own_lengths: NDArray[np.int64] | None = None) -> None:
        """Bring a step's numbers to the device, in place.

        Args:
            step: of as many sequences and query tokens, within the width.
            own_lengths: int64 [num_sequences], for what `take_own_lengths` gave; with None it holds
                anything afterwards.

        """
        table, layout = step.page_table, self._layout
        held, self._held = self._held, None  # nothing is known if it fails on the way
        num_blocks = table.num_blocks()
        new = None if held is None else self._new_entries(held, table, num_blocks)
        has_new = new is not None and new[0].size > 0
        end = (layout.values if has_new else layout.own_lengths).stop
        end = end if self._is_written else layout.arrivals.stop
        target = self._packed[:end]
        staged = staged_for(target)
        host = staged.numpy()
        host[layout.lengths] = table.num_tokens
        host[layout.starts] = step.query_starts
        host[layout.slots].view(np.int64)[:] = step.slots
        if own_lengths is not None:
            host[layout.own_lengths] = own_lengths
        if not self._is_written:
            host[layout.arrivals] = 0
        if new is not None and has_new:
            count = new[0].size
            to_places, to_values = host[layout.places].view(np.int64), host[layout.values]
            to_places[:count], to_values[:count] = new
            # what is left says once more what the first says
            to_places[count:], to_values[count:] = new[0][0], new[1][0]
        send(staged, target)
        if new is None:
            self._write_tables(table.block_tables)
        elif has_new:
            self._entries.scatter_(0, *self._of_new_entries)
        if table.lineage is not None:
            self._held = _Held(table.lineage, num_blocks)
        self._is_written = True
        self.num_changes += new is None or has_new

    def copy(self, other: BatchMemory) -> None:
        """Take over another batch's lengths, starts, slots and tables; these may be narrower."""
        held, self._held = other._held, None
        end = self._layout.slots.stop
        self._packed[:end].copy_(other._packed[:end])
        self.block_tables[:, : other.block_tables.shape[1]].copy_(other.block_tables)
        self._held = held
        self.num_changes += 1

    def forget(self) -> None:
        """Know no longer what is in the block tables, as they were written by others."""
        self._held = None
        self.num_changes += 1

    def _new_entries(
        self, held: _Held, table: PageTable, num_blocks: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int32]] | None:
        """Places of entries that are not on the device yet, and what to write; None for all."""
        if table.lineage is None or not held.lineage.is_source_of(table.lineage):
            return None
        is_same = held.lineage.numbers == table.lineage.numbers
        first = held.num_blocks if is_same.all() else np.where(is_same, held.num_blocks, 0)
        rows = (num_blocks > first).nonzero()[0]
        if rows.size == 0:
            return _NO_ENTRIES
        first, ends = first[rows], num_blocks[rows]
        counts = ends - first
        total = int(counts.sum())
        if total > self._room:
            return None
        columns = first
        if total > rows.size:
            of_each, columns = ragged(first, ends)
            rows = rows[of_each]
        return rows * self.block_tables.shape[1] + columns, table.block_tables[rows, columns]

    def _write_tables(self, tables: NDArray[np.int32]) -> None:
        """Send block tables as a whole; what is behind them is zeros, or of steps before."""
        target, width = self.block_tables, tables.shape[1]
        if not self._is_written and width < target.shape[1]:
            target.zero_()
        if tables.size == 0:
            return
        target = target[:, :width]
        staged = staged_for(target)
        staged.numpy()[:] = tables
        send(staged, target)
