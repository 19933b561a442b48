"""Lists of block copies, as arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
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

    def check_integrity(self) -> None:
        """Raise ValueError unless there are as many sources as distinct destinations."""
        sources, destinations = self.sources, self.destinations
        for name, blocks in (("sources", sources), ("destinations", destinations)):
            is_array = isinstance(blocks, np.ndarray)
            if not is_array or (blocks.size and blocks.dtype.kind not in "iu"):
                raise ValueError(f"{name} must be an array of whole numbers; given {blocks!r}")
        if sources.ndim != 1 or sources.shape != destinations.shape:
            raise ValueError(
                "there must be as many sources as destinations, in flat arrays; given shapes "
                f"{sources.shape} and {destinations.shape}"
            )
        if np.unique(destinations).size < destinations.size:
            raise ValueError("destinations name a block twice; what it would hold is not defined")


CopyBlocks = Callable[[BlockCopies], object]
