"""How the prefill kernel is cut: tiles, stages, heads worked on together, shares of keys.

A program works through tiles of keys whole. Large tiles take less time for each key, and of small
ones fewer keys are multiplied in vain, at a window's edges and on the diagonal. Over heads of 64
registers suffice for three warpgroups, which take less time for each row than two. Two have smaller
tiles of queries: of few queries more programs have one, and none has much more than others.
`cut_of` estimates what each takes.
"""

from __future__ import annotations

import math
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
# of the usual cut's time, that another one is estimated to save where it is chosen
LEAST_GAIN = 0.03
LEAST_LONG_GAIN = 0.07  # from LONG_SECONDS on
LONG_SECONDS = 1e-4
EVEN = 0.7  # of the most tiles of keys that an item sees: if the mean is more, all take as long
# the following estimate what sharing keys out saves and costs on an H100
PRODUCT_RATE = 7e14  # operations a second of all programs
MERGE_SECONDS = 3e-6  # of a launch that merges, besides its bytes
MERGE_RATE = 2e12  # bytes a second of results in float32, written and read


@dataclass(frozen=True)
class Cut:
    """How large tiles are.

    Attributes:
        warpgroups: that multiply, 64 rows each: query tokens times heads of a group.
        kv_tile: tokens of a tile of keys.

    """

    warpgroups: int
    kv_tile: int

    @property
    def rows(self) -> int:
        """Rows of a tile of queries."""
        return 64 * self.warpgroups


@dataclass(frozen=True)
class Price:
    """What a program takes for an item, a tile of queries of one KV head.

    Attributes:
        item: seconds for what does not depend on keys.
        tile: seconds for each tile of keys.

    """

    item: float
    tile: float


# Fitted to times of 91 batches of prompts, chunks and windows on an H200, of 1 to 8 query heads a
# KV head; few were in heads of 80 and 96, or over fp8.
_SMALL_HEADS = {
    Cut(3, 128): Price(1.78e-6, 1.37e-6),
    Cut(2, 128): Price(1.20e-6, 1.12e-6),
    Cut(3, 64): Price(1.47e-6, 0.78e-6),
    Cut(2, 64): Price(1.17e-6, 0.58e-6),
}
_HEADS_UP_TO_128 = {
    Cut(2, 128): Price(1.95e-6, 1.40e-6),
    Cut(2, 64): Price(1.40e-6, 0.74e-6),
}


def usual_cut(call: AttentionCall) -> Cut:
    """Return the cut for many long queries over many keys.

    Small heads leave registers for a third warpgroup, which multiplies while the softmax of the
    others, as long there as the products, runs. Parts of shared blocks are cut for tiles of two.
    """
    cache = call.cache
    has_third = cache.head_size <= 64 and call.causal and cache.dtype != FP8
    return Cut(3 if has_third else 2, 128 if cache.head_size <= 128 else 64)


def prices_of(call: AttentionCall) -> dict[Cut, Price]:
    """Return the cuts that a call can have if its keys are not shared out, and their prices.

    None have prices but those of `causal` calls in heads of up to 128.
    """
    usual, cache = usual_cut(call), call.cache
    if not call.causal or cache.head_size > 128:
        return {}
    group = call.query.shape[1] // cache.num_kv_heads
    prices = _SMALL_HEADS if cache.head_size <= 64 else _HEADS_UP_TO_128
    return {
        cut: price
        for cut, price in prices.items()
        if group <= cut.rows and cut.warpgroups <= usual.warpgroups
    }


