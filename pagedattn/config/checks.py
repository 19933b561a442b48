"""What a value of a configuration must be, and the error that says so."""

from __future__ import annotations

from numbers import Integral
from reprlib import repr as short_repr
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

DTYPE_BYTES: Mapping[str, int] = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3": 1,
}
"""Bytes of one element of each dtype that a KV cache can hold."""

MODEL_DTYPES = ("float16", "bfloat16", "float32")
"""The dtypes that a model can compute in."""

CACHE_DTYPES = tuple(sorted(DTYPE_BYTES))
"""The dtypes that a KV cache can hold."""


class ConfigError(ValueError):
    """A configuration is malformed, incomplete or contradicts itself."""


def positive_int(key: str, value: object) -> int:
    """Return ``value`` as a plain ``int``; raise :class:`ConfigError` unless it is one, above 0.

    Booleans are not integers here, nor are floats with a whole value; numpy's integers are.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value <= 0:
        raise ConfigError(f"{key} must be a positive integer, not {short_repr(value)}.")
    return int(value)


def one_of(key: str, value: object, allowed: tuple[str, ...]) -> str:
    """Return ``value``; raise :class:`ConfigError` unless it is one of the allowed strings."""
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{key} must be one of {', '.join(allowed)}, not {short_repr(value)}.")
    return value


def check_groups(query_key: str, num_heads: int, kv_key: str, num_kv_heads: int) -> None:
    """Raise :class:`ConfigError` unless each KV head serves as many query heads as any other."""
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"{query_key} must be a multiple of {kv_key}, "
            f"not {num_heads} query heads for {num_kv_heads} KV heads."
        )
