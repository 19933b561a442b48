"""Named attention workloads: what tests and benchmarks run, so that their rows can be compared.

Names say what differs from the default: 32 query heads on 8 KV heads (``h32x8``) of size 128
(``d128``), blocks of 16, bfloat16. ``decode-B64-4k`` is a decode step of 64 sequences with 4096
tokens each, and ``decode-B64-4k-fp8`` the same over a cache of fp8.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pagedattn.workloads.attention_shape import AttentionShape
from pagedattn.workloads.lengths import LengthDistribution
from pagedattn.workloads.shape_names import GRAMMAR, shape_of_name

_K = 1024


def _decode(
    size: str,
    kv_lengths: tuple[int, ...],
    *,
    heads: tuple[int, int] = (32, 8),
    head_size: int = 128,
    block_size: int = 16,
) -> AttentionShape:
    name = f"decode-{size}"
    if heads != (32, 8):
        name += f"-h{heads[0]}x{heads[1]}"
    if head_size != 128:
        name += f"-d{head_size}"
    if block_size != 16:
        name += f"-block{block_size}"
    return AttentionShape(
        name, (1,) * len(kv_lengths), kv_lengths, *heads, head_size=head_size, block_size=block_size
    )


def _uniform_lengths(num_sequences: int, longest: int) -> tuple[int, ...]:
    """Draw lengths of 1 to ``longest`` tokens, the same ones in every process."""
    lengths = np.random.default_rng(0).integers(1, longest, size=num_sequences, endpoint=True)
    return tuple(lengths.tolist())


def _lognormal_lengths(num_sequences: int) -> tuple[int, ...]:
    """Draw lengths of 3,000 tokens on average, 32 k at most, the same ones in every process."""
    lengths = LengthDistribution.lognormal(3000, 1.0, 32 * _K)
    return tuple(lengths.sample(np.random.default_rng(0), num_sequences).tolist())


DECODE: tuple[AttentionShape, ...] = (
    _decode("B1-1k", (1 * _K,)),
    _decode("B1-8k", (8 * _K,)),
    _decode("B1-4k", (4 * _K,), heads=(28, 4)),
    _decode("B4-2k", (2 * _K,) * 4),
    _decode("B12-2k", (2 * _K,) * 12),
    _decode("B16-512", (512,) * 16),
    _decode("B1-64k", (64 * _K,)),
    _decode("B8-1k", (1 * _K,) * 8),
    _decode("B8-8k", (8 * _K,) * 8),
    _decode("B32-2k", (2 * _K,) * 32),
    _decode("B64-4k", (4 * _K,) * 64),
    _decode("B128-1k", (1 * _K,) * 128),
    _decode("B256-4k", (4 * _K,) * 256),
    _decode("B32-uniform-512", _uniform_lengths(32, 512)),
    _decode("B64-uniform-8k", _uniform_lengths(64, 8 * _K)),
    _decode("B64-4k", (4 * _K,) * 64, block_size=1),
    _decode("B64-4k", (4 * _K,) * 64, block_size=64),
    _decode("B64-4k", (4 * _K,) * 64, block_size=256),
    _decode("B16-2k", (2 * _K,) * 16, heads=(40, 40)),
    _decode("B64-1k", (1 * _K,) * 64, heads=(12, 12), head_size=64),
    _decode("B64-2k", (2 * _K,) * 64, heads=(9, 3), head_size=64),
    _decode("B64-2k", (2 * _K,) * 64, heads=(64, 8)),
    _decode("ragged-64k+127x512", (64 * _K,) + (512,) * 127),
    _decode("B1-128k", (128 * _K,), heads=(8, 1)),
    _decode("B4-8k", (8 * _K,) * 4, heads=(8, 1)),
    _decode("B16-8k", (8 * _K,) * 16, heads=(8, 1)),
)
"""Decode steps: small and large batches, long contexts, ragged ones, other heads and blocks.

``B64-uniform-8k`` has lengths uniform from 1 to 8192, ``B32-uniform-512`` from 1 to 512; ``h8x1``
is one tensor-parallel shard.
"""

PREFILL: tuple[AttentionShape, ...] = (
    AttentionShape("prefill-8k", (8 * _K,), (8 * _K,)),
    AttentionShape("prefill-8k-block256", (8 * _K,), (8 * _K,), block_size=256),
    AttentionShape("prefill-16x1k", (1 * _K,) * 16, (1 * _K,) * 16),
    AttentionShape("prefill-4k-h48x1", (4 * _K,), (4 * _K,), 48, 1),
)
"""Whole prompts; ``h48x1`` are StarCoder's heads."""

MIXED: tuple[AttentionShape, ...] = (
    AttentionShape("verify4-B32-8k", (4,) * 32, (8 * _K,) * 32),
    AttentionShape("verify8-B8-8k", (8,) * 8, (8 * _K,) * 8),
    AttentionShape("chunk-2k-over-16k", (2 * _K,), (16 * _K,)),
    AttentionShape("chunk-512-over-8k", (512,), (8 * _K,)),
    AttentionShape("chunk-128-over-16k", (128,), (16 * _K,)),
    AttentionShape(
        "chunks-ragged-8x256-of-1k-to-8k",
        (256,) * 8,
        tuple(length * _K for length in (8, 1, 4, 2, 7, 3, 6, 5)),
    ),
    AttentionShape("mixed-2k-at-8k+63x4k", (2 * _K,) + (1,) * 63, (8 * _K,) + (4 * _K,) * 63),
    AttentionShape(
        "mixed-512-at-4k+63-lognormal", (512,) + (1,) * 63, (4 * _K, *_lognormal_lengths(63))
    ),
)
"""Verification of 4 and 8 draft tokens, a prompt's last chunk, also small ones, chunks of prompts
of several lengths, and a chunk among decodes, of one length and of lengths as of requests."""


