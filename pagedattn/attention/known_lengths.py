"""What the host knows of the lengths in a batch: by it kernels choose how to divide work."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MOST_SHORT = 8
"""Query tokens of a sequence that decodes or verifies drafts, at most; a chunk has more."""
SIGNIFICANT_BITS = 5


@dataclass(frozen=True)
class Sequences:
    """Of some sequences of a batch, how many queries they have, and how many keys.

    Keys are counted in lengths of the batch's longest sequence, rounded to 5 significant bits: so
    they stay what they are while a batch grows evenly, and batches that differ little are divided
    alike. What `in_tokens` returns counts them in tokens.

    Attributes:
        count: of the sequences.
        query_tokens: of all of them.
        most_queries: query tokens of the one that has the most.
        mean_kv: KV tokens of a sequence, on average.
        most_kv: KV tokens of the one that has the most.
        mean_seen: keys that a query sees without a window, on average.

    """

    count: int
    query_tokens: int
    most_queries: int
    mean_kv: float
    most_kv: float
    mean_seen: float

    @classmethod
    def of(
        cls, query_lengths: NDArray[np.int64], kv_lengths: NDArray[np.int64], longest: int
    ) -> Sequences | None:
        """Sum up; None where there are none.

        Args:
            query_lengths: int64 [num_sequences], none of them 0.
            kv_lengths: int64 [num_sequences], the query tokens included.
            longest: KV tokens of the batch's longest sequence.

        """
        count = query_lengths.size
        if count == 0:
            return None
        tokens = int(query_lengths.sum())
        pairs = int((query_lengths * (2 * kv_lengths - query_lengths + 1)).sum()) // 2
        return cls(
            count=count,
            query_tokens=tokens,
            most_queries=int(query_lengths.max()),
            mean_kv=_rounded(int(kv_lengths.sum()) / count / longest),
            most_kv=_rounded(int(kv_lengths.max()) / longest),
            mean_seen=_rounded(pairs / tokens / longest),
        )

    def in_tokens(self, longest: float) -> Sequences:
        """Return them with keys in tokens, where the batch's longest sequence has so many."""
        kv_tokens = self.mean_kv * longest, self.most_kv * longest, self.mean_seen * longest
        return Sequences(self.count, self.query_tokens, self.most_queries, *kv_tokens)

    @property
    def are_alike(self) -> bool:
        """Whether all have as many queries, and as many keys."""
        return self.query_tokens == self.count * self.most_queries and self.mean_kv == self.most_kv


def _rounded(x: float) -> float:
    part, exponent = math.frexp(x)
    return math.ldexp(round(part * 2**SIGNIFICANT_BITS), exponent - SIGNIFICANT_BITS)


@dataclass(frozen=True)
class KnownLengths:
    """What is known of a batch's sequences with queries: `MOST_SHORT` at most, or more.

    Attributes:
        short: those of few queries, or None if there are none.
        long: those of more, or None if there are none.
        longest: KV tokens of the longest sequence when the batch was made, rounded as others are.

    """

    short: Sequences | None
    long: Sequences | None
    longest: int

    @classmethod
    def of(cls, query_lengths: NDArray[np.int64], kv_lengths: NDArray[np.int64]) -> KnownLengths:
        """Sum up.

        Args:
            query_lengths: int64 [num_sequences].
            kv_lengths: int64 [num_sequences], the query tokens included.

        """
        longest = max(1, int(kv_lengths.max(initial=0)))
        count = kv_lengths.size
        if count and (query_lengths == 1).all():  # each step of a decode: in less time
            mean = _rounded(int(kv_lengths.sum()) / count / longest)
            decodes = Sequences(count, count, 1, mean, 1.0, mean)
            return cls(decodes, None, round(_rounded(longest)))
        is_long = query_lengths > MOST_SHORT
        is_short = (query_lengths > 0) & ~is_long
        short, long = (
            Sequences.of(query_lengths[which], kv_lengths[which], longest)
            for which in (is_short, is_long)
        )
        return cls(short, long, round(_rounded(longest)))

    @property
    def is_mixed(self) -> bool:
        """Whether there are both."""
        return self.short is not None and self.long is not None


def short_and_long(known: KnownLengths | None) -> tuple[Sequences, Sequences]:
    """Return both sorts of sequences of a mixed batch.

    Raises:
        ValueError: it is not mixed, as far as is known.

    """
    if known is None or known.short is None or known.long is None:
        raise ValueError("the batch has short queries alone, or long ones alone")
    return known.short, known.long
