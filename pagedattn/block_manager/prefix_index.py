"""From a digest to the block that holds its K and V: an open-addressing table of arrays."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from pagedattn.block_manager.ragged import first_of_each, nonzero

if TYPE_CHECKING:
    from numpy.typing import NDArray


_FEW = 128  # up to so many digests, one after the other is no slower than all at once
_FULLEST = 0.85  # share of the table's places that are taken when it is rebuilt


def _prime_from(number: int) -> int:
    """Return the least odd prime that is not below `number`, which is at least 3."""
    number |= 1
    while (number % np.arange(3, math.isqrt(number) + 1, 2) == 0).any():
        number += 2
    return number


class BlockDigests:
    """The digest of each block that holds a full, known prefix.

    Attributes:
        digests: uint64 [num_blocks, 4]; meaningless where `hashed` is False.
        hashed: bool [num_blocks].

    """

    def __init__(self, num_blocks: int) -> None:
        self.digests = np.zeros((num_blocks, 4), dtype=np.uint64)
        self.hashed = np.zeros(num_blocks, dtype=bool)

    def insert(self, blocks: NDArray[np.int32], digests: NDArray[np.uint64]) -> None:
        """Note the digests of `blocks`."""
        places = blocks.astype(np.intp)  # with these, numpy scatters faster
        self.digests[places] = digests
        self.hashed[places] = True

    def forget(self, blocks: NDArray[np.int32]) -> None:
        """Make `blocks` hold nothing that can be found."""
        self.hashed[blocks] = False


class PrefixIndex(BlockDigests):
    """Finds blocks by digest, a batch at a time.

    Open addressing with double hashing. The table holds block ids alone: a candidate counts only
    if all 256 bits of its block's digest are those that are looked for, so two digests that
    share a place, or all 64 bits that the place is made from, are never taken for each other.
    Forgetting a block costs nothing: its entry no longer matches, and goes when the table is
    rebuilt. Host memory: 33 bytes a block for the digests and 6 for the table.

    Args:
        num_blocks: blocks in the pool.

    """

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        # a prime, so that a search by steps of any size reaches every place
        size = _prime_from(num_blocks + num_blocks // 2 + 5)
        self._table = np.zeros(size, dtype=np.int32)  # block id + 1, or 0
        self._num_entries = 0

    def find(self, digests: NDArray[np.uint64]) -> NDArray[np.int32]:
        """Blocks with these digests, or -1.

        Args:
            digests: uint64 [num_digests, 4].

        Returns:
            int32 [num_digests].

        """
        if len(digests) <= _FEW:
            return self._find_few(digests)
        found = np.full(len(digests), -1, dtype=np.int32)
        searched = np.arange(len(digests))
        places, steps = self._places(digests)
        while searched.size:
            entries = self._table[places]
            blocks = entries.astype(np.intp) - 1
            alike = self.digests[blocks, 0] == digests[searched, 0]
            alike &= self.hashed[blocks]  # an empty place names block -1, so it finds nothing
            hits = nonzero(alike)
            if hits.size:
                blocks, rows = blocks[hits], searched[hits]
                equal = (self.digests[blocks] == digests[rows]).all(axis=1)
                found[rows[equal]] = blocks[equal]
            # an empty place ends a search
            rest = nonzero((entries > 0) & (found[searched] < 0))
            searched, steps = searched[rest], steps[rest]
            places = self._advance(places[rest], steps)
        return found

    def _find_few(self, digests: NDArray[np.uint64]) -> NDArray[np.int32]:
        """Do what `find` does, one digest after the other."""
        table, hashed = self._table.data, self.hashed.data
        words, size = self.digests.reshape(-1).data, len(table)
        found = []
        for digest in digests.tolist():
            place, step = digest[0] % size, digest[1] % (size - 1) + 1
            while (entry := table[place]) and not (
                words[4 * entry - 4] == digest[0]
                and hashed[entry - 1]
                and words[4 * entry - 4 : 4 * entry].tolist() == digest
            ):
                place = (place + step) % size
            found.append(entry - 1)
        return np.array(found, dtype=np.int32)

    def enter(self, blocks: NDArray[np.int32], digests: NDArray[np.uint64]) -> NDArray[np.int32]:
        """Make `blocks` findable, but for those whose digest another block has.

        Args:
            blocks: int32 [num_blocks], distinct, and none of them in the index.
            digests: uint64 [num_blocks, 4]; of equal ones, one block enters.

        Returns:
            int32 [num_blocks], the block that has the digest, or -1 where the given one entered.

        """
        if blocks.size <= _FEW:
            return self._enter_few(blocks, digests)
        first = first_of_each(digests)
        held = self.find(digests)
        entering = (held < 0) & (first == np.arange(blocks.size))
        self.insert(blocks[entering], digests[entering])
        return np.where(entering | (held >= 0), held, blocks[first])

    def _enter_few(
        self, blocks: NDArray[np.int32], digests: NDArray[np.uint64]
    ) -> NDArray[np.int32]:
        """Do what `enter` does, one block after the other."""
        self._make_room(blocks.size)
        self.digests[blocks] = digests
        table, hashed = self._table.data, self.hashed.data
        words, size = self.digests.reshape(-1).data, len(table)
        held = []
        for block, digest in zip(blocks.tolist(), digests.tolist(), strict=True):
            place, step = digest[0] % size, digest[1] % (size - 1) + 1
            while (entry := table[place]) and not (
                words[4 * entry - 4] == digest[0]
                and hashed[entry - 1]
                and words[4 * entry - 4 : 4 * entry].tolist() == digest
            ):
                place = (place + step) % size
            held.append(entry - 1)
            if not entry:
                table[place] = block + 1
                hashed[block] = True
                self._num_entries += 1
        return np.array(held, dtype=np.int32)

    def insert(self, blocks: NDArray[np.int32], digests: NDArray[np.uint64]) -> None:
        """Make `blocks` findable.

        Args:
            blocks: int32 [num_blocks], distinct.
            digests: uint64 [num_blocks, 4], distinct, and none of them in the index.

        """
        self._make_room(blocks.size)
        super().insert(blocks, digests)
        self._num_entries += blocks.size
        self._fill(blocks + np.int32(1), digests)

    def _make_room(self, count: int) -> None:
        """Rebuild the table, without what was forgotten, if `count` more would make it too full."""
        if self._num_entries + count > _FULLEST * self._table.size:
            blocks = nonzero(self.hashed).astype(np.int32)
            self._table[:] = 0
            self._num_entries = blocks.size
            self._fill(blocks + np.int32(1), self.digests[blocks])

    def _fill(self, entries: NDArray[np.int32], digests: NDArray[np.uint64]) -> None:
        """Put entries into the table."""
        if entries.size <= _FEW:
            self._fill_few(entries, digests)
            return
        places, steps = self._places(digests)
        while entries.size:
            free = self._table[places] == 0
            self._table[places[free]] = entries[free]  # of several for one place, the last stays
            rest = nonzero(self._table[places] != entries)
            entries, steps = entries[rest], steps[rest]
            places = self._advance(places[rest], steps)

    def _fill_few(self, entries: NDArray[np.int32], digests: NDArray[np.uint64]) -> None:
        """Do what `_fill` does, one entry after the other."""
        table = self._table.data
        size = len(table)
        for entry, digest in zip(entries.tolist(), digests[:, :2].tolist(), strict=True):
            place, step = digest[0] % size, digest[1] % (size - 1) + 1
            while table[place]:
                place = (place + step) % size
            table[place] = entry

    def clear(self) -> None:
        """Forget every block."""
        self.hashed[:] = False
        self._table[:] = 0
        self._num_entries = 0

    def _places(self, digests: NDArray[np.uint64]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        size = self._table.size
        places = (digests[:, 0] % np.uint64(size)).astype(np.intp)
        steps = (digests[:, 1] % np.uint64(size - 1)).astype(np.intp) + 1
        return places, steps

    def _advance(self, places: NDArray[np.intp], steps: NDArray[np.intp]) -> NDArray[np.intp]:
        moved = places + steps
        moved[moved >= self._table.size] -= self._table.size
        return moved

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless just the hashed blocks are found, each by its digest."""
        hashed = nonzero(self.hashed)
        assert np.array_equal(self.find(self.digests[hashed]), hashed), "a block is not found"
        held = np.count_nonzero(self._table)
        assert held <= self._num_entries <= self._table.size, "the table's entries are miscounted"
