"""How the prefill kernel is cut: tiles, parts of heads, stages, heads that are worked on together.

A tile has as many query tokens as there is room for with all query heads of a KV head, or with a
part of them. Which cut a call has, `prefill_choice` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pagedattn.kv_cache import FP8

if TYPE_CHECKING:
    from pagedattn.attention.call import AttentionCall

MOST_SORTED = 192  # sequences, as in prefill_shape.cuh
STAGES = 2  # tiles of K, and of V, in shared memory
SECTION_BYTES = 64 << 20  # of K and V that programs read at the same time: as much as the L2 holds


@dataclass(frozen=True)
class Cut:
    """How large tiles are.

    Attributes:
        warpgroups: that multiply, 64 rows each: query tokens times heads.
        kv_tile: tokens of a tile of keys.
        head_parts: that the query heads of a KV head are divided into, none of them empty.

    """

    warpgroups: int
    kv_tile: int
    head_parts: int = 1

    @property
    def rows(self) -> int:
        """Rows of a tile of queries."""
        return 64 * self.warpgroups

    def heads(self, group: int) -> int:
        """Return the heads of a tile, of `group` of a KV head; the last part may have less."""
        return -(-group // self.head_parts)

    def tokens(self, group: int) -> int:
        """Return the query tokens of a tile, of which a KV head has `group` query heads."""
        return self.rows // self.heads(group)


def group_of(call: AttentionCall) -> int:
    """Return how many query heads share a KV head."""
    return call.query.shape[1] // call.cache.num_kv_heads


def usual_cut(call: AttentionCall) -> Cut:
    """Return the cut for many long queries over many keys, of the fewest parts of heads.

    Small heads leave registers for a third warpgroup, which multiplies while the softmax of the
    others, as long there as the products, runs. Parts of shared blocks are cut for tiles of two.
    """
    cache = call.cache
    has_third = cache.head_size <= 64 and call.causal and cache.dtype != FP8
    warpgroups, kv_tile = 3 if has_third else 2, 128 if cache.head_size <= 128 else 64
    return Cut(warpgroups, kv_tile, -(-group_of(call) // (64 * warpgroups)))


def query_stages_of(head_size: int) -> int:
    """Return how many tiles of queries are in shared memory."""
    return 1 if head_size > 192 else 2


def shared_bytes_of(call: AttentionCall, cut: Cut, *, fp8_products: bool = False) -> int:
    """Return the bytes of shared memory that a program has, as `Shared` of prefill_shape.cuh.

    Args:
        call: of the launch.
        cut: of it.
        fp8_products: see `prefill.PrefillLaunch`.

    """
    head_size, tile = call.cache.head_size, cut.kv_tile
    padded = -(-head_size // 64) * 128  # bytes of a row of 16 bits, in pieces of 64 columns
    if fp8_products:
        # K, V as it comes, and V turned around
        of_tiles = 2 * STAGES * tile * -(-head_size // 128) * 128 + STAGES * padded * 64
    else:
        stored = 0  # bytes of a row of fp8, for each tile of K, and of V, that waits to be widened
        if call.cache.dtype == FP8:
            stored = head_size * (2 if head_size <= 64 else 1)
        of_tiles = 2 * tile * (STAGES * padded + stored)
    of_queries = query_stages_of(head_size) * cut.rows * padded
    of_sorted = 8 * (1 + MOST_SORTED)  # how many there are, and each
    # 1024: the tiles begin at a multiple of it; 256: items and barriers
    return 1024 + of_queries + of_tiles + 256 + of_sorted


def section_heads(num_kv_heads: int, head_bytes: int) -> int:
    """Return how many KV heads to work on together, so that their K and V stay in the L2.

    Args:
        num_kv_heads: KV heads; the answer divides it.
        head_bytes: bytes of one head's K and V of the longest sequence.

    """
    fitting = max(1, SECTION_BYTES // head_bytes)
    return max(n for n in range(1, min(fitting, num_kv_heads) + 1) if num_kv_heads % n == 0)


def macros_of(
    call: AttentionCall,
    cut: Cut | None = None,
    *,
    fp8_products: bool = False,
    is_split: bool = False,
    is_beside: bool = False,
) -> tuple[tuple[str, int], ...]:
    """Return what prefill.cu is specialised for.

    Args:
        call: of the launch.
        cut: None is the usual one.
        fp8_products: see `prefill.PrefillLaunch`.
        is_split: whether each tile's keys are shared out.
        is_beside: whether it begins beside the launch before; see `prefill.PrefillLaunch`.

    """
    query, cache = call.query, call.cache
    cut = usual_cut(call) if cut is None else cut
    return (
        ("HEAD_SIZE", cache.head_size),
        ("BLOCK_SIZE", cache.block_size),
        ("GROUP", group_of(call)),
        ("HEAD_PARTS", cut.head_parts),
        ("KV_TILE", cut.kv_tile),
        ("WARPGROUPS", cut.warpgroups),
        ("QUERY_STAGES", query_stages_of(cache.head_size)),
        ("BF16", int(query.dtype == torch.bfloat16)),
        ("FP8", int(cache.dtype == FP8)),
        ("FP8_PRODUCTS", int(fp8_products)),
        ("OUT_F32", int(call.out.dtype == torch.float32)),
        ("CAUSAL", int(call.causal)),
        ("SPLIT", int(is_split)),
        ("BESIDE", int(is_beside)),
        ("WINDOW", int(call.window is not None)),
        ("SOFT_CAP", int(call.soft_cap is not None)),
        ("ALIBI", int(call.alibi_slopes is not None)),
        ("SINKS", int(call.sinks is not None)),
        ("LSE", int(call.lse is not None)),
    )