def _named(name: str) -> AttentionShape:
    return next(shape for shape in DECODE + PREFILL + MIXED if shape.name == name)


def _over_fp8(shape: AttentionShape) -> AttentionShape:
    return replace(shape, name=f"{shape.name}-fp8", kv_dtype="float8_e4m3")


FP8: tuple[AttentionShape, ...] = tuple(
    _over_fp8(_named(name))
    for name in ("decode-B64-4k", "decode-B8-8k", "prefill-8k", "chunk-2k-over-16k")
)
"""Decode steps, a prompt and a chunk over a cache of fp8, with queries in bfloat16."""


def _shared(name: str, batch: int, shared: int, own: int) -> AttentionShape:
    return AttentionShape(
        f"shared-{name}-B{batch}", (1,) * batch, (shared + own,) * batch, shared_prefix=shared
    )


SHARED: tuple[AttentionShape, ...] = (
    _shared("512", 8, 512, 256),
    _shared("2k", 256, 2 * _K, 128),
    _shared("16k", 128, 16 * _K, 256),
)
"""Decode steps of sequences that share a prefix, with 128 or 256 tokens of their own."""

_MODELS = {64: (64, 8), 80: (32, 32), 96: (32, 32), 192: (32, 8), 256: (16, 8)}


def _of_head_size(head_size: int, heads: tuple[int, int]) -> tuple[AttentionShape, AttentionShape]:
    decode = _decode("B32-2k", (2 * _K,) * 32, heads=heads, head_size=head_size)
    name = decode.name.replace("decode-B32-2k", "prefill-4k")
    prefill = replace(decode, name=name, query_lengths=(4 * _K,), kv_lengths=(4 * _K,))
    return decode, prefill


HEAD_SIZES: tuple[AttentionShape, ...] = tuple(
    shape for size, heads in _MODELS.items() for shape in _of_head_size(size, heads)
)
"""A decode step and a prompt for each head size other than 128.

Heads are those of a layer of gpt-oss (64), Phi-2 (80), Phi-3-mini (96) and Gemma 2 9B (256).
"""


def _contiguous(shape: AttentionShape) -> AttentionShape:
    """Make each sequence one block, as long as the longest: its K and V lie in order."""
    return replace(shape, name=f"{shape.name}-contiguous", block_size=max(shape.kv_lengths))


_FIGURE_18A = tuple(
    AttentionShape(f"figure18a-B{batch}-{length}", (1,) * batch, (length,) * batch, 40, 40)
    for batch in (8, 32)
    for length in (64, 128, 256)
)

PAGED: tuple[AttentionShape, ...] = _FIGURE_18A
"""The batches and contexts of the paper's Figure 18a, with OPT-13B's heads, in blocks of 16."""

CONTIGUOUS: tuple[AttentionShape, ...] = tuple(
    _contiguous(shape)
    for shape in (
        *_FIGURE_18A,
        _named("decode-B64-4k"),
        _named("prefill-8k"),
    )
)
"""Twins of other shapes whose sequences lie in contiguous memory: what paging costs a kernel."""

CPU_DECODE: tuple[AttentionShape, ...] = (
    AttentionShape("cpu-decode-B8-1k", (1,) * 8, (1 * _K,) * 8, 8, 2, 64, dtype="float32"),
    AttentionShape("cpu-decode-B32-512", (1,) * 32, (512,) * 32, 8, 2, 64, dtype="float32"),
    AttentionShape(
        "cpu-decode-ragged-4k+15x256",
        (1,) * 16,
        (4 * _K,) + (256,) * 15,
        8,
        2,
        64,
        dtype="float32",
    ),
)
"""Decode steps that take two CPU cores a few milliseconds."""

CPU_PREFILL: tuple[AttentionShape, ...] = (
    AttentionShape("cpu-prefill-512", (512,), (512,), 8, 2, 64, dtype="float32"),
    AttentionShape("cpu-prefill-4x128", (128,) * 4, (128,) * 4, 8, 2, 64, dtype="float32"),
)
"""Whole prompts that take two CPU cores a few milliseconds."""

GPU_SHAPES: tuple[AttentionShape, ...] = (
    DECODE + FP8 + SHARED + PREFILL + MIXED + HEAD_SIZES + PAGED + CONTIGUOUS
)
"""Every shape that is timed on a GPU."""

ALL_SHAPES: tuple[AttentionShape, ...] = GPU_SHAPES + CPU_DECODE + CPU_PREFILL
"""Every named shape; no two have the same name."""


def find_shape(name: str) -> AttentionShape:
    """Return the shape of this name from all lists, or the one that the name says.

    Raises:
        ValueError: no list has it, and it is not as `shape_of_name` reads names.

    """
    for shape in ALL_SHAPES:
        if shape.name == name:
            return shape
    said = shape_of_name(name)
    if said is not None:
        return said
    known = ", ".join(shape.name for shape in ALL_SHAPES)
    raise ValueError(f"shape must be one of {known}, or be named like {GRAMMAR}, not {name!r}.")
