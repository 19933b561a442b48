"""The block tables of all sequences, in one array."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Any

import numpy as np

from pagedattn.block_manager.ragged import nonzero, ragged_numbers

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NO_EXTENT = -1


def _extent_sizes() -> NDArray[np.int64]:
    """Two sizes an octave: 4, 6, 8, 12, 16, ..."""
    powers = 4 << np.arange(29, dtype=np.int64)
    return np.stack([powers, powers * 3 // 2], axis=1).reshape(-1)


_SIZES = _extent_sizes()
_SIZES_LIST: list[int] = _SIZES.tolist()


class BlockLists:
    """Growing lists of block ids, each in an extent of one array.

    A list has columns `first` to its end, which its owner knows; what lay before `first` has
    left a sliding window. Column c of list i is `entries[start[i] + c]`, and columns below
    `limit[i]` have room. A list that outgrows its extent moves to a larger one, so an append
    costs the same whatever the length, and a long list takes no room from short ones.

    Attributes:
        entries: int32 [num_entries], physical block ids.
        start: int64 [num_lists], where column 0 would be; negative is possible if it is gone.
        first: int32 [num_lists], the first column that is kept.
        limit: int32 [num_lists], the column at which the extent ends.

    """

    def __init__(self, num_lists: int) -> None:
        self.entries = np.zeros(256, dtype=np.int32)
        self.start = np.zeros(num_lists, dtype=np.int64)
        self.first = np.zeros(num_lists, dtype=np.int32)
        self.limit = np.zeros(num_lists, dtype=np.int32)
        self._size_class = np.full(num_lists, _NO_EXTENT, dtype=np.int8)
        self._free: dict[int, list[int]] = {}  # origins of unused extents of each size
        self._end = 0  # entries from here on were never in an extent

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        per_list = (self.start, self.first, self.limit, self._size_class)
        return self.entries.nbytes + sum(array.nbytes for array in per_list)

    def open_lists(self) -> NDArray[np.int64]:
        """Numbers of the lists that are open, ascending."""
        return np.flatnonzero(self._size_class != _NO_EXTENT)

    def add_lists(self, count: int) -> None:
        """Make `count` more lists, closed."""
        for name in ("start", "first", "limit"):
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old, np.zeros(count, old.dtype)]))
        self._size_class = np.concatenate([self._size_class, np.full(count, _NO_EXTENT, np.int8)])

    def open(self, lists: NDArray[np.int64], first: NDArray[Any], ends: NDArray[np.int64]) -> None:
        """Give closed `lists` room for the columns `first` to `ends`."""
        if lists.size == 1:
            size_class = bisect_left(_SIZES_LIST, int(ends[0] - first[0]))
            self._place(int(lists[0]), int(first[0]), size_class, self._take_extent(size_class))
            return
        classes = np.searchsorted(_SIZES, ends - first).astype(np.int8)
        origins = self._take_extents(classes)
        self._size_class[lists] = classes
        self.first[lists] = first
        self.start[lists] = origins - first
        self.limit[lists] = first + _SIZES[classes]

    def close(self, lists: NDArray[np.int64]) -> None:
        """Give back the extents of `lists`."""
        self._give_extents(self._size_class[lists], self._origins(lists))
        self._size_class[lists] = _NO_EXTENT

    def extend(
        self, lists: NDArray[np.int64], ends: NDArray[np.int64], wanted: NDArray[np.int64]
    ) -> None:
        """Make room below the columns `wanted` in open `lists`, whose columns end at `ends`."""
        beyond = wanted > self.limit[lists]
        if beyond.any():  # of a decode batch, a list or two
            for place in nonzero(beyond).tolist():
                self._move(int(lists[place]), int(ends[place]), int(wanted[place]))

    def _move(self, index: int, end: int, wanted: int) -> None:
        first = int(self.first[index])
        # half as much again, so that the moves of a growing list stay few
        size_class = bisect_left(_SIZES_LIST, max(wanted - first, (end - first) * 3 // 2))
        origin = self._take_extent(size_class)
        start, old_class = int(self.start[index]), int(self._size_class[index])
        self.entries[origin : origin + end - first] = self.entries[start + first : start + end]
        old_origin = start + int(self.limit[index]) - _SIZES_LIST[old_class]
        self._free.setdefault(old_class, []).append(old_origin)
        self._place(index, first, size_class, origin)

    def _place(self, index: int, first: int, size_class: int, origin: int) -> None:
        self._size_class[index] = size_class
        self.first[index] = first
        self.start[index] = origin - first
        self.limit[index] = first + _SIZES_LIST[size_class]

    def addresses(
        self, lists: NDArray[np.int64], first: NDArray[Any], ends: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Places in `entries` of the columns `first` to `ends`, list after list."""
        return ragged_numbers(first, ends, self.start[lists])

    def padded(
        self, lists: NDArray[np.int64], ends: NDArray[np.int64], *, masked: bool
    ) -> NDArray[np.int32]:
        """Lists as rows; int32 [num_lists, largest end].

        Args:
            lists: int64 [num_lists].
            ends: int64 [num_lists], the column after each list's last.
            masked: whether 0 is written where a list has no column. It costs several times what
                copying the rows does; without it, entries of other lists stand past a list's
                end. Columns before `first` are 0 in any case.

        """
        width = int(ends.max(initial=0))
        first = self.first[lists]
        if masked or first.any():
            columns = np.arange(width)
            places = self.start[lists][:, None] + columns
            kept = (columns >= first[:, None]) & (columns < ends[:, None])
            return np.where(kept, self.entries[np.where(kept, places, 0)], np.int32(0))
        if self._end + width > self.entries.size:
            self._resize(self._end + width)
        # overlapping rows, one from each entry on: taking some of them copies runs of entries
        windows = np.ndarray(
            (self.entries.size - width + 1, width), np.int32, self.entries, strides=(4, 4)
        )
        table: NDArray[np.int32] = windows[self.start[lists]]
        return table

    def _origins(self, lists: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.limit[lists] + self.start[lists] - _SIZES[self._size_class[lists]]

    def _take_extent(self, size_class: int) -> int:
        unused = self._free.get(size_class)
        if unused:
            return unused.pop()
        size = _SIZES_LIST[size_class]
        if self._end + size > self.entries.size:
            self._make_room(size)
        self._end += size
        return self._end - size

    def _take_extents(self, classes: NDArray[np.int8]) -> NDArray[np.int64]:
        by_class = _by_class(classes)
        missing = sum(
            int(_SIZES[size_class]) * max(0, places.size - len(self._free.get(size_class, ())))
            for size_class, places in by_class
        )
        if self._end + missing > self.entries.size:
            self._make_room(int(_SIZES[classes].sum()))
        origins = np.empty(classes.size, dtype=np.int64)
        for size_class, places in by_class:
            unused = self._free.get(size_class, [])
            reused = min(len(unused), places.size)
            if reused:
                origins[places[:reused]] = unused[-reused:]
                del unused[-reused:]
            size = int(_SIZES[size_class])
            origins[places[reused:]] = self._end + np.arange(places.size - reused) * size
            self._end += (places.size - reused) * size
        return origins

    def _make_room(self, wanted: int) -> None:
        """Make the array take `wanted` more entries; close the gaps if they are half of it."""
        gaps = sum(int(_SIZES[size_class]) * len(free) for size_class, free in self._free.items())
        if gaps > self._end // 2:
            lists = self.open_lists()
            sizes = _SIZES[self._size_class[lists]]
            old = self._origins(lists)
            new = np.cumsum(sizes) - sizes
            packed = self.entries[ragged_numbers(old, old + sizes)]
            self.start[lists] += new - old
            self.entries[: packed.size] = packed
            self.entries[packed.size :] = 0
            self._end = packed.size
            self._free.clear()
        if self._end + wanted > self.entries.size:
            self._resize(self._end + wanted)

    def _give_extents(self, classes: NDArray[np.int8], origins: NDArray[np.int64]) -> None:
        for size_class, places in _by_class(classes):
            self._free.setdefault(size_class, []).extend(origins[places].tolist())

    def _resize(self, wanted: int) -> None:
        entries = np.zeros(wanted + wanted // 8, dtype=np.int32)
        entries[: self._end] = self.entries[: self._end]
        self.entries = entries

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless extents, used and unused, tile the array."""
        lists = self.open_lists()
        origins = self._origins(lists)
        assert (self.start[lists] + self.first[lists] >= origins).all(), "a list leaves its extent"
        sizes = _SIZES[self._size_class[lists]]
        for size_class, unused in self._free.items():
            origins = np.concatenate([origins, np.array(unused, np.int64)])
            sizes = np.concatenate([sizes, np.full(len(unused), _SIZES[size_class])])
        order = np.argsort(origins)
        ends = np.cumsum(sizes[order])
        assert np.array_equal(origins[order], ends - sizes[order]), "extents overlap or are lost"
        assert self._end == int(sizes.sum()) <= self.entries.size, "the array's end is wrong"


def _by_class(classes: NDArray[np.int8]) -> list[tuple[int, NDArray[np.intp]]]:
    """Each class that occurs, with the places where it does."""
    if classes.size <= 1:
        return [(int(size_class), np.zeros(1, np.intp)) for size_class in classes]
    order = np.argsort(classes, kind="stable")
    ends = np.cumsum(np.bincount(classes)).tolist()
    starts = [0, *ends]
    return [
        (size_class, order[start:end])
        for size_class, (start, end) in enumerate(zip(starts, ends, strict=False))
        if start < end
    ]
