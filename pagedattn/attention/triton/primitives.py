"""What the attention kernels share: a tile through the page table, its scores, one softmax step.

Options that a call does not use arrive as None, which Triton takes for a compile-time constant: the
code for them vanishes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from pagedattn.attention.call import AttentionCall

LOG2_E = 1.4426950408889634
_LOG2_E = tl.constexpr(LOG2_E)
_LN_2 = tl.constexpr(0.6931471805599453)
FAR_CAP = 1000.0
"""Above it a soft cap is far, over float32 any: tanh by an exponential errs by some units in the
last place of the cap, which is much of a score far below it."""


def option_arguments(call: AttentionCall) -> dict[str, Any]:
    """Arguments of the attention kernels for what a call asks beyond plain attention."""
    return {
        "key_scale_ptr": call.cache.key_scale,
        "value_scale_ptr": call.cache.value_scale,
        "lse_ptr": call.lse,
        "window": call.window,
        "soft_cap": None if call.soft_cap is None else float(call.soft_cap),
        "IS_FAR_CAP": call.soft_cap is not None
        and (call.soft_cap > FAR_CAP or call.query.dtype == torch.float32),
        "slopes_ptr": call.alibi_slopes,
        "sinks_ptr": call.sinks,
    }


def dot_precision(dtype: torch.dtype) -> str:
    """Float32 inputs are multiplied in full precision, not as tf32."""
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def first_key_seen(kv_length, num_queries, window):
    """First token that any of a sequence's queries sees: 0 without a window.

    Worked example: 40 tokens, the last 3 of them queries, a window of 8: the first query is token
    37 and sees the tokens 30 to 37.
    """
    first = 0
    if window is not None:
        first = tl.maximum(kv_length - num_queries - window + 1, 0)
    return first


@triton.jit
def load_kv_tile(
    key_ptr,
    value_ptr,
    table_ptr,
    tile_start,
    first_key,
    kv_length,
    block_stride,
    token_stride,
    DTYPE: tl.constexpr,
    WINDOWED: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
):
    """Load `TILE_TOKENS` tokens' K and V of one head, beginning at token `tile_start`.

    `key_ptr` and `value_ptr` point at the head's part of block 0; `table_ptr` at the sequence's
    block table. Tokens from `kv_length` on are not read, nor are their table entries; they come
    back as zeros, so that whatever lies in unused slots (NaN too) stays out of the products. If
    WINDOWED the same holds for tokens before `first_key`, whose blocks may be another's by now.

    Worked example, block size 16: token 37 is in logical block 37 // 16 = 2, offset 5; with
    table entry 9 it lies at `9 * block_stride + 5 * token_stride`.

    Returns [TILE_TOKENS, HEAD_TILE] K and V in DTYPE; columns from HEAD_SIZE on are zeros. What
    fp8 stores is exact in 16 bits; the scales are left to the caller.
    """
    tokens = tile_start + tl.arange(0, TILE_TOKENS)
    held = tokens < kv_length
    if WINDOWED:
        held = held & (tokens >= first_key)
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
    return key.to(DTYPE), value.to(DTYPE)


@triton.jit
def tile_scores(
    query,
    key,
    tokens,
    own,
    scale_log2,
    soft_cap,
    slopes,
    IS_FAR_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores of a tile in units of log2, before the mask; float32 [rows, tokens].

    query [rows, HEAD_TILE], key [tokens, HEAD_TILE]; `tokens` [tokens] and `own` [rows] are their
    positions, `slopes` [rows] ALiBi's in units of log2. `scale_log2` is log2(e) times the scale of
    the scores, and that of the keys.

    The soft cap's tanh(x) is taken as 2 / (1 + exp(-2x)) - 1 for x >= 0, and mirrored: right to a
    few units in the last place of the cap, and without overflow. Under a cap far above the scores,
    IS_FAR_CAP, small x would lose their own places by it: their series ends within 4e-7 of them.
    """
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    if soft_cap is None:
        scores = scores * scale_log2
    else:
        steep = scores * (2.0 * scale_log2 / soft_cap)
        bounded = 2.0 / (1.0 + tl.exp2(-tl.abs(steep))) - 1.0
        bounded = tl.where(steep < 0, -bounded, bounded)
        if IS_FAR_CAP:
            x = steep * (_LN_2 / 2)
            square = x * x
            series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 - square * (17.0 / 315))))
            bounded = tl.where(tl.abs(x) < 0.25, series, bounded)
        scores = soft_cap * _LOG2_E * bounded
    if slopes is not None:
        scores += slopes[:, None] * (tokens[None, :] - own[:, None]).to(tl.float32)
    return scores


@triton.jit
def is_visible(tokens, own, window):
    """Causal mask, and the window's; bool [rows, tokens]."""
    visible = tokens[None, :] <= own[:, None]
    if window is not None:
        visible = visible & (tokens[None, :] > own[:, None] - window)
    return visible


@triton.jit
def softmax_step(
    scores, value, visible, acc, peak, total, MASKED: tl.constexpr, PRECISION: tl.constexpr
):
    """One step of online softmax: fold a tile's scores and values into the running result.

    scores and visible [rows, tokens] (`visible` used if MASKED), value [tokens, HEAD_TILE]. `acc`
    [rows, HEAD_TILE] is the sum of weighted values, `peak` [rows] the largest score so far in units
    of log2, `total` [rows] the sum of weights; all float32. A row that has seen no key keeps
    peak = -inf, total = 0.

    Source: Milakov and Gimelshein 2018 (online softmax), FlashAttention-2 §3.1 for the order.
    """
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


@triton.jit
def join_sinks(peak, total, sinks):
    """Add sinks, in units of log2, to the denominators.

    Returns the new peak and total, and the factor that the weighted values decay by; all in the
    shape of `peak`.
    """
    new_peak = tl.maximum(peak, sinks)
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    decay = tl.exp2(peak - shift)
    return new_peak, total * decay + tl.exp2(sinks - shift), decay


@triton.jit
def natural_lse(peak, total):
    """Log-sum-exp in natural units; -inf where the total is 0."""
    log2 = peak + tl.log2(tl.where(total == 0, 1.0, total))
    return tl.where(total == 0, float("-inf"), log2 * _LN_2)
