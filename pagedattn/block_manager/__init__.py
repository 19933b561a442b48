"""Which physical blocks hold which tokens: prefix caching, sharing, preemption, windows.

No torch here: the state is a handful of numpy arrays, and each operation handles a whole
batch in a few array operations.
"""

from pagedattn.block_manager.block_pool import BlockPool, OutOfBlocksError
from pagedattn.block_manager.copies import BlockCopies
from pagedattn.block_manager.lineage import Lineage
from pagedattn.block_manager.manager import Admission, BlockManager
from pagedattn.block_manager.prefix_hash import CacheKeys
from pagedattn.block_manager.sequence_rows import SwappedOutError, UnknownSequenceError
from pagedattn.block_manager.snapshot import Snapshot, SnapshotError
from pagedattn.block_manager.statistics import BlockStatistics

__all__ = [
    "Admission",
    "BlockCopies",
    "BlockManager",
    "BlockPool",
    "BlockStatistics",
    "CacheKeys",
    "Lineage",
    "OutOfBlocksError",
    "Snapshot",
    "SnapshotError",
    "SwappedOutError",
    "UnknownSequenceError",
]
