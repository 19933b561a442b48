"""Rotary position embedding (Su et al. 2021), and writing K and V in one go with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pagedattn.attention.api import (
    QUERY_DTYPES,
    check,
    check_device,
    check_new_tokens,
    check_output,
    choose_implementation,
    without_gradients,
)
from pagedattn.device import current_device

if TYPE_CHECKING:
    from pagedattn.kv_cache import LayerCache


@dataclass(frozen=True)
class Rotary:
    """By which angles heads are turned, and which elements of a head make a pair.

    A pair (x, y) of a token at position p becomes (x cos - y sin, y cos + x sin) of its angle at p.
    Pair i is the elements i and i + rotary_size / 2 (as in Llama and GPT-NeoX), or, if
    `interleaved`, 2 i and 2 i + 1 (as in GPT-J). Elements of a head from `rotary_size` on stay as
    they are.

    Worked example: with a rotary size of 4, pair 1 is the elements 1 and 3; interleaved, 2 and 3.

    Attributes:
        cos_sin: float16, bfloat16 or float32 [num_positions, rotary_size], contiguous in the last
            dimension: for each position the cosines of all pairs, then the sines.
        interleaved: which elements make a pair.

    Raises:
        ValueError: `cos_sin` is not as described.

    """

    cos_sin: torch.Tensor
    interleaved: bool = False

    def __post_init__(self) -> None:
        table = self.cos_sin
        check(
            table.dim() == 2
            and table.dtype in QUERY_DTYPES
            and table.shape[1] % 2 == 0
            and min(table.shape) > 0
            and table.stride(1) == 1,
            f"cos_sin is {table.dtype} {tuple(table.shape)} with strides {table.stride()}; it must "
            "be float16, bfloat16 or float32 [num_positions, rotary_size], an even rotary_size, "
            "contiguous in the last",
        )

    @classmethod
    def of(cls, rates: torch.Tensor, num_positions: int, *, interleaved: bool = False) -> Rotary:
        """Make the table in float32 for positions from 0 to `num_positions` - 1.

        Args:
            rates: [rotary_size / 2], the angle of each pair at position 1, often
                `theta ** (-2 i / rotary_size)`; angles are multiplied in its dtype.
            num_positions: at least 1.
            interleaved: see the class.

        """
        positions = torch.arange(num_positions, device=rates.device, dtype=rates.dtype)
        angles = positions[:, None] * rates
        return cls(torch.cat([angles.cos(), angles.sin()], dim=1).float(), interleaved)

    @property
    def num_positions(self) -> int:
        """Positions of the table."""
        return self.cos_sin.shape[0]

    @property
    def rotary_size(self) -> int:
        """Elements of a head that are turned."""
        return self.cos_sin.shape[1]


def rotate(heads: torch.Tensor, positions: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Turn heads with PyTorch, in float32.

    Args:
        heads: [num_tokens, num_heads, head_size].
        positions: int32 or int64 [num_tokens]; a token whose position the table does not have
            gets NaN in the elements that are turned.
        rotary: which angles and pairs.

    Returns:
        float32 [num_tokens, num_heads, head_size].

    """
    inside = (positions >= 0) & (positions < rotary.num_positions)
    rows = rotary.cos_sin[positions.clamp(0, rotary.num_positions - 1)].float()
    rows = rows.masked_fill(~inside[:, None], torch.nan)[:, None]
    cos, sin = rows.chunk(2, dim=-1)  # [num_tokens, 1, rotary_size / 2]
    wide = heads.float()
    turned, kept = wide[..., : rotary.rotary_size], wide[..., rotary.rotary_size :]
    if rotary.interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, dim=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pair, dim=-1).flatten(2) if rotary.interleaved else torch.cat(pair, -1)
    return torch.cat([turned, kept], dim=-1)


def rotary_write_kv(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: LayerCache,
    slots: torch.Tensor,
    positions: torch.Tensor,
    rotary: Rotary,
    *,
    out: torch.Tensor | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """Turn Q and K of a step's tokens by their positions, and write K and V; changes the cache.

    It is what `rotate`, `rotate` and `write_kv` do one after the other, in one launch where the
    implementation offers it; products and sums are float32, and K is rounded once, to the cache's
    dtype. May be captured in a CUDA graph.

    Args:
        query: float16, bfloat16 or float32 [num_tokens, num_query_heads, head_size].
        key: [num_tokens, num_kv_heads, head_size] in such a dtype, not changed; cast to the cache's
            dtype, as `write_kv` does it.
        value: the same shape and dtype as `key`.
        cache: one layer's views, written.
        slots: int64 [num_tokens], distinct; K and V of a slot outside the cache are not written.
        positions: int32 or int64 [num_tokens], each token's place in its sequence; one that the
            table does not have makes NaN of the token's Q and K.
        rotary: which angles and pairs.
        out: where the turned queries go, in the shape and dtype of `query`, perhaps `query` itself;
            None allocates.
        implementation: a name from `implementation_names()`; None chooses as `write_kv` does. One
            that has no method `rotary_write_kv` gets its `write_kv` called with a turned key,
            rounded to the key's dtype.

    Returns:
        `out`: [num_tokens, num_query_heads, head_size].

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    """
    for name, tensor in (("key", key), ("value", value)):
        check(
            tensor.dtype in QUERY_DTYPES,
            f"{name} is {tensor.dtype}; it must be float16, bfloat16 or float32",
        )
    check_new_tokens(key, value, cache, slots)
    check(
        query.dim() == 3
        and len(query) == len(slots)
        and query.shape[1] > 0
        and query.shape[2] == cache.head_size
        and query.dtype in QUERY_DTYPES,
        f"query is {query.dtype} {tuple(query.shape)}; it must be float16, bfloat16 or float32 "
        f"[num_tokens, num_query_heads, head_size], here [{len(slots)}, ..., {cache.head_size}]",
    )
    check(query.stride(-1) == 1, "query must be contiguous in its last dimension")
    check(
        positions.shape == slots.shape and positions.dtype in (torch.int32, torch.int64),
        f"positions are {positions.dtype} {tuple(positions.shape)}; they must be int32 or int64 "
        f"{tuple(slots.shape)}",
    )
    check(
        rotary.rotary_size <= cache.head_size,
        f"the rotary size is {rotary.rotary_size}; the heads have {cache.head_size} elements",
    )
    for name, tensor in (("query", query), ("positions", positions), ("cos_sin", rotary.cos_sin)):
        check_device(name, tensor, cache)
    if out is None:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
    else:
        check_output(out, query, cache)
        check(
            out.data_ptr() != query.data_ptr() or _lie_alike(out, query),
            f"out begins where query does, with strides {out.stride()}; it must be query itself, "
            f"whose strides are {query.stride()}, or lie elsewhere",
        )
    if not len(slots):
        return out
    chosen = choose_implementation(implementation, cache)
    fused = getattr(chosen, "rotary_write_kv", None)
    with current_device(query.device), without_gradients(query, key, value):
        if fused is not None:
            fused(query, key, value, cache, slots, positions, rotary, out)
        else:
            turned = rotate(key, positions, rotary).to(key.dtype)
            out.copy_(rotate(query, positions, rotary))
            chosen.write_kv(turned, value, cache, slots)
    return out


def _lie_alike(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether elements of two tensors of one shape are as far apart in both."""
    return first.numel() == 0 or all(
        mine == other or size == 1
        for size, mine, other in zip(first.shape, first.stride(), second.stride(), strict=True)
    )
