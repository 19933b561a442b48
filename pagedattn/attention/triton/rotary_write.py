"""Turning Q and K of a step's tokens and writing K and V into their slots, in one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from pagedattn.attention.triton.quantise import cache_views, to_cache

if TYPE_CHECKING:
    import torch

    from pagedattn.attention.rotary import Rotary
    from pagedattn.kv_cache import LayerCache

_QUERY_ELEMENTS = 2048  # of a program, before Q's heads are dealt to several


@triton.jit
def _load_pairs(
    head_ptrs, head_mask, HALF: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Both elements of each pair, [heads, PAIRS] each, of heads given as [heads, 1]."""
    if INTERLEAVED:
        columns = tl.arange(0, 2 * PAIRS)[None, :]
        both = tl.load(head_ptrs + columns, mask=head_mask & (columns < 2 * HALF))
        first, second = tl.split(tl.reshape(both, (head_ptrs.shape[0], PAIRS, 2)))
    else:
        columns = tl.arange(0, PAIRS)[None, :]
        mask = head_mask & (columns < HALF)
        first = tl.load(head_ptrs + columns, mask=mask)
        second = tl.load(head_ptrs + HALF + columns, mask=mask)
    return first, second


@triton.jit
def _turn(first, second, cos, sin):
    """Turn pairs, in float32."""
    first, second = first.to(tl.float32), second.to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _store_pairs(
    head_ptrs,
    first,
    second,
    head_mask,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Write what `_load_pairs` gave, in the dtype of `head_ptrs`."""
    if INTERLEAVED:
        columns = tl.arange(0, 2 * PAIRS)[None, :]
        both = tl.reshape(tl.join(first, second), (head_ptrs.shape[0], 2 * PAIRS))
        tl.store(head_ptrs + columns, both, mask=head_mask & (columns < 2 * HALF))
    else:
        columns = tl.arange(0, PAIRS)[None, :]
        mask = head_mask & (columns < HALF)
        tl.store(head_ptrs + columns, first, mask=mask)
        tl.store(head_ptrs + HALF + columns, second, mask=mask)


@triton.jit(do_not_specialize=["num_slots", "num_positions"])
def _rotary_write_kernel(
    query_ptr, out_ptr, new_key_ptr, new_value_ptr, key_ptr, value_ptr,
    key_scale_ptr, value_scale_ptr, slots_ptr, positions_ptr, cos_sin_ptr,
    num_slots, num_positions,
    query_token_stride, query_head_stride, out_token_stride, out_head_stride,
    new_key_token_stride, new_key_head_stride, new_value_token_stride, new_value_head_stride,
    block_stride, kv_head_stride, token_stride, position_stride,
    NUM_QUERY_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HEAD_SIZE: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, IN_PLACE: tl.constexpr, HARDWARE: tl.constexpr,
    QUERY_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, PAIRS: tl.constexpr,
    REST: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Turn some of a token's heads and write K and V. Grid: [num_tokens, parts of the heads].

    All of Q, K and V is loaded before the position and the slot are known, so that the waits for
    memory overlap: one for them and the tokens, one for the cosines.

    Bytes a token: 2 * num_query_heads * head_size * itemsize for Q, as for a plain write
    4 * num_kv_heads * head_size * itemsize for K and V (3 if the cache is fp8 and they are 16 bits
    wide), rotary_size * 4 for cosines and sines, 16 for slot and position. Limit: the copy
    bandwidth. Separate launches read and write K once more.
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    position = tl.load(positions_ptr + token).to(tl.int64)

    query_heads = tl.program_id(1) * QUERY_HEADS + tl.arange(0, QUERY_HEADS)[:, None]
    query_mask = query_heads < NUM_QUERY_HEADS
    queries = query_ptr + token * query_token_stride + query_heads * query_head_stride
    query_first, query_second = _load_pairs(queries, query_mask, HALF, PAIRS, INTERLEAVED)

    kv_heads = tl.program_id(1) * KV_HEADS + tl.arange(0, KV_HEADS)[:, None]
    kv_mask = kv_heads < NUM_KV_HEADS
    keys = new_key_ptr + token * new_key_token_stride + kv_heads * new_key_head_stride
    key_first, key_second = _load_pairs(keys, kv_mask, HALF, PAIRS, INTERLEAVED)
    values = new_value_ptr + token * new_value_token_stride + kv_heads * new_value_head_stride
    columns = tl.arange(0, COLUMNS)[None, :]
    value_mask = kv_mask & (columns < HEAD_SIZE)
    value = tl.load(values + columns, mask=value_mask)

    known = (position >= 0) & (position < num_positions)
    pairs = tl.arange(0, PAIRS)[None, :]
    angles = cos_sin_ptr + tl.where(known, position, 0) * position_stride + pairs
    cos = tl.load(angles, mask=pairs < HALF).to(tl.float32)
    sin = tl.load(angles + HALF, mask=pairs < HALF).to(tl.float32)
    cos = tl.where(known, cos, float("nan"))
    sin = tl.where(known, sin, float("nan"))

    outs = out_ptr + token * out_token_stride + query_heads * out_head_stride
    out_dtype = out_ptr.dtype.element_ty
    first, second = _turn(query_first, query_second, cos, sin)
    _store_pairs(
        outs, first.to(out_dtype), second.to(out_dtype), query_mask, HALF, PAIRS, INTERLEAVED
    )
    rest = 2 * HALF + tl.arange(0, REST)[None, :]
    if 2 * HALF < HEAD_SIZE and not IN_PLACE:
        mask = query_mask & (rest < HEAD_SIZE)
        tl.store(outs + rest, tl.load(queries + rest, mask=mask), mask=mask)

    if (slot >= 0) & (slot < num_slots):
        place = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * token_stride
        places = place + kv_heads.to(tl.int64) * kv_head_stride
        dtype = key_ptr.dtype.element_ty
        x, y = _turn(key_first, key_second, cos, sin)
        written = key_ptr + places
        _store_pairs(
            written,
            to_cache(x, key_scale_ptr, kv_heads, kv_mask, dtype, HARDWARE),
            to_cache(y, key_scale_ptr, kv_heads, kv_mask, dtype, HARDWARE),
            kv_mask, HALF, PAIRS, INTERLEAVED,
        )  # fmt: skip
        if 2 * HALF < HEAD_SIZE:
            kept = tl.load(keys + rest, mask=kv_mask & (rest < HEAD_SIZE))
            kept = to_cache(kept, key_scale_ptr, kv_heads, kv_mask, dtype, HARDWARE)
            tl.store(written + rest, kept, mask=kv_mask & (rest < HEAD_SIZE))
        rounded = to_cache(value, value_scale_ptr, kv_heads, kv_mask, dtype, HARDWARE)
        tl.store(value_ptr + places + columns, rounded, mask=value_mask)


def launch_rotary_write(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: LayerCache,
    slots: torch.Tensor,
    positions: torch.Tensor,
    rotary: Rotary,
    out: torch.Tensor,
) -> None:
    """Launch one program a token, or several where Q has more than 2048 elements.

    Args:
        query: [num_tokens, num_query_heads, head_size].
        key: [num_tokens, num_kv_heads, head_size].
        value: the same shape.
        cache: one layer's views, written.
        slots: int64 [num_tokens]; a slot outside the cache is skipped.
        positions: int32 or int64 [num_tokens].
        rotary: which angles and pairs.
        out: like `query`, written; may be `query`.

    """
    key_cache, value_cache, hardware = cache_views(cache)
    num_query_heads, head_size = query.shape[1:]
    half = rotary.rotary_size // 2
    parts = triton.cdiv(num_query_heads * head_size, _QUERY_ELEMENTS)
    parts = min(parts, max(num_query_heads, cache.num_kv_heads))
    query_heads = triton.next_power_of_2(triton.cdiv(num_query_heads, parts))
    kv_heads = triton.next_power_of_2(triton.cdiv(cache.num_kv_heads, parts))
    parts = max(
        triton.cdiv(num_query_heads, query_heads), triton.cdiv(cache.num_kv_heads, kv_heads)
    )
    columns = triton.next_power_of_2(head_size)
    _rotary_write_kernel[(len(slots), parts)](
        query,
        out,
        key,
        value,
        key_cache,
        value_cache,
        cache.key_scale,
        cache.value_scale,
        slots,
        positions,
        rotary.cos_sin,
        cache.num_slots,
        rotary.num_positions,
        *query.stride()[:2],
        *out.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        *key_cache.stride()[:3],
        rotary.cos_sin.stride(0),
        NUM_QUERY_HEADS=num_query_heads,
        NUM_KV_HEADS=cache.num_kv_heads,
        BLOCK_SIZE=cache.block_size,
        HEAD_SIZE=head_size,
        HALF=half,
        INTERLEAVED=rotary.interleaved,
        IN_PLACE=out.data_ptr() == query.data_ptr(),
        HARDWARE=hardware,
        QUERY_HEADS=query_heads,
        KV_HEADS=kv_heads,
        PAIRS=triton.next_power_of_2(half),
        REST=triton.next_power_of_2(max(1, head_size - 2 * half)),
        COLUMNS=columns,
        num_warps=max(1, min(8, query_heads * columns // 512)),
    )
