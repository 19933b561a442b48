"""Gather queries for parts of attention, and merge the parts' results.

Bytes of the gather: a row's queries, read and written. Of the merge: each partial result once, in
float32, and the output. Limit: the memory, or the L2 where the parts are small and just written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from pagedattn.attention.triton.primitives import LOG2_E, join_sinks, natural_lse

if TYPE_CHECKING:
    from pagedattn.attention.call import AttentionCall

_LOG2_E = tl.constexpr(LOG2_E)
GATHER_ELEMENTS = 2048


@triton.jit
def _gather_kernel(
    out_ptr,
    query_ptr,
    rows_ptr,
    num_heads,
    token_stride,
    head_stride,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Copy HEADS heads of one row. Grid: [num_rows, heads / HEADS]. Rows of -1 are left alone."""
    row = tl.program_id(0)
    token = tl.load(rows_ptr + row).to(tl.int64)
    if token >= 0:
        heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
        columns = tl.arange(0, HEAD_TILE)
        mask = (heads < num_heads)[:, None] & (columns < HEAD_SIZE)[None, :]
        query = tl.load(
            query_ptr + token * token_stride + heads[:, None] * head_stride + columns[None, :],
            mask=mask,
        )
        places = (row.to(tl.int64) * num_heads + heads) * HEAD_SIZE
        tl.store(out_ptr + places[:, None] + columns[None, :], query, mask=mask)


def gather_rows(query: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return `query[rows]`, contiguous; rows of -1 are not written.

    Args:
        query: [num_query_tokens, num_query_heads, head_size].
        rows: int32 [num_rows].

    """
    _, num_heads, head_size = query.shape
    out = torch.empty((rows.shape[0], num_heads, head_size), dtype=query.dtype, device=query.device)
    head_tile = triton.next_power_of_2(head_size)
    heads = min(triton.next_power_of_2(num_heads), max(1, GATHER_ELEMENTS // head_tile))
    _gather_kernel[(rows.shape[0], triton.cdiv(num_heads, heads))](
        out,
        query,
        rows,
        num_heads,
        query.stride(0),
        query.stride(1),
        HEAD_SIZE=head_size,
        HEAD_TILE=head_tile,
        HEADS=heads,
        num_warps=4,
    )
    return out


@triton.jit(do_not_specialize=["max_parts"])
def _merge_kernel(
    out_ptr,
    lse_ptr,
    own_ptr,
    own_lse_ptr,
    part_ptr,
    part_lse_ptr,
    parts_of_token_ptr,
    sinks_ptr,
    max_parts,
    out_token_stride,
    out_head_stride,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Merge what one query and head has. Grid: [num_query_tokens, num_query_heads].

    PARTS parts are read at a time, in order, until one is missing.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)
    place = token * num_heads + head
    columns = tl.arange(0, HEAD_TILE)
    column_mask = columns < HEAD_SIZE
    acc = tl.load(own_ptr + place * HEAD_SIZE + columns, mask=column_mask, other=0.0)
    peak = tl.load(own_lse_ptr + place) * _LOG2_E
    total = tl.where(peak == float("-inf"), 0.0, 1.0)
    acc = acc * total
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head) * _LOG2_E
        peak, total, decay = join_sinks(peak, total, sink)
        acc = acc * decay
    start = 0
    more = max_parts > 0
    while more:
        lanes = start + tl.arange(0, PARTS)
        rows = tl.load(
            parts_of_token_ptr + token * max_parts + lanes, mask=lanes < max_parts, other=-1
        ).to(tl.int64)
        used = rows >= 0
        part_places = rows * num_heads + head
        part_lse = tl.load(part_lse_ptr + part_places, mask=used, other=float("-inf")) * _LOG2_E
        part = tl.load(
            part_ptr + part_places[:, None] * HEAD_SIZE + columns[None, :],
            mask=used[:, None] & column_mask[None, :],
            other=0.0,
        )
        highest = tl.maximum(peak, tl.max(part_lse, 0))
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        decay = tl.exp2(peak - shift)
        gains = tl.exp2(part_lse - shift)
        acc = acc * decay + tl.sum(part * gains[:, None], 0)
        total = total * decay + tl.sum(gains, 0)
        peak = highest
        start += PARTS
        more = (start < max_parts) & (tl.min(rows, 0) >= 0)
    if lse_ptr is not None:
        tl.store(lse_ptr + place, natural_lse(peak, total))
    result = acc / tl.where(total == 0, 1.0, total)
    tl.store(
        out_ptr + token * out_token_stride + head * out_head_stride + columns,
        result.to(out_ptr.dtype.element_ty),
        mask=column_mask,
    )


def merge_parts(
    call: AttentionCall,
    own: tuple[torch.Tensor, torch.Tensor],
    parts: tuple[torch.Tensor, torch.Tensor],
    parts_of_token: torch.Tensor,
) -> None:
    """Write the result and the log-sum-exp in one launch; see `PartsImplementation`."""
    num_tokens, num_heads, head_size = call.out.shape
    _merge_kernel[(num_tokens, num_heads)](
        call.out,
        call.lse,
        own[0],
        own[1],
        parts[0],
        parts[1],
        parts_of_token,
        call.sinks,
        parts_of_token.shape[1],
        call.out.stride(0),
        call.out.stride(1),
        HEAD_SIZE=head_size,
        HEAD_TILE=max(16, triton.next_power_of_2(head_size)),
        PARTS=8 if head_size <= 128 else 4,
        num_warps=1,
    )
