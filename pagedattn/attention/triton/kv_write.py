"""Writing K and V of a step's tokens into their slots."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    import torch

    from pagedattn.kv_cache import LayerCache


@triton.jit(do_not_specialize=["num_slots"])
def _kv_write_kernel(
    new_key_ptr,
    new_value_ptr,
    key_ptr,
    value_ptr,
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
    NUM_ELEMENTS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """Write all heads of one token. Grid: [num_tokens].

    K and V are loaded before the slot is known, so that the two waits for memory overlap. The
    number of elements is a compile-time constant: masked by a number of which nothing is known,
    elements would be moved two bytes at a time.

    Bytes: 4 * num_kv_heads * head_size * itemsize a token (K and V, read and written), and 8
    for the slot. Limit: the copy bandwidth.
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    elements = tl.arange(0, ELEMENTS)
    mask = elements < NUM_ELEMENTS
    heads = elements // HEAD_SIZE
    columns = elements % HEAD_SIZE
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
        tl.store(key_ptr + offsets, key.to(key_ptr.dtype.element_ty), mask=mask)
        tl.store(value_ptr + offsets, value.to(value_ptr.dtype.element_ty), mask=mask)


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
    elements = triton.next_power_of_2(cache.num_kv_heads * cache.head_size)
    _kv_write_kernel[(slots.shape[0],)](
        key,
        value,
        cache.key,
        cache.value,
        slots,
        cache.num_slots,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        cache.key.stride(0),
        cache.key.stride(1),
        cache.key.stride(2),
        BLOCK_SIZE=cache.block_size,
        HEAD_SIZE=cache.head_size,
        NUM_ELEMENTS=cache.num_kv_heads * cache.head_size,
        ELEMENTS=elements,
        num_warps=max(1, min(8, elements // 256)),
    )
