"""What to run: named shapes, distributions of request lengths, and loaders for published traces."""

from pagedattn.workloads.attention_shape import AttentionShape
from pagedattn.workloads.drawn import DRAWN_KINDS, drawn_shapes
from pagedattn.workloads.lengths import (
    ALPACA,
    AZURE_CONVERSATION,
    SHAREGPT,
    LengthDistribution,
    RequestLengths,
)
from pagedattn.workloads.prompts import (
    VOCABULARY,
    count_repeated_blocks,
    prompt_of_hashes,
    random_prompts,
)
from pagedattn.workloads.shape_names import shape_of_name
from pagedattn.workloads.shapes import (
    ALL_SHAPES,
    CONTIGUOUS,
    CPU_DECODE,
    CPU_PREFILL,
    DECODE,
    FP8,
    GPU_SHAPES,
    HEAD_SIZES,
    MIXED,
    PAGED,
    PREFILL,
    SHARED,
    find_shape,
)
from pagedattn.workloads.traces import MOONCAKE_BLOCK_TOKENS, Request, TraceError, load_trace

__all__ = [
    "ALL_SHAPES",
    "ALPACA",
    "AZURE_CONVERSATION",
    "CONTIGUOUS",
    "CPU_DECODE",
    "CPU_PREFILL",
    "DECODE",
    "DRAWN_KINDS",
    "FP8",
    "GPU_SHAPES",
    "HEAD_SIZES",
    "MIXED",
    "MOONCAKE_BLOCK_TOKENS",
    "PAGED",
    "PREFILL",
    "SHARED",
    "SHAREGPT",
    "VOCABULARY",
    "AttentionShape",
    "LengthDistribution",
    "Request",
    "RequestLengths",
    "TraceError",
    "count_repeated_blocks",
    "drawn_shapes",
    "find_shape",
    "load_trace",
    "prompt_of_hashes",
    "random_prompts",
    "shape_of_name",
]
