"""PagedAttention, whole: a token's way from a prompt to attention output.

    prompt -> 1 sequence -> 2 block manager -> 3 page table -> 4 slots -> 5 KV cache -> 6 attention
              tokens        which blocks       logical ->      where      tensors       kernel
                                               physical

Steps 1 to 4 are numpy alone; importing this package imports no torch. The KV cache needs it and
is loaded on first use. Step 6 is `from pagedattn.attention import AttentionBatch, attention,
write_kv`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pagedattn.block_manager import (
    Admission,
    BlockCopies,
    BlockManager,
    BlockStatistics,
    CacheKeys,
    OutOfBlocksError,
    Snapshot,
    SnapshotError,
    SwappedOutError,
    UnknownSequenceError,
)
from pagedattn.config import CacheConfig, ConfigError, ModelConfig
from pagedattn.page_table import CsrPageTable, PageTable
from pagedattn.sequence import Sequence

if TYPE_CHECKING:
    from pagedattn.kv_cache import KVCache, LayerCache

__version__ = "0.1.0"

__all__ = [
    "Admission",
    "BlockCopies",
    "BlockManager",
    "BlockStatistics",
    "CacheConfig",
    "CacheKeys",
    "ConfigError",
    "CsrPageTable",
    "KVCache",
    "LayerCache",
    "ModelConfig",
    "OutOfBlocksError",
    "PageTable",
    "Sequence",
    "Snapshot",
    "SnapshotError",
    "SwappedOutError",
    "UnknownSequenceError",
]

_NEEDS_TORCH = {
    "KVCache": "pagedattn.kv_cache",
    "LayerCache": "pagedattn.kv_cache",
}


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module 'pagedattn' has no attribute {name!r}")
    return getattr(importlib.import_module(_NEEDS_TORCH[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
