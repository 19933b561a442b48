"""What the host knows of a batch that mixes short queries with long ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MOST_SHORT = 8
"""Query tokens of a sequence that decodes or verifies drafts, at most; a chunk has more."""


@dataclass(frozen=True)
class Mixture:
    """Sums over a batch's sequences, by which kernels choose how to divide work.

    Sequences of at most `MOST_SHORT` query tokens are short, the others long.

    Attributes:
        num_short: sequences that are short.
        most_short_queries: the most query tokens of a short one.
        short_kv_tokens: KV tokens of all short ones.
        longest_short_kv: KV tokens of the longest short one.
        num_long: sequences that are long.
        long_query_tokens: query tokens of all long ones.
        most_long_queries: the most query tokens of a long one.
        longest_long_kv: KV tokens of the longest long one.
        visible_pairs: pairs of a long one's query and a key that it sees, without a window.

    """

    num_short: int
    most_short_queries: int
    short_kv_tokens: int
    longest_short_kv: int
    num_long: int
    long_query_tokens: int
    most_long_queries: int
    longest_long_kv: int
    visible_pairs: int

    @classmethod
    def of(cls, query_lengths: NDArray[np.int64], kv_lengths: NDArray[np.int64]) -> Mixture | None:
        """Sum up; None where all sequences with queries are short, or all of them long.

        Args:
            query_lengths: int64 [num_sequences].
            kv_lengths: int64 [num_sequences], the query tokens included.

        """
        is_long = query_lengths > MOST_SHORT
        is_short = (query_lengths > 0) & ~is_long
        if not (is_long.any() and is_short.any()):
            return None
        queries, keys = query_lengths[is_long], kv_lengths[is_long]
        short_keys = kv_lengths[is_short]
        return cls(
            num_short=short_keys.size,
            most_short_queries=int(query_lengths[is_short].max()),
            short_kv_tokens=int(short_keys.sum()),
            longest_short_kv=int(short_keys.max()),
            num_long=queries.size,
            long_query_tokens=int(queries.sum()),
            most_long_queries=int(queries.max()),
            longest_long_kv=int(keys.max()),
            visible_pairs=int((queries * keys - queries * (queries - 1) // 2).sum()),
        )
