"""One call of attention, as an implementation receives it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Collection

    from pagedattn.attention.batch import AttentionBatch
    from pagedattn.kv_cache import LayerCache

FEATURES = {
    "fp8": "an fp8 cache",
    "window": "a sliding window",
    "soft_cap": "a soft cap",
    "alibi": "ALiBi slopes",
    "sinks": "attention sinks",
    "lse": "the log-sum-exp",
    "not_causal": "queries that see all keys",
}
"""What a call may ask for beyond plain causal attention, by name."""

MOST_WINDOW = 1 << 30
"""Tokens of the widest window. No sequence has as many, and a position less it fits in int32, of a
padding sequence's queries too, which come before position 0."""

LEAST_IDLE_CAP = 2.0**100
"""A soft cap that bounds nothing: only a score of more than 2 ** 87 would change by a unit in
float32's last place."""


@dataclass(frozen=True)
class AttentionCall:
    """Everything that one call of `pagedattn.attention.attention` computes from, validated.

    The score of a query at position i and a key at position j is computed in this order:

        s = scale * (q . k)
        s = soft_cap * tanh(s / soft_cap)          if there is a soft cap
        s = s + alibi_slopes[head] * (j - i)       if there are slopes
        s = -inf                                   if j > i, or j <= i - window

    Where `causal` is False, no score is -inf: each query sees all of its sequence's keys, which may
    then be fewer than its queries.

    and the result is `sum_j exp(s_j) v_j / (sum_j exp(s_j) + exp(sinks[head]))`, the last term
    if there are sinks.

    Sources: Gemma 2 (soft cap), Press et al. 2022 (ALiBi), Beltagy et al. 2020 (sliding window);
    a sink as a learned logit is that of gpt-oss, after Xiao et al. 2024.

    Attributes:
        query: [num_query_tokens, num_query_heads, head_size], float16, bfloat16 or float32; the
            last dimension is contiguous. The cache's dtype, unless the cache is fp8.
        cache: one layer's views; read only.
        batch: lengths, block tables and query rows.
        scale: factor of the scores.
        out: in the shape and dtype of `query`, written in every row; zeros where no key is seen.
            The last dimension is contiguous. Where parts are merged afterwards it is float32
            whatever the query is: implementations with `merge_parts` alone are given that.
        lse: float32 [num_query_tokens, num_query_heads], contiguous, written if given: natural
            logarithm of the sum of exp(s), the sink included; -inf where no key is seen and
            there are no sinks.
        window: most keys that a query sees, its own the last of them; at least 1. Block table
            entries of blocks that no query sees any more mean nothing. What is above `MOST_WINDOW`
            becomes that, since kernels count in int32.
        soft_cap: bound of the scores, above 0. `LEAST_IDLE_CAP` and more becomes None.
        alibi_slopes: float32 [num_query_heads], contiguous.
        sinks: float32 [num_query_heads], contiguous.
        causal: False lets each query see all of its sequence's keys; then there is neither a window
            nor slopes.

    """

    query: torch.Tensor
    cache: LayerCache
    batch: AttentionBatch
    scale: float
    out: torch.Tensor
    lse: torch.Tensor | None = None
    window: int | None = None
    soft_cap: float | None = None
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    causal: bool = True

    def __post_init__(self) -> None:
        """Bound the window, and leave out a cap that no score comes near."""
        if self.window is not None and self.window > MOST_WINDOW:
            object.__setattr__(self, "window", MOST_WINDOW)
        if self.soft_cap is not None and self.soft_cap >= LEAST_IDLE_CAP:
            object.__setattr__(self, "soft_cap", None)

    @property
    def features(self) -> frozenset[str]:
        """Those of `FEATURES` that this call asks for."""
        asked = {
            "fp8": self.cache.dtype == torch.float8_e4m3fn,
            "window": self.window is not None,
            "soft_cap": self.soft_cap is not None,
            "alibi": self.alibi_slopes is not None,
            "sinks": self.sinks is not None,
            "lse": self.lse is not None,
            "not_causal": not self.causal,
        }
        return frozenset(name for name, is_asked in asked.items() if is_asked)

    def beyond(self, supported: Collection[str]) -> str | None:
        """Say in a phrase what an implementation of these features alone lacks, or None."""
        missing = [FEATURES[name] for name in FEATURES if name in self.features - set(supported)]
        return f"it does not do {' or '.join(missing)}" if missing else None
