"""Which physical blocks hold which tokens: allocation, sharing and copy on write.

No torch here: the state is a handful of numpy arrays, and each operation handles a whole
batch in a few array operations.
"""

from pagedattn.block_manager.block_pool import BlockPool, OutOfBlocksError
from pagedattn.block_manager.manager import BlockCopies, BlockManager
from pagedattn.block_manager.sequence_rows import UnknownSequenceError

__all__ = [
    "BlockCopies",
    "BlockManager",
    "BlockPool",
    "OutOfBlocksError",
    "UnknownSequenceError",
]
