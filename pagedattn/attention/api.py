"""The two functions of a layer: write its K and V, then attend. Validates, then chooses."""

from __future__ import annotations

import functools
import importlib.util
import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Literal, overload

import numpy as np
import torch

from pagedattn.attention.batch import AttentionBatch
from pagedattn.attention.batch_contents import check_block_size
from pagedattn.attention.call import AttentionCall
from pagedattn.attention.cascade import attend_in_parts, plan_of
from pagedattn.attention.registry import UnsupportedError, get_implementation
from pagedattn.device import current_device
from pagedattn.kv_cache import LayerCache

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from pagedattn.attention.registry import Implementation

QUERY_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: LayerCache,
    slots: torch.Tensor,
    *,
    implementation: str | None = None,
) -> None:
    """Write the K and V of a step's tokens into their slots; changes the cache.

    Nothing is kept for gradients.

    Args:
        key: of a floating dtype, [num_tokens, num_kv_heads, head_size]; cast to the cache's. For an
            fp8 cache it is divided by the head's scale, limited to what fp8 holds, and rounded to
            nearest.
        value: the same shape and dtype.
        cache: one layer's views.
        slots: int64 [num_tokens], distinct; a slot outside the cache is skipped.
        implementation: a name from `implementation_names()`; None chooses: CUDA on a
            Hopper GPU, Triton on another, PyTorch elsewhere.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    """
    check_new_tokens(key, value, cache, slots)
    with current_device(cache.key.device), without_gradients(key, value):
        choose_implementation(implementation, cache).write_kv(key, value, cache, slots)


@overload
def attention(
    query: torch.Tensor,
    cache: LayerCache,
    batch: AttentionBatch,
    *,
    scale: float | None = None,
    out: torch.Tensor | None = None,
    return_lse: Literal[False] = False,
    window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    causal: bool = True,
    implementation: str | None = None,
) -> torch.Tensor: ...


