"""Attention batches drawn at random, for checks that no named workload may be tuned to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pagedattn.workloads.attention_shape import AttentionShape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    Lengths = tuple[NDArray[np.int64], NDArray[np.int64]]

HEADS = ((32, 8, 128), (64, 8, 128), (28, 4, 128), (8, 1, 128), (40, 40, 128), (64, 8, 64))
"""Query heads, KV heads and head size: layers of Llama 3 8B and 70B, Qwen2.5 7B, a shard of Llama 3
70B on eight GPUs, Llama 2 13B, and gpt-oss."""
MOST_BYTES = 6 << 30
MOST_FLOPS = 6e12
_K = 1024


def _spread(
    random: np.random.Generator, least: float, most: float, count: int
) -> NDArray[np.int64]:
    """Draw whole numbers whose logarithms are uniform."""
    return np.exp(random.uniform(np.log(least), np.log(most), count)).astype(np.int64)


def _count(random: np.random.Generator, least: int, most: int) -> int:
    return int(_spread(random, least, most + 1, 1)[0])


def _even(random: np.random.Generator) -> Lengths:
    """Decodes of one length."""
    count = _count(random, 1, 256)
    lengths = np.repeat(_spread(random, 64, 16 * _K, 1), count)
    return np.ones_like(lengths), lengths


def _ragged(random: np.random.Generator) -> Lengths:
    """Decodes of several lengths."""
    lengths = _spread(random, 64, 16 * _K, _count(random, 2, 256))
    return np.ones_like(lengths), lengths


def _drafts(random: np.random.Generator) -> Lengths:
    """Two to eight draft tokens of each sequence."""
    count = _count(random, 1, 128)
    queries = np.full(count, random.integers(2, 9))
    return queries, queries + _spread(random, 64, 12 * _K, count)


def _prompts(random: np.random.Generator) -> Lengths:
    lengths = _spread(random, 16, 6 * _K, _count(random, 1, 64))
    return lengths, lengths


def _chunks(random: np.random.Generator) -> Lengths:
    """The same number of tokens of each of several prompts."""
    count = _count(random, 1, 32)
    queries = np.full(count, random.choice([64, 128, 256, 512, 1024]))
    return queries, queries + random.integers(0, 12 * _K, count)


def _mixed(random: np.random.Generator) -> Lengths:
    """One to four prompts or chunks of them among decodes, in any order."""
    count = _count(random, 8, 192)
    queries = np.ones(count, dtype=np.int64)
    long = random.permutation(count)[: random.integers(1, 5)]
    queries[long] = _spread(random, 64, 2 * _K, long.size)
    before = _spread(random, 64, 8 * _K, count)
    before[long] *= random.integers(0, 2, long.size)
    return queries, queries + before


DRAWN_KINDS: dict[str, Callable[[np.random.Generator], Lengths]] = {
    "even": _even,
    "ragged": _ragged,
    "drafts": _drafts,
    "prompts": _prompts,
    "chunks": _chunks,
    "mixed": _mixed,
}


def drawn_shapes(kinds: Iterable[str], count: int, seed: int) -> list[AttentionShape]:
    """Draw batches of each kind, the same ones in every process.

    Lengths are spread evenly over their orders of magnitude; heads are those of known models. K and
    V are 6 GiB at most, and products 6 TFLOP.

    Args:
        kinds: of `DRAWN_KINDS`: decodes of one length and of several, drafts, prompts, chunks of
            them, and prompts or chunks among decodes.
        count: of each kind.
        seed: of what is drawn; batches of a kind do not depend on the other kinds.

    Returns:
        Shapes named for example ``mixed-3-of-seed-0``, kind by kind.

    """
    found = []
    for kind in kinds:
        random = np.random.default_rng([seed, *kind.encode()])
        found += [_fitting(random, kind, f"{kind}-{i}-of-seed-{seed}") for i in range(count)]
    return found


def _fitting(random: np.random.Generator, kind: str, name: str) -> AttentionShape:
    """Draw until a batch is not too large."""
    while True:
        queries, lengths = (tuple(each.tolist()) for each in DRAWN_KINDS[kind](random))
        query_heads, kv_heads, head_size = HEADS[random.integers(len(HEADS))]
        shape = AttentionShape(name, queries, lengths, query_heads, kv_heads, head_size)
        if shape.kv_bytes <= MOST_BYTES and shape.flops <= MOST_FLOPS:
            return shape
