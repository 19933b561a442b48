"""Where the tensors of a batch lie, and how a step's numbers come there: one copy, mostly."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from pagedattn.block_manager.ragged import nonzero, ragged

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pagedattn.attention.step import Step
    from pagedattn.block_manager import Lineage
    from pagedattn.page_table import PageTable

NUM_ARRIVALS = 4096
"""Counters of a batch: 8 a program of the decode kernel, two programs a multiprocessor; tickets."""
NUM_TICKETS = 2
"""The last counters, by which the prefill kernel draws its work."""
ROOM = 1024
"""Entries of block tables that a step can change besides one of each row."""
ALIGNED = 32  # int32: 128 bytes


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
    def of(cls, num_sequences: int, num_query_tokens: int, num_arrivals: int, room: int) -> _Layout:
        """Lay out a batch."""
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


@dataclass(frozen=True)
class _NewEntries:
    """Entries of block tables that are not on the device yet.

    Attributes:
        rows: int64 [num_entries], sequences.
        columns: int64 [num_entries], logical blocks.
        values: int32 [num_entries], physical blocks.

    """

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    values: NDArray[np.int32]


_NO_ENTRIES = _NewEntries(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int32))


@dataclass(frozen=True)
class Skipped:
    """What of each sequence a plan reads in parts, and not through own lengths and tables.

    Attributes:
        tokens: int32 [num_sequences].
        rows: int64 [2, num_sequences], where a block table that is followed by such own tables has
            each sequence's logical block 0, and where the own tables would have it, in entries.

    Worked example: tables of two sequences and three blocks are six entries, which six of own
    tables follow. Of the second sequence a block is skipped: `rows` is [[0, 3], [6, 8]]. Its
    logical block 2 is entry 3 + 2 of all, and 8 + 2, in place 1 of its own table.

    """

    tokens: NDArray[np.int32]
    rows: NDArray[np.int64]

    @classmethod
    def of(cls, blocks: NDArray[np.int64], block_size: int, width: int) -> Skipped:
        """Make it of blocks of each sequence, int64 [num_sequences], in tables so many wide."""
        rows = _rows_of(2 * blocks.size, width).reshape(2, -1)
        rows[1] -= blocks
        return cls((blocks * block_size).astype(np.int32), rows)


def _rows_of(count: int, width: int) -> NDArray[np.int64]:
    return np.arange(count) * width


class OwnSent(Enum):
    """What of a plan's own lengths and tables came to the device with a step's numbers."""

    NOTHING = 0
    LENGTHS = 1
    LENGTHS_AND_TABLES = 2


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
    their places. What a plan keeps of each sequence's own goes the same way.

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
        has_own: whether there is room for a plan's own tables, behind the block tables.

    """

    def __init__(
        self,
        num_sequences: int,
        num_query_tokens: int,
        width: int,
        device: torch.device,
        *,
        has_own: bool,
    ) -> None:
        self._is_cuda = device.type == "cuda"
        num_arrivals = NUM_ARRIVALS if self._is_cuda else 0
        num_tables = 2 if has_own else 1
        self._room = room = num_tables * num_sequences + ROOM
        self._layout = layout = _Layout.of(num_sequences, num_query_tokens, num_arrivals, room)
        self._packed = torch.empty(layout.size, dtype=torch.int32, device=device)
        self.kv_lengths = self._packed[layout.lengths]
        self.query_starts = self._packed[layout.starts]
        self.slots = self._packed[layout.slots].view(torch.int64)
        self.arrivals = self._packed[layout.arrivals] if self._is_cuda else None
        self._begins: dict[int, torch.Tensor] = {}
        self._zeros: dict[int, torch.Tensor] = {}
        self._tables = torch.empty(
            (num_tables, num_sequences, width), dtype=torch.int32, device=device
        )
        self.block_tables = self._tables[0]
        self._is_written, self._own_are_free = False, has_own
        self.num_changes = 0
        self._held: _Held | None = None

    @cached_property
    def _rows(self) -> NDArray[np.int64]:
        """Where block tables have each sequence's; int64 [1, num_sequences]."""
        return _rows_of(self.block_tables.shape[0], self.block_tables.shape[1]).reshape(1, -1)

    @cached_property
    def _entries(self) -> torch.Tensor:
        return self._tables.view(-1)

    @cached_property
    def _of_new_entries(self) -> tuple[torch.Tensor, torch.Tensor]:
        places, values = self._layout.places, self._layout.values
        return self._packed[places].view(torch.int64), self._packed[values]

    def take_own(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Hand out, once, what `write` fills too; then None.

        Returns:
            int32 [num_sequences], own lengths, and int32 [num_sequences, width], own tables.

        """
        if not self._own_are_free:
            return None
        self._own_are_free = False
        return self._packed[self._layout.own_lengths], self._tables[1]

    def zeros(self, count: int) -> torch.Tensor:
        """Return float32 [count] zeros, for kernels that leave zeros.

        Launches of one batch run one after the other, so all that ask for as many get the same.
        While a graph is captured new ones are made, unless there are some: they are zeros only
        once the graph is replayed.
        """
        found = self._zeros.get(count)
        if found is None:
            found = torch.zeros(count, dtype=torch.float32, device=self._packed.device)
            if not (self._is_cuda and torch.cuda.is_current_stream_capturing()):
                self._zeros[count] = found
        return found

    def _begin(self, end: int) -> torch.Tensor:
        """Return `_packed[:end]`, kept, as there are but three and a step needs one."""
        if end not in self._begins:
            self._begins[end] = self._packed[:end]
        return self._begins[end]

    def goes_on_in(self, page_table: PageTable) -> bool:
        """Whether a page table's lineage tells that all it has in common with this is here."""
        return self._held is not None and self._held.lineage.goes_on_in(page_table.lineage)

    def write(
        self, step: Step, *, goes_on: bool = False, skipped: Skipped | None = None
    ) -> OwnSent:
        """Bring a step's numbers to the device, in place.

        Args:
            step: of as many sequences and query tokens, within the width.
            goes_on: what `goes_on_in` says of its page table.
            skipped: of the plan that took what `take_own` gives, whose own tables are what block
                tables were until now, and in each sequence of those as many blocks at least. With
                None own lengths are anything afterwards, and own tables what they were.

        Returns:
            What of the plan's own is that of the step now.

        """
        table, layout = step.page_table, self._layout
        held, self._held = self._held, None  # nothing is known if it fails on the way
        num_blocks = table.num_blocks()
        new = None if held is None else self._new_entries(held, table, num_blocks, goes_on=goes_on)
        has_new = new is not None and new.rows.size > 0
        end = (layout.values if has_new else layout.own_lengths).stop
        end = end if self._is_written else layout.arrivals.stop
        target = self._begin(end)
        staged = staged_for(target)
        host = staged.numpy()
        host[layout.lengths] = table.num_tokens
        host[layout.starts] = step.query_starts
        host[layout.slots].view(np.int64)[:] = step.slots
        if skipped is not None:
            np.subtract(host[layout.lengths], skipped.tokens, out=host[layout.own_lengths])
        if not self._is_written:
            host[layout.arrivals] = 0
        if new is not None and has_new:
            places, values = host[layout.places].view(np.int64), host[layout.values]
            self._place(new, skipped if goes_on else None, places, values)
        send(staged, target)
        if new is None:
            self._write_tables(table.block_tables)
        elif has_new:
            self._entries.scatter_(0, *self._of_new_entries)
        if table.lineage is not None:
            if held is not None and goes_on and new is not None:
                # entries of a sequence that is shorter than it was are there still
                num_blocks = np.maximum(num_blocks, held.num_blocks) if has_new else held.num_blocks
            self._held = _Held(table.lineage, num_blocks)
        self._is_written = True
        self.num_changes += new is None or has_new
        if skipped is None:
            return OwnSent.NOTHING
        return OwnSent.LENGTHS_AND_TABLES if goes_on and new is not None else OwnSent.LENGTHS

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
        self, held: _Held, table: PageTable, num_blocks: NDArray[np.int64], *, goes_on: bool
    ) -> _NewEntries | None:
        """Find entries that are not on the device yet; None for all."""
        first = held.num_blocks
        if not goes_on:
            if table.lineage is None or not held.lineage.is_source_of(table.lineage):
                return None
            first = np.where(held.lineage.numbers == table.lineage.numbers, first, 0)
        rows = nonzero(num_blocks > first)
        if rows.size == 0:
            return _NO_ENTRIES
        columns, ends = first[rows], num_blocks[rows]
        total = int((ends - columns).sum())
        if total * len(self._tables) > self._room:
            return None
        if total > rows.size:
            of_each, columns = ragged(columns, ends)
            rows = rows[of_each]
        return _NewEntries(rows, columns, table.block_tables[rows, columns])

    def _place(
        self,
        new: _NewEntries,
        skipped: Skipped | None,
        places: NDArray[np.int64],
        values: NDArray[np.int32],
    ) -> None:
        """Write where in `_entries` new ones go, own tables among them if something is skipped.

        Args:
            new: one at least.
            skipped: see `write`.
            places: int64 [room], changed.
            values: int32 [room], changed.

        """
        rows = self._rows if skipped is None else skipped.rows
        tables, count = rows.shape[0], rows.shape[0] * new.rows.size
        of_tables = places[:count].reshape(tables, -1)
        np.add(rows.take(new.rows, axis=1), new.columns, out=of_tables)
        values[:count].reshape(tables, -1)[:] = new.values
        # the room that is left says once more what the first says
        places[count:], values[count:] = places[0], values[0]

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