@overload
def attention(
    query: torch.Tensor,
    cache: LayerCache,
    batch: AttentionBatch,
    *,
    scale: float | None = None,
    out: torch.Tensor | None = None,
    return_lse: Literal[True],
    window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    causal: bool = True,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def attention(
    query: torch.Tensor,
    cache: LayerCache,
    batch: AttentionBatch,
    *,
    scale: float | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    causal: bool = True,
    implementation: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of a batch's query tokens over its paged keys and values, causal unless asked.

    Query token t of a sequence with n tokens, q of them queries, is the sequence's token
    `n - q + t` and sees the keys 0 to `n - q + t`. Query head h uses KV head
    `h // (num_query_heads / num_kv_heads)`. The query tokens' own K and V must have been
    written before (`write_kv`). `AttentionCall` has the formula with all of its options. Nothing is
    kept for gradients. What tensors of the batch hold is not looked at, which would wait for a GPU:
    `AttentionBatch.check_integrity` does.

    Args:
        query: [num_query_tokens, num_query_heads, head_size], the cache's dtype; over an fp8
            cache float16, bfloat16 or float32.
        cache: one layer's views; read only.
        batch: lengths, block tables and query rows.
        scale: finite factor of the scores; None is `1 / sqrt(head_size)`.
        out: where to write, in the shape and dtype of `query`; None allocates.
        return_lse: return the log-sum-exp of the scores too, to merge partial results by.
        window: a query sees at most this many keys, its own the last of them; at least 1.
            Block table entries that have left every query's window mean nothing.
        soft_cap: bound the scores smoothly, `soft_cap * tanh(score / soft_cap)`; finite and above
            0. One of 2 ** 100 and more counts as None.
        alibi_slopes: float32 [num_query_heads]; adds `slope * (key position - own position)`.
        sinks: float32 [num_query_heads]; a logit that joins the softmax's denominator alone.
        causal: False lets every query see all keys of its sequence, without window or slopes.
        implementation: a name from `implementation_names()`; None chooses: CUDA on a
            Hopper GPU, Triton on another, PyTorch elsewhere.

    Returns:
        [num_query_tokens, num_query_heads, head_size]; zeros for a query that sees no key.
        With `return_lse` a pair: this, and float32 [num_query_tokens, num_query_heads], the
        natural logarithm of the sum of exp(score), the sink included; -inf for a query that sees
        no key where there are no sinks.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit.
        UnsupportedError: the implementation does not take these inputs; a ValueError too.

    """
    _check_query(query, cache, batch)
    if out is None:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
    else:
        check_output(out, query, cache)
    scale = cache.head_size**-0.5 if scale is None else float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale!r}; it must be a finite number, or None")
    if window is not None:
        if (type(window) is not int and not isinstance(window, np.integer)) or window < 1:
            raise ValueError(
                f"window is {window!r}; it must be a whole number of tokens, at least 1, or None"
            )
        window = int(window)
    if soft_cap is not None:
        if not (math.isfinite(soft_cap) and soft_cap > 0):
            raise ValueError(
                f"soft_cap is {soft_cap!r}; it must be a finite number above 0, or None"
            )
        soft_cap = float(soft_cap)
    if not causal and (window is not None or alibi_slopes is not None):
        raise ValueError(
            "a window and alibi_slopes count from a query's own position; they need causal=True"
        )
    for name, tensor in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if tensor is not None:
            _check_per_head(name, tensor, query.shape[1], cache)
    if window is not None and window >= batch.max_kv_length:
        window = None  # hides nothing
    lse = None
    if return_lse:
        lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    call = AttentionCall(
        query=query,
        cache=cache,
        batch=batch,
        scale=scale,
        out=out,
        lse=lse,
        window=window,
        soft_cap=soft_cap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        causal=causal,
    )
    if query.shape[0] > 0:
        chosen = choose_implementation(implementation, cache)
        reason = chosen.unsupported(call)
        if reason is not None:
            raise UnsupportedError(
                f"implementation {chosen.name!r} cannot take these inputs: {reason}"
            )
        with current_device(query.device), without_gradients(query, alibi_slopes, sinks):
            plan = plan_of(chosen, call)
            if plan is None:
                chosen.attention(call)
            else:
                attend_in_parts(chosen, call, plan)
    return out if lse is None else (out, lse)


def check_new_tokens(
    key: torch.Tensor, value: torch.Tensor, cache: LayerCache, slots: torch.Tensor
) -> None:
    """Raise `ValueError` unless these are as `write_kv` describes them."""
    check_layer(cache)
    if slots.dtype != torch.int64:
        raise ValueError(f"slots are {slots.dtype}; they must be torch.int64")
    if slots.dim() != 1 or not slots.is_contiguous():
        raise ValueError("slots must be contiguous in their one dimension")
    expected = (slots.shape[0], cache.num_kv_heads, cache.head_size)
    for name, tensor in (("key", key), ("value", value)):
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; "
                f"[num_tokens, num_kv_heads, head_size] is {expected} here"
            )
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension")
        check_device(name, tensor, cache)
    if key.dtype != value.dtype or not key.is_floating_point():
        raise ValueError(
            f"key is {key.dtype} and value {value.dtype}; they must be of one floating dtype"
        )
    check_device("slots", slots, cache)


def choose_implementation(name: str | None, cache: LayerCache) -> Implementation:
    """Return the implementation of that name, or the fastest for the cache's device."""
    return get_implementation(_fastest(cache.key.device) if name is None else name)


@functools.cache
def _fastest(device: torch.device) -> str:
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return "torch"
    from pagedattn.attention.cuda import unavailable

    return "triton" if unavailable(device) else "cuda"


def _check_query(query: torch.Tensor, cache: LayerCache, batch: AttentionBatch) -> None:
    check_layer(cache)
    if not isinstance(batch, AttentionBatch):
        raise ValueError(
            f"batch is a {type(batch).__name__}; attention takes an AttentionBatch, which "
            "AttentionBatch.of makes of a PageTable"
        )
    check_block_size(batch, cache)
    if query.dim() != 3:
        raise ValueError(
            f"query has {query.dim()} dimensions; it must be "
            "[num_query_tokens, num_query_heads, head_size]"
        )
    num_tokens, num_query_heads, head_size = query.shape
    if num_tokens != batch.num_query_tokens:
        raise ValueError(f"query has {num_tokens} tokens; the batch has {batch.num_query_tokens}")
    if head_size != cache.head_size:
        raise ValueError(f"query has head_size {head_size}; the cache has {cache.head_size}")
    if num_query_heads < 1 or num_query_heads % cache.num_kv_heads != 0:
        raise ValueError(
            f"query has {num_query_heads} heads, which is no multiple of the cache's "
            f"{cache.num_kv_heads} KV heads"
        )
    if query.dtype not in QUERY_DTYPES:
        raise ValueError(
            f"query is {query.dtype}; it must be torch.float16, torch.bfloat16 or torch.float32"
        )
    if cache.dtype not in (query.dtype, torch.float8_e4m3fn):
        raise ValueError(f"query is {query.dtype}; the cache is {cache.dtype}")
    if query.stride(-1) != 1:
        raise ValueError("query must be contiguous in its last dimension")
    check_device("query", query, cache)
    check_device("batch", batch.block_tables, cache)


def _check_per_head(name: str, tensor: torch.Tensor, num_heads: int, cache: LayerCache) -> None:
    if tensor.dtype != torch.float32 or tuple(tensor.shape) != (num_heads,):
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)}; it must be torch.float32 "
            f"[num_query_heads], here {(num_heads,)}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous")
    check_device(name, tensor, cache)


def check(condition: bool, sentence: str) -> None:
    """Raise `ValueError` with this sentence unless the condition holds."""
    if not condition:
        raise ValueError(sentence)


def check_layer(cache: LayerCache) -> None:
    """Raise `ValueError` unless this is one layer's cache."""
    if not isinstance(cache, LayerCache):
        raise ValueError(
            f"cache is a {type(cache).__name__}; it must be a LayerCache, as KVCache.layer returns"
        )


def check_output(out: torch.Tensor, query: torch.Tensor, cache: LayerCache) -> None:
    """Raise `ValueError` unless kernels can write the queries' results to `out`."""
    if out.shape != query.shape or out.dtype != query.dtype:
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)}; it must be {query.dtype} {tuple(query.shape)}"
        )
    strides = out.stride()
    if strides[-1] != 1:
        raise ValueError("out must be contiguous in its last dimension")
    if 0 in strides and any(
        stride == 0 and size > 1 for size, stride in zip(out.shape, strides, strict=True)
    ):
        raise ValueError(
            f"out has strides {strides} and several rows in one place; each must have its own"
        )
    check_device("out", out, cache)


def without_gradients(*tensors: torch.Tensor | None) -> AbstractContextManager[object]:
    """Return a context in which PyTorch keeps nothing for gradients, where it otherwise would."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return torch.no_grad()
    return nullcontext()


def check_device(name: str, tensor: torch.Tensor, cache: LayerCache) -> None:
    """Raise `ValueError` unless the tensor is on the cache's device."""
    if tensor.device != cache.key.device:
        raise ValueError(f"{name} is on {tensor.device}; the cache is on {cache.key.device}")
