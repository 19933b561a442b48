"""The physical blocks: which are free, and how many page-table entries refer to each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_BLOCKS = 2**31 - 1


class OutOfBlocksError(RuntimeError):
    """More blocks were asked for than are free; nothing was changed.

    Attributes:
        needed: blocks the operation needs.
        free: blocks that were free.

    """

    def __init__(self, needed: int, free: int) -> None:
        super().__init__(
            f"the operation needs {needed} blocks and {free} are free: "
            "free or preempt a sequence first"
        )
        self.needed = needed
        self.free = free


class BlockPool:
    """A pool of `num_blocks` blocks with reference counts.

    Free ids lie on a stack, so the block that was freed last is handed out first. Host memory:
    12 bytes a block.

    Args:
        num_blocks: blocks in the pool, 1 to 2**31 - 1.

    """

    def __init__(self, num_blocks: int) -> None:
        if not 1 <= num_blocks <= MAX_BLOCKS:
            raise ValueError(f"num_blocks is {num_blocks}; it must be from 1 to {MAX_BLOCKS}")
        self.num_blocks = num_blocks
        self._stack = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)
        self._num_free = num_blocks
        self._ref_counts = np.zeros(num_blocks, dtype=np.int32)
        self._scratch = np.zeros(num_blocks, dtype=np.int32)

    @property
    def num_free(self) -> int:
        """Blocks that nothing refers to."""
        return self._num_free

    def ref_counts(self, blocks: NDArray[np.int32]) -> NDArray[np.int32]:
        """How many page-table entries refer to each of `blocks`; same shape, int32."""
        return self._ref_counts[blocks]

    def require(self, count: int) -> None:
        """Raise `OutOfBlocksError` unless `count` blocks are free."""
        if count > self._num_free:
            raise OutOfBlocksError(count, self._num_free)

    def take(self, count: int) -> NDArray[np.int32]:
        """Hand out `count` free blocks, each with one reference.

        Returns:
            int32 [count], distinct ids.

        Raises:
            OutOfBlocksError: fewer are free; the pool is unchanged.

        """
        self.require(count)
        top = self._num_free
        blocks = self._stack[top - count : top][::-1].copy()
        self._num_free = top - count
        self._ref_counts[blocks] = 1
        return blocks

    def retain(self, blocks: NDArray[np.int32], count: int = 1) -> None:
        """Add `count` references to each of the distinct ids `blocks`."""
        self._ref_counts[blocks] += count

    def release(self, blocks: NDArray[np.int32]) -> None:
        """Drop one reference for each entry of `blocks` (ids may repeat).

        A block whose count reaches zero is free again.
        """
        np.subtract.at(self._ref_counts, blocks.astype(np.intp), np.int32(1))
        dead = blocks[self._ref_counts[blocks] == 0]
        if dead.size == 0:
            return
        # an id may stand in `dead` several times: keep the place that was written last
        places = np.arange(dead.size, dtype=np.int32)
        self._scratch[dead] = places
        dead = dead[self._scratch[dead] == places]
        top = self._num_free
        self._stack[top : top + dead.size] = dead
        self._num_free = top + dead.size

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless the free stack holds just the unreferenced blocks."""
        free = np.sort(self._stack[: self._num_free])
        unreferenced = np.flatnonzero(self._ref_counts == 0)
        assert np.array_equal(free, unreferenced), "the free stack and the counts disagree"
        assert (self._ref_counts >= 0).all(), "a reference count is negative"
