"""How the prefill kernel describes queries, K and V to the TMA."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pagedattn.attention.cuda.decode_fits import fit_for
from pagedattn.attention.cuda.module import tensor_map

if TYPE_CHECKING:
    import torch

    from pagedattn.attention.cuda.module import TensorMap


def map_of_queries(query: torch.Tensor, tile: tuple[int, int, int]) -> TensorMap:
    """Describe the queries: columns, heads of a group, tokens, groups.

    A box is 64 columns of some tokens and heads of a group; heads past its end are zeros.

    Args:
        query: [num_tokens, num_heads, head_size].
        tile: its tokens, its heads, and the query heads of a KV head, a group.

    """
    tokens, heads, group = tile
    num_tokens, num_heads, head_size = query.shape
    token_stride, head_stride = (2 * stride for stride in query.stride()[:2])
    return tensor_map(
        query.data_ptr(),
        2,
        (head_size, group, num_tokens, num_heads // group),
        (head_stride, token_stride, group * head_stride),
        (64, heads, tokens, 1),
        128,
        fit_for(query.device).fetched_bytes,
    )


def map_of(part: torch.Tensor, cut: tuple[int, bool]) -> TensorMap:
    """Describe K or V in octets, 8 tokens of one head.

    Octets of all blocks are numbered through: octet o of block b is number
    `b * octets_of_a_block + o`, where `octets_of_a_block` is the block stride in octets. Block 3's
    tokens 8 to 15 of a layer's view of a cache with 8 heads of block size 16, K and V together,
    are in octet 3 * (2 * 8 * 16 / 8) + 1 = 97.

    Args:
        part: K or V of a layer.
        cut: tokens of a tile of keys, and whether fp8 is multiplied: then a box is 128 columns,
            as the matrix units read them.

    """
    tile, fp8_products = cut
    num_blocks, num_kv_heads, block_size, head_size = part.shape
    size = part.element_size()
    block_stride, head_stride, token_stride = (size * stride for stride in part.stride()[:3])
    octets = (num_blocks - 1) * (block_stride // (8 * token_stride)) + block_size // 8
    moved = min(block_size, tile) // 8
    fetched_bytes = fit_for(part.device).fetched_bytes
    if size == 1:
        return tensor_map(
            part.data_ptr(),
            1,
            (head_size, 8, octets, num_kv_heads),
            (token_stride, 8 * token_stride, head_stride),
            (128 if fp8_products else head_size, 8, moved, 1),
            128 if fp8_products else 16,
            fetched_bytes,
        )
    if head_size % 64:
        return tensor_map(
            part.data_ptr(),
            2,
            (head_size, 8, octets, num_kv_heads),
            (token_stride, 8 * token_stride, head_stride),
            (64, 8, moved, 1),
            128,
            fetched_bytes,
        )
    return tensor_map(
        part.data_ptr(),
        2,
        (64, 8, head_size // 64, octets, num_kv_heads),
        (token_stride, 128, 8 * token_stride, head_stride),
        (64, 8, head_size // 64, moved, 1),
        128,
        fetched_bytes,
    )
