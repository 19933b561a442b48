"""Writing K and V of a step's tokens into their slots."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from pagedattn.attention.triton.quantise import cache_views, to_cache

if TYPE_CHECKING:
    import torch

    from pagedattn.kv_cache import LayerCache


@triton.jit(do_not_specialize=["num_slots"])
def _kv_write_kernel(
    new_key_ptr,
    new_value_ptr,
    key_ptr,
    value_ptr,
    key_scale_ptr,
    value_scale_ptr,
    slots_ptr,
    num_slots,
    new_key_token_stride,
    new_key_head_stride,
    new_value_token_stride,
    new_value_head_stride,
    block_stride,
    kv_head_stride,
    token_stride,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Write all heads of one token. Grid: [num_tokens].

    K and V are loaded before the slot is known, so that the two waits for memory overlap. The
    number of elements is a compile-time constant: masked by a number of which nothing is known,
    elements would be moved two bytes at a time. With scales, elements stand in rows of one head
    each, so that a thread loads a head's scale once.

    Bytes a token: 2 * num_kv_heads * head_size elements of the new K and V read and of the cache's
    written, and 8 for the slot. Limit: the copy bandwidth.
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if key_scale_ptr is None and value_scale_ptr is None:
        elements = tl.arange(0, ELEMENTS)
        mask = elements < NUM_KV_HEADS * HEAD_SIZE
        heads = elements // HEAD_SIZE
        columns = elements % HEAD_SIZE
    else:
        heads = tl.arange(0, KV_HEADS)[:, None]
        columns = tl.arange(0, COLUMNS)[None, :]
        mask = (heads < NUM_KV_HEADS) & (columns < HEAD_SIZE)
    key = tl.load(
        new_key_ptr + token * new_key_token_stride + heads * new_key_head_stride + columns,
        mask=mask,
    )
    value = tl.load(
        new_value_ptr + token * new_value_token_stride + heads * new_value_head_stride + columns,
        mask=mask,
    )
    if (slot >= 0) & (slot < num_slots):
        place = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * token_stride
        offsets = place + heads.to(tl.int64) * kv_head_stride + columns
        dtype = key_ptr.dtype.element_ty
        known = heads < NUM_KV_HEADS
        rounded_key = to_cache(key, key_scale_ptr, heads, known, dtype, HARDWARE)
        rounded_value = to_cache(value, value_scale_ptr, heads, known, dtype, HARDWARE)
        tl.store(key_ptr + offsets, rounded_key, mask=mask)
        tl.store(value_ptr + offsets, rounded_value, mask=mask)


def launch_kv_write(
    key: torch.Tensor, value: torch.Tensor, cache: LayerCache, slots: torch.Tensor
) -> None:
    """Launch one program a token.

    Args:
        key: [num_tokens, num_kv_heads, head_size].
        value: the same shape.
        cache: one layer's views, written.
        slots: int64 [num_tokens]; a slot outside the cache is skipped.

    """
    if slots.shape[0] == 0:
        return
    key_cache, value_cache, hardware = cache_views(cache)
    elements = triton.next_power_of_2(cache.num_kv_heads * cache.head_size)
    _kv_write_kernel[(slots.shape[0],)](
        key,
        value,
        key_cache,
        value_cache,
        cache.key_scale,
        cache.value_scale,
        slots,
        cache.num_slots,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        key_cache.stride(0),
        key_cache.stride(1),
        key_cache.stride(2),
        BLOCK_SIZE=cache.block_size,
        HEAD_SIZE=cache.head_size,
        NUM_KV_HEADS=cache.num_kv_heads,
        ELEMENTS=elements,
        KV_HEADS=triton.next_power_of_2(cache.num_kv_heads),
        COLUMNS=triton.next_power_of_2(cache.head_size),
        HARDWARE=hardware,
        num_warps=max(1, min(8, elements // 256)),
    )
