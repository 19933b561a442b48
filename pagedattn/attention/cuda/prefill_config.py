"""How the prefill kernel is cut: tiles, stages, heads worked on together, shares of keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pagedattn.kv_cache import FP8

if TYPE_CHECKING:
    from pagedattn.attention.call import AttentionCall
    from pagedattn.attention.mixture import Mixture

STAGES = 2  # tiles of K, and of V, in shared memory
SECTION_BYTES = 64 << 20  # of K and V that programs read at the same time: as much as the L2 holds
MAX_SPLITS = 16
LEAST_TILES = 4  # of keys, of a share
# the following estimate what sharing keys out saves and costs on an H100
PRODUCT_RATE = 7e14  # operations a second of all programs
MERGE_SECONDS = 3e-6  # of a launch that merges, besides its bytes
MERGE_RATE = 2e12  # bytes a second of results in float32, written and read


def warpgroups_of(call: AttentionCall) -> int:
    """Return how many warpgroups multiply, 64 rows each.

    Small heads leave registers for a third, which multiplies while the softmax of the others, as
    long there as the products, runs. Parts of shared blocks are cut for tiles of two.
    """
    cache = call.cache
    return 3 if cache.head_size <= 64 and call.causal and cache.dtype != FP8 else 2


def kv_tile_of(head_size: int) -> int:
    """Return how many tokens a tile of keys has."""
    return 128 if head_size <= 128 else 64


def query_stages_of(head_size: int) -> int:
    """Return how many tiles of queries are in shared memory."""
    return 1 if head_size > 192 else 2


def stored_stages_of(head_size: int) -> int:
    """Return how many tiles of K, and of V, wait in fp8 to be widened."""
    return 2 if head_size <= 64 else 1


def section_heads(num_kv_heads: int, head_bytes: int) -> int:
    """Return how many KV heads to work on together, so that their K and V stay in the L2.

    Args:
        num_kv_heads: KV heads; the answer divides it.
        head_bytes: bytes of one head's K and V of the longest sequence.

    """
    fitting = max(1, SECTION_BYTES // head_bytes)
    return max(n for n in range(1, min(fitting, num_kv_heads) + 1) if num_kv_heads % n == 0)


def merge_seconds(call: AttentionCall, splits: int) -> float:
    """Estimate how many seconds merging takes.

    Args:
        call: of the launch; all of its output is merged.
        splits: shares of each tile's keys; 1 are not merged.

    """
    if splits == 1:
        return 0.0
    return MERGE_SECONDS + 8 * call.out.numel() * splits / MERGE_RATE


@dataclass(frozen=True)
class Items:
    """What programs draw, a tile of queries and a KV head each, from bounds that the host knows.

    Attributes:
        count: of them, at most.
        kv_tiles: tiles of keys that each sees at most.
        tile_seconds: that a program multiplies for one of these.
        num_programs: that run at once.
        see_alike: whether all see most of the keys, as a chunk's do; a prompt's see fewer the
            earlier they are.

    """

    count: int
    kv_tiles: int
    tile_seconds: float
    num_programs: int
    see_alike: bool

    @classmethod
    def of(cls, call: AttentionCall, num_programs: int, mixture: Mixture | None = None) -> Items:
        """Count a launch's; arguments as those of `splits_of`."""
        cache, batch, num_tokens = call.cache, call.batch, call.query.shape[0]
        longest, kv_length = max(1, batch.max_query_length), batch.expected_kv_length
        num_sequences = batch.num_sequences
        if mixture is not None:
            longest, kv_length = mixture.most_long_queries, mixture.longest_long_kv
            num_sequences, num_tokens = mixture.num_long, mixture.long_query_tokens
        rows, kv_tile = 64 * warpgroups_of(call), kv_tile_of(cache.head_size)
        tokens_a_tile = rows // (call.query.shape[1] // cache.num_kv_heads)
        num_tiles = num_sequences * -(-longest // tokens_a_tile)
        num_tiles = min(num_tiles, num_tokens // tokens_a_tile + num_sequences)
        seen = kv_length
        if call.window is not None:
            seen = min(seen, call.window + tokens_a_tile)
        return cls(
            count=num_tiles * cache.num_kv_heads,
            kv_tiles=-(-seen // kv_tile),
            tile_seconds=4 * rows * kv_tile * cache.head_size / (PRODUCT_RATE / num_programs),
            num_programs=num_programs,
            see_alike=2 * longest <= kv_length,
        )

    def seconds(self, splits: int) -> float:
        """Estimate how many seconds multiplying takes if keys are shared among so many."""
        rounds = -(-self.count * splits // self.num_programs)
        return rounds * -(-self.kv_tiles // splits) * self.tile_seconds


def splits_of(call: AttentionCall, num_programs: int, mixture: Mixture | None = None) -> int:
    """Choose among how many programs a tile's keys are shared out, from bounds that the host knows.

    Few tiles over long keys leave programs without work, or some with two tiles and others with
    one. Shares are written in float32 and merged by another launch. A prompt, whose tiles see
    fewer keys the earlier they are, and parts of shared blocks are divided well as they are.

    Args:
        call: of the launch.
        num_programs: that run at once.
        mixture: of the batch, if its long queries alone are taken.

    Returns:
        1 to `MAX_SPLITS`; 1 is not to share.

    """
    items = Items.of(call, num_programs, mixture)
    if not call.causal or not items.see_alike:
        return 1
    if items.count >= 2 * num_programs:  # who is done first takes what is left
        return 1
    most = max(1, min(MAX_SPLITS, items.kv_tiles // LEAST_TILES))
    return min(
        range(1, most + 1),
        key=lambda splits: items.seconds(splits) + merge_seconds(call, splits),
    )


def macros_of(
    call: AttentionCall,
    *,
    fp8_products: bool = False,
    is_split: bool = False,
    is_beside: bool = False,
) -> tuple[tuple[str, int], ...]:
    """Return what prefill.cu is specialised for.

    Args:
        call: of the launch.
        fp8_products: see `prefill.PrefillLaunch`.
        is_split: whether each tile's keys are shared out.
        is_beside: whether it begins beside the launch before; see `prefill.PrefillLaunch`.

    """
    query, cache = call.query, call.cache
    return (
        ("HEAD_SIZE", cache.head_size),
        ("BLOCK_SIZE", cache.block_size),
        ("GROUP", query.shape[1] // cache.num_kv_heads),
        ("KV_TILE", kv_tile_of(cache.head_size)),
        ("WARPGROUPS", warpgroups_of(call)),
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
