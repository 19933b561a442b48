"""The two functions of a layer: write its K and V, then attend. Validates, then chooses."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch

from pagedattn.attention.registry import get_implementation

if TYPE_CHECKING:
    from pagedattn.attention.batch import AttentionBatch
    from pagedattn.attention.registry import Implementation
    from pagedattn.kv_cache import LayerCache


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: LayerCache,
    slots: torch.Tensor,
    *,
    implementation: str | None = None,
) -> None:
    """Write the K and V of a step's tokens into their slots; changes the cache.

    Args:
        key: [num_tokens, num_kv_heads, head_size]; cast to the cache's dtype.
        value: the same shape and dtype.
        cache: one layer's views.
        slots: int64 [num_tokens], distinct; a slot outside the cache is skipped.
        implementation: a name from `implementation_names()`; None chooses: Triton on a GPU,
            PyTorch elsewhere.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    """
    expected = (slots.shape[0], cache.num_kv_heads, cache.head_size)
    for name, tensor in (("key", key), ("value", value)):
        _check(
            tuple(tensor.shape) == expected,
            f"{name} has shape {tuple(tensor.shape)}; "
            f"[num_tokens, num_kv_heads, head_size] is {expected} here",
        )
        _check(tensor.stride(-1) == 1, f"{name} must be contiguous in its last dimension")
        _check_device(name, tensor, cache)
    _check(slots.dtype == torch.int64, f"slots are {slots.dtype}; they must be torch.int64")
    _check_device("slots", slots, cache)
    _choose(implementation, cache).write_kv(key, value, cache, slots)


def attention(
    query: torch.Tensor,
    cache: LayerCache,
    batch: AttentionBatch,
    *,
    scale: float | None = None,
    out: torch.Tensor | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """Causal attention of a batch's query tokens over its paged keys and values.

    Query token t of a sequence with n tokens, q of them queries, is the sequence's token
    `n - q + t` and sees the keys 0 to `n - q + t`. Query head h uses KV head
    `h // (num_query_heads / num_kv_heads)`. The query tokens' own K and V must have been
    written before (`write_kv`).

    Args:
        query: [num_query_tokens, num_query_heads, head_size], the cache's dtype.
        cache: one layer's views; read only.
        batch: lengths, block tables and query rows.
        scale: factor of the scores; None is `1 / sqrt(head_size)`.
        out: where to write, in the shape and dtype of `query`; None allocates.
        implementation: a name from `implementation_names()`; None chooses: Triton on a GPU,
            PyTorch elsewhere.

    Returns:
        [num_query_tokens, num_query_heads, head_size]; zeros for a query that sees no key.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the implementation does not
            support these inputs.

    """
    _check(
        query.dim() == 3,
        f"query has {query.dim()} dimensions; it must be "
        "[num_query_tokens, num_query_heads, head_size]",
    )
    num_tokens, num_query_heads, head_size = query.shape
    _check(
        num_tokens == batch.num_query_tokens,
        f"query has {num_tokens} tokens; the batch has {batch.num_query_tokens}",
    )
    _check(
        head_size == cache.head_size,
        f"query has head_size {head_size}; the cache has {cache.head_size}",
    )
    _check(
        num_query_heads % cache.num_kv_heads == 0,
        f"query has {num_query_heads} heads, which is no multiple of the cache's "
        f"{cache.num_kv_heads} KV heads",
    )
    _check(
        query.dtype == cache.key.dtype, f"query is {query.dtype}; the cache is {cache.key.dtype}"
    )
    _check(query.stride(-1) == 1, "query must be contiguous in its last dimension")
    _check_device("query", query, cache)
    _check_device("batch", batch.block_tables, cache)
    if out is None:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
    else:
        _check(
            out.shape == query.shape and out.dtype == query.dtype,
            f"out is {out.dtype} {tuple(out.shape)}; it must be {query.dtype} {tuple(query.shape)}",
        )
        _check(out.stride(-1) == 1, "out must be contiguous in its last dimension")
        _check_device("out", out, cache)
    if num_tokens == 0:
        return out
    chosen = _choose(implementation, cache)
    reason = chosen.unsupported(query, cache, batch)
    _check(reason is None, f"implementation {chosen.name!r} cannot take these inputs: {reason}")
    chosen.attention(query, cache, batch, head_size**-0.5 if scale is None else scale, out)
    return out


def _choose(name: str | None, cache: LayerCache) -> Implementation:
    if name is None:
        on_gpu = cache.key.is_cuda and importlib.util.find_spec("triton") is not None
        name = "triton" if on_gpu else "torch"
    return get_implementation(name)


def _check(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


def _check_device(name: str, tensor: torch.Tensor, cache: LayerCache) -> None:
    _check(
        tensor.device == cache.key.device,
        f"{name} is on {tensor.device}; the cache is on {cache.key.device}",
    )
