"""The rows that live sequences occupy: ids, lengths and what is known of their tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pagedattn.block_manager.ragged import whole_numbers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike, NDArray

ROW_BITS = 20
MAX_SEQUENCES = 1 << ROW_BITS
_ROW_MASK = MAX_SEQUENCES - 1
_NOT_LIVE = np.iinfo(np.int64).min  # plus a row that is not the one it stands in: no id is so
_PER_SEQUENCE = ("num_tokens", "num_known", "group", "forked", "swapped", "chain", "tails")


class UnknownSequenceError(LookupError):
    """A sequence id is not live: it was freed, or no such id was ever handed out."""

    def __init__(self, sequence_id: int) -> None:
        super().__init__(
            f"sequence {sequence_id} is not live: it was freed, or this manager never made it"
        )
        self.sequence_id = sequence_id


class SwappedOutError(RuntimeError):
    """A sequence is in host memory; swap its group in before it is used."""

    def __init__(self, sequence_id: int) -> None:
        super().__init__(f"sequence {sequence_id} is swapped out: swap it in first")
        self.sequence_id = sequence_id


class SequenceRows:
    """Arrays with a row a live sequence; rows are reused, ids never are.

    A sequence id is `generation * 2**20 + row`: the row is found by masking, and an id whose
    row has since been given to another sequence no longer matches the id kept there, so a stale
    id is told from a live one by one comparison over the batch.

    Attributes:
        num_tokens: int64 [rows], the tokens of each row's sequence; 0 in an unused row.
        num_known: int64 [rows], how many of them are known by id; -1 if they never will be.
        group: int64 [rows], id of the sequence from which all of a group were forked.
        forked: bool [rows], whether the last block may be shared with a fork.
        any_forked: whether `forked` may be set in any row.
        media: of rows whose prompts have media in blocks that are not hashed yet, what these
            blocks' hashes include: row to logical block to bytes.
        swapped: bool [rows], whether the blocks are in the host pool.
        lineage: int64 [rows], another number whenever an entry that a block table had becomes
            another; no two sequences ever have the same. At first it is the id.
        chain: uint64 [rows, 4], digest of the last full known block, or the root.
        tails: int32 [rows, tail_size], the known tokens after it; tail_size is the block size, or
            0 without a prefix cache.

    """

    def __init__(self, tail_size: int) -> None:
        self._ids: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._next_ids = np.empty(0, dtype=np.int64)
        self._unused = np.empty(0, dtype=np.int32)
        self._scratch = np.empty(0, dtype=np.int32)
        self.num_tokens = np.empty(0, dtype=np.int64)
        self.num_known = np.empty(0, dtype=np.int64)
        self.group = np.empty(0, dtype=np.int64)
        self.forked = np.empty(0, dtype=bool)
        self.swapped = np.empty(0, dtype=bool)
        self.lineage = np.empty(0, dtype=np.int64)
        self.chain = np.empty((0, 4), dtype=np.uint64)
        self.tails = np.empty((0, tail_size), dtype=np.int32)
        self.num_live = 0
        self.num_swapped = 0
        self._num_renewed = 0
        self.any_forked = False
        self.media: dict[int, dict[int, bytes]] = {}
        self._grow(16)

    @property
    def capacity(self) -> int:
        """Rows, live or not."""
        return self._ids.size

    def live_rows(self) -> NDArray[np.int64]:
        """Rows of the live sequences; int64 [num_live]."""
        return np.flatnonzero(self._ids >= 0)

    def rows_of(self, sequence_ids: ArrayLike) -> NDArray[np.int64]:
        """Rows of distinct live sequences; int64 [num_sequences].

        Raises:
            UnknownSequenceError: an id is not live.
            ValueError: an id is given twice, or something is not a whole number.

        """
        rows, ids = self._known_rows(sequence_ids)
        if (rows[1:] > rows[:-1]).all():
            return rows
        places = np.arange(rows.size, dtype=np.int32)
        self._scratch[rows] = places
        first = self._scratch[rows] == places
        if not first.all():
            raise ValueError(f"sequence {int(ids[np.argmin(first)])} is given twice in one call")
        return rows

    def resident_rows_of(self, sequence_ids: ArrayLike) -> NDArray[np.int64]:
        """`rows_of`, and none of them swapped out: else `SwappedOutError`."""
        rows = self.rows_of(sequence_ids)
        self._require_resident(rows)
        return rows

    def parents_of(self, sequence_ids: ArrayLike) -> NDArray[np.int64]:
        """Rows of live sequences that are not swapped out; ids may repeat."""
        rows, _ = self._known_rows(sequence_ids)
        self._require_resident(rows)
        return rows

    def _known_rows(self, sequence_ids: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        ids = whole_numbers(sequence_ids, "sequence ids")
        rows = ids & _ROW_MASK
        # a row that does not exist is clipped to the last, whose sequence has another id
        live = self._ids.take(rows, mode="clip") == ids
        if not live.all():
            raise UnknownSequenceError(int(ids[np.argmin(live)]))
        return rows, ids

    def _require_resident(self, rows: NDArray[np.int64]) -> None:
        if self.num_swapped:
            swapped = self.swapped[rows]
            if swapped.any():
                raise SwappedOutError(int(self._ids[rows[np.argmax(swapped)]]))

    def group_rows(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of all members of the groups that `rows` belong to, in order of rows."""
        live = self.live_rows()
        return live[np.isin(self.group[live], self.group[rows])]

    def num_missing(self, num_new: int) -> int:
        """How many rows must be added for `num_new` more sequences, doubling the capacity."""
        wanted = self.capacity
        while wanted < self.num_live + num_new:
            wanted *= 2
        if wanted > MAX_SEQUENCES:
            raise ValueError(
                f"{self.num_live} sequences are live and {num_new} more were asked for; "
                f"a manager holds {MAX_SEQUENCES}"
            )
        return wanted - self.capacity

    def _grow(self, count: int) -> None:
        fresh = np.arange(self.capacity, self.capacity + count)
        self._unused = np.concatenate([fresh[::-1].astype(np.int32), self._unused])
        self._ids = np.concatenate([self._ids, _NOT_LIVE + (fresh ^ 1)])
        self._next_ids = np.concatenate([self._next_ids, fresh])
        for name in ("_scratch", "lineage", *_PER_SEQUENCE):
            old = getattr(self, name)
            more = np.zeros((count, *old.shape[1:]), dtype=old.dtype)
            setattr(self, name, np.concatenate([old, more]))

    def grow(self, count: int) -> None:
        """Add `count` unused rows."""
        if count:
            self._grow(count)

    def add(self, count: int) -> NDArray[np.int64]:
        """Open `count` rows, for which there must be room; returns the rows, int64 [count]."""
        top = self.capacity - self.num_live
        rows = self._unused[top - count : top][::-1].astype(np.int64)
        ids = self._next_ids[rows]
        self._ids[rows] = self.group[rows] = self.lineage[rows] = ids
        self._next_ids[rows] = ids + MAX_SEQUENCES
        self.num_known[rows] = -1
        self.forked[rows] = False
        self.num_live += count
        return rows

    def ids(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Ids of the sequences in `rows`; int64 [num_sequences]."""
        return self._ids[rows]

    def remove(self, rows: NDArray[np.int64]) -> None:
        """Close `rows`; their block tables must have been cleared."""
        top = self.capacity - self.num_live
        self._ids[rows] = _NOT_LIVE + (rows ^ 1)
        self.num_tokens[rows] = 0
        if self.num_swapped:
            self.num_swapped -= int(np.count_nonzero(self.swapped[rows]))
            self.swapped[rows] = False
        for row in rows.tolist() if self.media else ():
            self.media.pop(row, None)
        self._unused[top : top + rows.size] = rows[::-1]
        self.num_live -= rows.size

    def take_media(self, row: int, stop: int) -> dict[int, bytes]:
        """Remove and return what the hashes of the logical blocks before `stop` include."""
        waiting = self.media.get(row, {})
        taken = {column: waiting.pop(column) for column in sorted(waiting) if column < stop}
        if not waiting:
            self.media.pop(row, None)
        return taken

    def set_swapped(self, rows: NDArray[np.int64], *, swapped: bool) -> None:
        """Note where the blocks of `rows` are, which must all have been elsewhere."""
        self.renew(rows)
        self.swapped[rows] = swapped
        self.num_swapped += rows.size if swapped else -rows.size

    def renew(self, rows: NDArray[np.int64]) -> None:
        """Note that entries which the block tables of `rows` had are others now."""
        self._num_renewed += rows.size
        # below 0, where no id is
        self.lineage[rows] = np.arange(rows.size) - self._num_renewed

    def state(self) -> dict[str, NDArray[Any]]:
        """Copies of what `restore` needs; the arrays of live rows are in order of rows."""
        live = self.live_rows()
        arrays = {name: getattr(self, name)[live] for name in _PER_SEQUENCE}
        return arrays | {
            "ids": self._ids[live],
            "next_ids": self._next_ids.copy(),
            "unused": self._unused[: self.capacity - self.num_live].copy(),
        }

    def restore(self, state: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        """Make these rows, which are as new, what `state` says; the live rows."""
        self.grow(state["next_ids"].size - self.capacity)
        rows = state["ids"] & _ROW_MASK
        for name in _PER_SEQUENCE:
            if state[name].shape != (rows.size, *getattr(self, name).shape[1:]):
                raise ValueError(f"{name} is not given for each of {rows.size} sequences")
        self._ids[rows] = self.lineage[rows] = state["ids"]
        self._next_ids[:] = state["next_ids"]
        self._unused[: state["unused"].size] = state["unused"]
        for name in _PER_SEQUENCE:
            getattr(self, name)[rows] = state[name]
        self.num_live = rows.size
        self.any_forked = bool(self.forked.any())
        self.num_swapped = int(np.count_nonzero(self.swapped))
        return rows

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless live and unused rows partition the table."""
        live = self.live_rows()
        unused = self._unused[: self.capacity - self.num_live]
        both = np.sort(np.concatenate([live, unused]))
        assert np.array_equal(both, np.arange(self.capacity)), "rows are lost or used twice"
        assert (self._ids[live] & _ROW_MASK == live).all(), "an id does not name its row"
        assert (self._next_ids & _ROW_MASK == np.arange(self.capacity)).all(), "ids change rows"
        assert (self._next_ids[live] > self._ids[live]).all(), "an id would be used again"
        assert np.unique(self.lineage[live]).size == live.size, "two sequences have one lineage"
        assert (self.num_tokens[live] > 0).all(), "a live sequence is empty"
        assert (self.num_known[live] <= self.num_tokens[live]).all(), "more is known than is there"
        assert not self.num_tokens[unused].any(), "an unused row has tokens"
        assert not self.swapped[unused].any(), "an unused row is swapped out"
        assert self.num_swapped == np.count_nonzero(self.swapped), "swapped rows are miscounted"
