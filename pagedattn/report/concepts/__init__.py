"""The figures of the tutorial, drawn from the state of the real classes.

Each module draws one: its `scene` asks the block manager, the page table, the KV cache or the
reservations for what they hold, and its `draw` writes down the answer. `drawing` writes them all.
Importing this package, for the names, imports neither torch nor matplotlib.
"""

from __future__ import annotations

from typing import Literal, get_args

Concept = Literal[
    "kv_cache_problem",
    "block_structure",
    "memory_comparison",
    "block_sharing",
    "performance_comparison",
    "attention_flow",
    "benchmark_results",
]
CONCEPTS: tuple[Concept, ...] = get_args(Concept)
