"""Lists of block copies, as arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class BlockCopies:
    """Blocks whose contents must be copied: within a pool, or from one pool to another.

    Attributes:
        sources: int32 [num_copies], blocks to read. May repeat.
        destinations: int32 [num_copies], blocks to write. Distinct, and never a source of the
            same pool.

    """

    sources: NDArray[np.int32]
    destinations: NDArray[np.int32]

    def __len__(self) -> int:
        """Blocks to copy."""
        return int(self.sources.size)


CopyBlocks = Callable[[BlockCopies], object]
