"""The rows that live sequences occupy: ids, lengths and block tables as arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

ROW_BITS = 20
MAX_SEQUENCES = 1 << ROW_BITS
_ROW_MASK = MAX_SEQUENCES - 1
_NOT_LIVE = np.iinfo(np.int64).min


class UnknownSequenceError(LookupError):
    """A sequence id is not live: it was freed, or no such id was ever handed out."""

    def __init__(self, sequence_id: int) -> None:
        super().__init__(
            f"sequence {sequence_id} is not live: it was freed, or this manager never made it"
        )
        self.sequence_id = sequence_id


def whole_numbers(values: ArrayLike, what: str) -> NDArray[np.int64]:
    """Return `values` as a one-dimensional int64 array; refuse fractions and booleans."""
    array = np.asarray(values)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.ndim > 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"{what} must be a whole number or a flat list of them; "
            f"this is an array of {array.dtype} with {array.ndim} dimensions"
        )
    return array.astype(np.int64, copy=False).reshape(-1)


def ragged_columns(counts: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row numbers and column numbers of a ragged array, row after row.

    Worked example: counts [2, 0, 3] gives rows [0, 0, 2, 2, 2] and columns [0, 1, 0, 1, 2].
    """
    rows = np.repeat(np.arange(counts.size), counts)
    starts = np.cumsum(counts) - counts
    return rows, np.arange(rows.size) - starts[rows]


class SequenceRows:
    """Arrays with a row a live sequence; rows are reused, ids never are.

    A sequence id is `generation * 2**20 + row`: the row is found by masking, and an id whose
    row has since been given to another sequence no longer matches the id kept there, so a stale
    id is told from a live one by one comparison over the batch.

    Attributes:
        num_tokens: int64 [rows], the tokens of each row's sequence; 0 in an unused row.
        block_tables: int32 [rows, columns], physical ids in logical order; 0 past the end.

    """

    def __init__(self) -> None:
        self.num_tokens = np.zeros(16, dtype=np.int64)
        self.block_tables = np.zeros((16, 16), dtype=np.int32)
        self._ids: NDArray[np.int64] = np.full(16, _NOT_LIVE)
        self._next_ids = np.arange(16)
        self._unused = np.arange(15, -1, -1)
        self._num_live = 0
        self._scratch = np.zeros(16, dtype=np.int64)

    @property
    def num_live(self) -> int:
        """Sequences that are live."""
        return self._num_live

    def live_ids(self) -> NDArray[np.int64]:
        """Ids of the live sequences, in order of their rows; int64 [num_live]."""
        return self._ids[np.flatnonzero(self._ids != _NOT_LIVE)]

    def rows_of(self, sequence_ids: ArrayLike) -> NDArray[np.int64]:
        """Rows of distinct live sequences; int64 [num_sequences].

        Raises:
            UnknownSequenceError: an id is not live.
            ValueError: an id is given twice, or something is not a whole number.

        """
        ids = whole_numbers(sequence_ids, "sequence ids")
        rows = ids & _ROW_MASK
        known = rows < self._ids.size
        if not known.all():
            raise UnknownSequenceError(int(ids[np.argmin(known)]))
        live = self._ids[rows] == ids
        if not live.all():
            raise UnknownSequenceError(int(ids[np.argmin(live)]))
        places = np.arange(rows.size)
        self._scratch[rows] = places
        first = self._scratch[rows] == places
        if not first.all():
            raise ValueError(f"sequence {int(ids[np.argmin(first)])} is given twice in one call")
        return rows

    def reserve(self, num_new: int, num_columns: int) -> None:
        """Grow the arrays for `num_new` more sequences and tables of `num_columns` blocks."""
        rows = self._ids.size
        wanted_rows = rows
        while wanted_rows < self._num_live + num_new:
            wanted_rows *= 2
        columns = self.block_tables.shape[1]
        while columns < num_columns:
            columns *= 2
        if wanted_rows > MAX_SEQUENCES:
            raise ValueError(
                f"{self._num_live} sequences are live and {num_new} more were asked for; "
                f"a manager holds {MAX_SEQUENCES}"
            )
        if (wanted_rows, columns) == self.block_tables.shape:
            return
        tables = np.zeros((wanted_rows, columns), dtype=np.int32)
        tables[:rows, : self.block_tables.shape[1]] = self.block_tables
        grown = wanted_rows - rows
        if grown:
            fresh = np.arange(rows, wanted_rows)
            self.num_tokens = np.concatenate([self.num_tokens, np.zeros(grown, np.int64)])
            self._ids = np.concatenate([self._ids, np.full(grown, _NOT_LIVE)])
            self._next_ids = np.concatenate([self._next_ids, fresh])
            self._unused = np.concatenate([fresh[::-1], self._unused])
            self._scratch = np.zeros(wanted_rows, dtype=np.int64)
        self.block_tables = tables

    def add(self, count: int) -> NDArray[np.int64]:
        """Open `count` rows, for which there must be room; returns the rows, int64 [count]."""
        top = self._ids.size - self._num_live
        rows = self._unused[top - count : top][::-1].copy()
        self._ids[rows] = self._next_ids[rows]
        self._next_ids[rows] += MAX_SEQUENCES
        self._num_live += count
        return rows

    def ids(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Ids of the sequences in `rows`; int64 [num_sequences]."""
        return self._ids[rows]

    def remove(self, rows: NDArray[np.int64]) -> None:
        """Close `rows`; their block tables must have been cleared."""
        top = self._ids.size - self._num_live
        self._ids[rows] = _NOT_LIVE
        self.num_tokens[rows] = 0
        self._unused[top : top + rows.size] = rows[::-1]
        self._num_live -= rows.size

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless live and unused rows partition the table."""
        live = np.flatnonzero(self._ids != _NOT_LIVE)
        unused = self._unused[: self._ids.size - self._num_live]
        both = np.sort(np.concatenate([live, unused]))
        assert np.array_equal(both, np.arange(self._ids.size)), "rows are lost or used twice"
        assert (self._ids[live] & _ROW_MASK == live).all(), "an id does not name its row"
        assert (self.num_tokens[live] > 0).all(), "a live sequence is empty"
        assert not self.num_tokens[unused].any(), "an unused row has tokens"
