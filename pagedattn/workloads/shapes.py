"""Named attention workloads: what tests and benchmarks run, so that their rows can be compared.

Names say what differs from the default: 32 query heads on 8 KV heads (``h32x8``) of size 128
(``d128``), blocks of 16, bfloat16. ``decode-B64-4k`` is a decode step of 64 sequences with 4096
tokens each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pagedattn.config import CACHE_DTYPES, DTYPE_BYTES, ConfigError, one_of, positive_int

_K = 1024


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One batch for one attention layer.

    A sequence has ``kv_lengths[i]`` tokens of K and V, this step's among them, and the queries of
    its last ``query_lengths[i]`` tokens. Lengths and ``block_size`` count tokens. Raises
    :class:`pagedattn.config.ConfigError`.

    ``dtype`` is the queries', and the cache's too unless ``kv_dtype`` is ``"float8_e4m3"``.
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

        ``sum(kv_lengths) * 2 * num_kv_heads * head_size * bytes of cache_dtype``.
        """
        token_bytes = 2 * self.num_kv_heads * self.head_size * DTYPE_BYTES[self.cache_dtype]
        return sum(self.kv_lengths) * token_bytes

    @property
    def flops(self) -> int:
        """The floating-point operations of causal attention: two products of 2 operations a key.

        ``4 * head_size * num_query_heads * keys seen``. The last of ``q`` queries sees all ``n``
        keys, the one before it ``n - 1``: together ``q * n - q * (q - 1) / 2``. Two queries at the
        end of 5 tokens see 4 + 5 = 9.
        """
        keys_seen = sum(
            query_length * kv_length - query_length * (query_length - 1) // 2
            for query_length, kv_length in zip(self.query_lengths, self.kv_lengths, strict=True)
        )
        return 4 * self.head_size * self.num_query_heads * keys_seen


def find_shape(name: str) -> AttentionShape:
    """Return the shape of this name from all lists; raise ``ValueError`` if none has it."""
    for shape in ALL_SHAPES:
        if shape.name == name:
            return shape
    known = ", ".join(shape.name for shape in ALL_SHAPES)
    raise ValueError(f"shape must be one of {known}, not {name!r}.")


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


DECODE: tuple[AttentionShape, ...] = (
    _decode("B1-1k", (1 * _K,)),
    _decode("B1-8k", (8 * _K,)),
    _decode("B4-2k", (2 * _K,) * 4),
    _decode("B16-512", (512,) * 16),
    _decode("B1-64k", (64 * _K,)),
    _decode("B8-1k", (1 * _K,) * 8),
    _decode("B8-8k", (8 * _K,) * 8),
    _decode("B32-2k", (2 * _K,) * 32),
    _decode("B64-4k", (4 * _K,) * 64),
    _decode("B128-1k", (1 * _K,) * 128),
    _decode("B256-4k", (4 * _K,) * 256),
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
    _decode("B16-8k", (8 * _K,) * 16, heads=(8, 1)),
)
"""Decode steps: small and large batches, long contexts, ragged ones, other heads and blocks.

``B64-uniform-8k`` has lengths uniform from 1 to 8192; ``h8x1`` is one tensor-parallel shard.
"""

PREFILL: tuple[AttentionShape, ...] = (
    AttentionShape("prefill-8k", (8 * _K,), (8 * _K,)),
    AttentionShape("prefill-8k-block256", (8 * _K,), (8 * _K,), block_size=256),
    AttentionShape("prefill-16x1k", (1 * _K,) * 16, (1 * _K,) * 16),
)
"""Whole prompts."""

MIXED: tuple[AttentionShape, ...] = (
    AttentionShape("verify4-B32-8k", (4,) * 32, (8 * _K,) * 32),
    AttentionShape("chunk-2k-over-16k", (2 * _K,), (16 * _K,)),
    AttentionShape("mixed-2k-at-8k+63x4k", (2 * _K,) + (1,) * 63, (8 * _K,) + (4 * _K,) * 63),
)
"""Verification of 4 draft tokens, a prompt's last chunk, and such a chunk among decodes."""

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

ALL_SHAPES: tuple[AttentionShape, ...] = DECODE + PREFILL + MIXED + CPU_DECODE + CPU_PREFILL
"""Every named shape; no two have the same name."""
