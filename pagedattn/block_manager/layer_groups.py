"""Groups of layers that need different parts of a sequence, on one pool of blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pagedattn.block_manager.ragged import whole_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_ALL = np.iinfo(np.int64).max


class LayerGroups:
    """Arithmetic of sliding windows, in blocks.

    A query at position p of a group with window w sees the positions p - w + 1 to p. A group
    without a window sees all. Each group has block tables of its own.

    Args:
        windows: the window of each group in tokens, or None.
        block_size: tokens a block.

    """

    def __init__(self, windows: Sequence[int | None], block_size: int) -> None:
        if not isinstance(windows, (list, tuple)) or not windows:
            raise ValueError(
                f"windows is {windows!r}; it must be a list with a window, or None, for each of at "
                "least one layer group"
            )
        self.windows = tuple(
            None if window is None else whole_number(window, "a window", 1) for window in windows
        )
        self.count = len(self.windows)
        self.block_size = block_size
        self.has_window = any(window is not None for window in self.windows)

    def blocks_in_window(self, group: int) -> int:
        """Full blocks before a block boundary that a query at the boundary sees.

        Worked example, block size 4: window 5 sees four tokens before the query, one block;
        window 6 sees five, two blocks.
        """
        window = self.windows[group]
        return _ALL if window is None else -(-(window - 1) // self.block_size)

    def first_seen(self, group: int, position: NDArray[np.int64]) -> NDArray[np.int64]:
        """Logical block of the first token that a query at `position` sees."""
        window = self.windows[group]
        if window is None:
            return np.zeros_like(position)
        return np.maximum(0, (position - window + 1) // self.block_size)

    def keys(self, digests: NDArray[np.uint64], group: int) -> NDArray[np.uint64]:
        """Digests told apart by layer group: two groups' K and V of one prefix differ.

        Changes the last word by the group's number, so for two groups to be mistaken for each
        other two digests would have to agree in their other 192 bits.
        """
        if group == 0:
            return digests
        keys = digests.copy()
        keys[:, 3] ^= np.uint64(group)
        return keys
