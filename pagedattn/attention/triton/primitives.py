"""What the attention kernels share: loading a tile through the page table, one softmax step."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_kv_tile(
    key_ptr,
    value_ptr,
    table_ptr,
    tile_start,
    kv_length,
    block_stride,
    token_stride,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
):
    """Load `TILE_TOKENS` tokens' K and V of one head, beginning at token `tile_start`.

    `key_ptr` and `value_ptr` point at the head's part of block 0; `table_ptr` at the sequence's
    block table. Tokens from `kv_length` on are not read, nor are their table entries; they come
    back as zeros, so that whatever lies in unused slots (NaN too) stays out of the products.

    Worked example, block size 16: token 37 is in logical block 37 // 16 = 2, offset 5; with
    table entry 9 it lies at `9 * block_stride + 5 * token_stride`.

    Returns [TILE_TOKENS, HEAD_TILE] K and V; columns from HEAD_SIZE on are zeros.
    """
    tokens = tile_start + tl.arange(0, TILE_TOKENS)
    held = tokens < kv_length
    blocks = tl.load(table_ptr + tokens // BLOCK_SIZE, mask=held, other=0)
    # 64 bits: a pool may have more than 2**31 elements
    places = blocks.to(tl.int64) * block_stride + (tokens % BLOCK_SIZE) * token_stride
    columns = tl.arange(0, HEAD_TILE)
    offsets = places[:, None] + columns[None, :]
    if HEAD_TILE == HEAD_SIZE:
        mask = held[:, None]
    else:
        mask = held[:, None] & (columns < HEAD_SIZE)[None, :]
    key = tl.load(key_ptr + offsets, mask=mask, other=0.0)
    value = tl.load(value_ptr + offsets, mask=mask, other=0.0)
    return key, value


@triton.jit
def softmax_step(
    query,
    key,
    value,
    visible,
    scale_log2,
    acc,
    peak,
    total,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of online softmax: fold a tile's keys and values into the running result.

    query [rows, HEAD_TILE], key and value [tokens, HEAD_TILE], visible [rows, tokens] (used if
    MASKED). `acc` [rows, HEAD_TILE] is the sum of weighted values, `peak` [rows] the largest
    score so far in units of log2, `total` [rows] the sum of weights; all float32. A row that has
    seen no key keeps peak = -inf, total = 0.

    Source: Milakov and Gimelshein 2018 (online softmax), FlashAttention-2 §3.1 for the order.
    """
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale_log2
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    # -inf - -inf is NaN: a row without keys so far is shifted by 0 instead
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(peak - shift)
    total = total * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None]
    acc = tl.dot(weights.to(value.dtype), value, acc, input_precision=PRECISION)
    return acc, new_peak, total
