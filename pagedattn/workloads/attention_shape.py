"""The shape of one batch of attention: lengths, heads and sizes, and the work that follows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from reprlib import repr as short_repr

from pagedattn.config import CACHE_DTYPES, DTYPE_BYTES, ConfigError, one_of, positive_int


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One batch for one attention layer.

    A sequence has ``kv_lengths[i]`` tokens of K and V, this step's among them, and the queries of
    its last ``query_lengths[i]`` tokens. All begin with the same ``shared_prefix`` tokens, whose
    blocks they share. Lengths and ``block_size`` count tokens. Raises
    :class:`pagedattn.config.ConfigError`.

    ``dtype`` is the queries', and the cache's too unless ``kv_dtype`` is ``"float8_e4m3"``.

    The options are those of :func:`pagedattn.attention.attention`: a query sees at most ``window``
    keys, its own the last of them; scores are bounded by ``soft_cap``; ``alibi`` and ``sinks`` say
    whether each query head has a slope and a sink. None and False are without. Under a window
    nothing is shared.
    """

    name: str
    query_lengths: tuple[int, ...]
    kv_lengths: tuple[int, ...]
    num_query_heads: int = 32
    num_kv_heads: int = 8
    head_size: int = 128
    block_size: int = 16
    dtype: str = "bfloat16"
    kv_dtype: str | None = None
    shared_prefix: int = 0
    window: int | None = None
    soft_cap: float | None = None
    alibi: bool = False
    sinks: bool = False

    def __post_init__(self) -> None:
        for key in ("num_query_heads", "num_kv_heads", "head_size", "block_size"):
            object.__setattr__(self, key, positive_int(key, getattr(self, key)))
        for key in ("query_lengths", "kv_lengths"):
            lengths = tuple(positive_int(f"each of {key}", length) for length in getattr(self, key))
            object.__setattr__(self, key, lengths)
        one_of("dtype", self.dtype, CACHE_DTYPES)
        if self.kv_dtype is not None:
            one_of("kv_dtype", self.kv_dtype, (self.dtype, "float8_e4m3"))
        if self.num_query_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_query_heads must be a multiple of num_kv_heads, "
                f"not {self.num_query_heads} for {self.num_kv_heads}."
            )
        if not 0 < len(self.query_lengths) == len(self.kv_lengths):
            raise ConfigError(
                f"query_lengths and kv_lengths must name the same sequences, 1 or more, "
                f"not {len(self.query_lengths)} and {len(self.kv_lengths)}."
            )
        for query_length, kv_length in zip(self.query_lengths, self.kv_lengths, strict=True):
            if query_length > kv_length:
                raise ConfigError(
                    f"query_lengths must be at most kv_lengths, not {query_length} for {kv_length}."
                )
        self._check_shared_prefix()
        self._check_options()

    def _check_shared_prefix(self) -> None:
        """Only whole blocks are shared, and none that a query token's K and V are written to."""
        shared = self.shared_prefix
        if type(shared) is not int or shared < 0 or shared % self.block_size:
            raise ConfigError(
                f"shared_prefix must be whole blocks of {self.block_size} tokens, not {shared!r}."
            )
        pairs = zip(self.query_lengths, self.kv_lengths, strict=True)
        own = min(kv_length - query_length for query_length, kv_length in pairs)
        if shared > own:
            raise ConfigError(
                f"shared_prefix must leave each sequence its query tokens, at most {own} here, "
                f"not {shared}."
            )

    def _check_options(self) -> None:
        """A window is of whole tokens, a cap a number that scores can come near to."""
        if self.window is not None:
            object.__setattr__(self, "window", positive_int("window", self.window))
            if self.shared_prefix:
                raise ConfigError(
                    f"shared_prefix must be 0 where there is a window, not {self.shared_prefix}."
                )
        cap = self.soft_cap
        if cap is not None:
            if isinstance(cap, bool) or not isinstance(cap, Real) or not 0 < cap < math.inf:
                raise ConfigError(
                    f"soft_cap must be a finite number above 0, not {short_repr(cap)}."
                )
            object.__setattr__(self, "soft_cap", float(cap))

    @property
    def num_sequences(self) -> int:
        """How many sequences the batch has."""
        return len(self.kv_lengths)

    @property
    def num_query_tokens(self) -> int:
        """How many tokens have queries in this step, over all sequences."""
        return sum(self.query_lengths)

    @property
    def kind(self) -> str:
        """``"decode"``: one query a sequence; ``"prefill"``: all tokens' queries; or ``"mixed"``.

        A chunk after cached tokens, and a verification of several draft tokens, are mixed.
        """
        if all(length == 1 for length in self.query_lengths):
            return "decode"
        return "prefill" if self.query_lengths == self.kv_lengths else "mixed"

    @property
    def cache_dtype(self) -> str:
        """The dtype of K and V: ``kv_dtype``, or ``dtype`` without one."""
        return self.kv_dtype or self.dtype

    @property
    def kv_bytes(self) -> int:
        """The bytes of K and V that must be read once, from the tokens alone, not whole blocks.

        ``tokens * 2 * num_kv_heads * head_size * bytes of cache_dtype``, where tokens of a shared
        prefix count once: three sequences of 40 with 32 of them shared have 32 + 3 * 8 = 56. Under
        a window they are those that some query sees, at most ``window + query_length - 1`` of a
        sequence: 4 queries at the end of 40 tokens see 8 + 4 - 1 = 11 under a window of 8.
        """
        token_bytes = 2 * self.num_kv_heads * self.head_size * DTYPE_BYTES[self.cache_dtype]
        tokens = sum(self.kv_lengths) - (self.num_sequences - 1) * self.shared_prefix
        if self.window is not None:
            pairs = zip(self.query_lengths, self.kv_lengths, strict=True)
            tokens = sum(
                min(kv_length, self.window + query_length - 1) for query_length, kv_length in pairs
            )
        return tokens * token_bytes

    @property
    def flops(self) -> int:
        """The floating-point operations of causal attention: two products of 2 operations a key.

        ``4 * head_size * num_query_heads * keys seen``. The last of ``q`` queries sees all ``n``
        keys, the one before it ``n - 1``: together ``q * n - q * (q - 1) / 2``. Two queries at the
        end of 5 tokens see 4 + 5 = 9. Under a window each sees as many of its keys at most: under
        one of 4 the same two see 4 + 4 = 8. What a cap, slopes and sinks add is not counted.
        """
        keys_seen = 0
        for query_length, kv_length in zip(self.query_lengths, self.kv_lengths, strict=True):
            before = kv_length - query_length
            window = kv_length if self.window is None else self.window
            growing = min(query_length, max(0, window - before))  # queries that see all before them
            keys_seen += growing * before + growing * (growing + 1) // 2
            keys_seen += (query_length - growing) * window
        return 4 * self.head_size * self.num_query_heads * keys_seen
