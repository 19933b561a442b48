"""The names of the tutorial's figures, which a command line needs before anything is drawn."""

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