def cut_of(call: AttentionCall, num_programs: int, mixture: Mixture | None = None) -> Cut:
    """Choose the cut that is estimated to take the least time, from bounds that the host knows.

    It is another than the usual one where that takes longer by more than estimates are off.

    Args:
        call: of the launch, whose keys are not shared out.
        num_programs: that run at once.
        mixture: of the batch, if its long queries alone are taken.

    """
    usual = usual_cut(call)
    seconds = {
        cut: Items.of(call, num_programs, mixture, cut).seconds_at(price)
        for cut, price in prices_of(call).items()
    }
    if not seconds:
        return usual
    best = min(seconds, key=seconds.__getitem__)
    least_gain = LEAST_GAIN if seconds[usual] < LONG_SECONDS else LEAST_LONG_GAIN
    return best if seconds[best] < (1 - least_gain) * seconds[usual] else usual


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
    # 1024: the tiles begin at a multiple of it; 256: items and barriers
    return 1024 + of_queries + of_tiles + 256


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
        kv_tiles: tiles of keys that each sees at most, where a window begins with a tile.
        mean_kv_tiles: tiles of keys that an item of the longest sequence sees on average.
        tile_seconds: that a program multiplies for one of these.
        num_programs: that run at once.
        is_chunk: whether all see most of the keys; a prompt's see fewer the earlier they are.

    """

    count: int
    kv_tiles: int
    mean_kv_tiles: float
    tile_seconds: float
    num_programs: int
    is_chunk: bool

    @classmethod
    def of(
        cls,
        call: AttentionCall,
        num_programs: int,
        mixture: Mixture | None = None,
        cut: Cut | None = None,
    ) -> Items:
        """Count a launch's; arguments as those of `splits_of`, and the cut if not the usual one."""
        cache, batch, num_tokens = call.cache, call.batch, call.query.shape[0]
        cut = usual_cut(call) if cut is None else cut
        longest, kv_length = max(1, batch.max_query_length), batch.expected_kv_length
        num_sequences = batch.num_sequences
        if mixture is not None:
            longest, kv_length = mixture.most_long_queries, mixture.longest_long_kv
            num_sequences, num_tokens = mixture.num_long, mixture.long_query_tokens
        tokens_a_tile = cut.rows // (call.query.shape[1] // cache.num_kv_heads)
        num_tiles = num_sequences * -(-longest // tokens_a_tile)
        num_tiles = min(num_tiles, num_tokens // tokens_a_tile + num_sequences)
        seen = kv_length
        if call.window is not None:
            seen = min(seen, call.window + tokens_a_tile)
        return cls(
            count=num_tiles * cache.num_kv_heads,
            kv_tiles=-(-seen // cut.kv_tile),
            mean_kv_tiles=_mean_tiles(
                kv_length - longest, kv_length, call.window, tokens_a_tile, cut.kv_tile
            ),
            tile_seconds=4 * cut.rows * cut.kv_tile * cache.head_size * num_programs / PRODUCT_RATE,
            num_programs=num_programs,
            is_chunk=2 * longest <= kv_length,
        )

    def seconds(self, splits: int) -> float:
        """Estimate how many seconds multiplying takes if keys are shared among so many."""
        rounds = -(-self.count * splits // self.num_programs)
        return rounds * -(-self.kv_tiles // splits) * self.tile_seconds

    def seconds_at(self, price: Price) -> float:
        """Estimate how many seconds programs take at a cut's price, without shares.

        If items take about as long as each other, who has one more of them takes that longer. Else
        the longest are drawn first and the shortest even programs out. Where programs have one item
        or two, the shortest of all goes to who had the shortest of the first ones.
        """
        mean = price.item + price.tile * self.mean_kv_tiles
        each = self.count / self.num_programs
        if self.mean_kv_tiles >= EVEN * self.kv_tiles:
            return math.ceil(each) * mean
        most = price.item + price.tile * self.kv_tiles
        if 1 < each < 2:
            two = 2 * price.item + price.tile * (1 + self.kv_tiles * (2 - 2 / each))
            most = max(most, two)
        return max(most, each * mean)


def _mean_tiles(first: int, last: int, window: int | None, tokens: int, kv_tile: int) -> float:
    """Return how many tiles of keys a tile of queries sees, on average over a sequence's.

    Args:
        first: keys before the sequence's first query; less than 0 is 0.
        last: keys that its last query sees without a window; less than 1 is 1.
        window: keys that a query sees at most; None is all.
        tokens: of a tile of queries.
        kv_tile: tokens of a tile of keys.

    """
    first, last = max(0, first), max(1, last)
    count = -(-(last - first) // tokens)
    # up to the last key that each sees; the last tile of queries may not be full
    seen = _sum_of_quotients(count - 1, first + tokens + kv_tile - 1, tokens, kv_tile)
    seen += -(-last // kv_tile)
    if window is not None:
        # those from whose window on keys are hidden
        begun = max(0, -(-(window - 1 - first) // tokens))
        hidden = first + begun * tokens + 1 - window
        if begun < count:
            seen -= _sum_of_quotients(count - begun, hidden, tokens, kv_tile)
    return seen / count


def _sum_of_quotients(count: int, start: int, step: int, divisor: int) -> int:
    """Return the sum of `(start + i * step) // divisor` over i below `count`, as by Euclid.

    Whole multiples of the divisor in `start` and `step` are summed at once; what is left is the
    same sum with step and divisor exchanged, of as many terms as the largest quotient has.
    """
    total = 0
    while True:
        total += count * (count - 1) // 2 * (step // divisor) + count * (start // divisor)
        step, start = step % divisor, start % divisor
        largest = step * count + start
        if largest < divisor:
            return total
        count, start = divmod(largest, divisor)
        step, divisor = divisor, step


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
    if not call.causal or not items.is_chunk:
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
        ("GROUP", query.shape[1] // cache.num_kv_heads),
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
