"""Which cut of the prefill kernel a call has, and how many shares of keys: what takes least time.

A program works through tiles of keys whole. Large tiles take less time for each key, and of small
ones fewer keys are multiplied in vain, at a window's edges and on the diagonal. Over heads of 64
registers suffice for three warpgroups, which take less time for each row than two. Two have smaller
tiles of queries: of few queries more programs have one, and none has much more than others.

Of 48 heads two tokens fill three quarters of 128 rows; three parts of 16 heads, of eight tokens
each, fill them all. But so many tokens see more keys, on the diagonal, which the first of them do
not.

The host knows bounds alone: of sequences of several lengths, all are taken to be as the longest.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pagedattn.attention.cuda.prefill_config import Cut, group_of, usual_cut
from pagedattn.attention.triton.parts import parts_at_once

if TYPE_CHECKING:
    from pagedattn.attention.call import AttentionCall
    from pagedattn.attention.mixture import Mixture

MAX_SPLITS = 64
# of the usual cut's time, that another one is estimated to save where it is chosen
LEAST_GAIN = 0.03
LEAST_LONG_GAIN = 0.07  # from LONG_SECONDS on
LONG_SECONDS = 1e-4
LEAST_FILLED = 0.01  # of a tile's rows, that more parts of heads fill,
LEAST_GAIN_OF_PARTS = 0.01  # and of the time, that they are estimated to save
EVEN = 0.7  # of the most tiles of keys that an item sees: if the mean is more, all take as long
ITEM_SECONDS = 2e-6  # of an item for which no price is fitted, besides its tiles of keys
PRODUCT_RATE = 7e14  # operations a second of all programs, for these
# the following estimate what merging shares of keys costs
MERGE_SECONDS = 3e-6  # of a launch that merges, besides its bytes,
MERGE_TRIP_SECONDS = 0.6e-6  # and more for each time that it reads shares, but the first
MERGE_RATE = 2e12  # bytes a second of results in float32, written and read


@dataclass(frozen=True)
class Price:
    """What a program takes for an item, a tile of queries of a KV head or of a part of it.

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


def prices_of(call: AttentionCall) -> dict[Cut, Price]:
    """Return the cuts that a call can have if its keys are not shared out, and their prices.

    None have prices but those of `causal` calls in heads of up to 128. A cut into more parts of
    heads than these has the same price.
    """
    head_size = call.cache.head_size
    if not call.causal or head_size > 128:
        return {}
    return _prices(head_size <= 64, usual_cut(call).warpgroups, group_of(call))


@functools.cache
def _prices(is_small: bool, most_warpgroups: int, group: int) -> dict[Cut, Price]:
    return {
        replace(cut, head_parts=-(-group // cut.rows)): price
        for cut, price in (_SMALL_HEADS if is_small else _HEADS_UP_TO_128).items()
        if cut.warpgroups <= most_warpgroups
    }


def head_parts_of(group: int, rows: int) -> tuple[int, ...]:
    """Return into how many parts heads may be divided: fewest first, each fills tiles better.

    Args:
        group: query heads of a KV head.
        rows: of a tile.

    """
    found, most = [], 0.0
    for heads in range(min(group, rows), 0, -1):
        parts = -(-group // heads)
        filled = group * (rows // heads) / (parts * rows)
        if heads == -(-group // parts) and filled > most + LEAST_FILLED:
            found.append(parts)
            most = filled
    return tuple(found)


def ways_to_divide(call: AttentionCall, cut: Cut) -> tuple[Cut, ...]:
    """Return a cut with each number of parts of heads that a call can have, fewest first.

    Where queries see all keys, only the cut itself.
    """
    return _ways(cut, group_of(call)) if call.causal else (cut,)


@functools.cache
def _ways(cut: Cut, group: int) -> tuple[Cut, ...]:
    return tuple(replace(cut, head_parts=parts) for parts in head_parts_of(group, cut.rows))


@dataclass(frozen=True)
class Items:
    """What programs draw, a tile of queries of some heads each, from bounds that the host knows.

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
        mixture: Mixture | None,
        cut: Cut,
    ) -> Items:
        """Count a launch's; arguments as those of `splits_of`, and its cut."""
        cache, batch, num_tokens = call.cache, call.batch, call.query.shape[0]
        longest, kv_length = max(1, batch.max_query_length), batch.expected_kv_length
        num_sequences = batch.num_sequences
        if mixture is not None:
            longest, kv_length = mixture.most_long_queries, mixture.longest_long_kv
            num_sequences, num_tokens = mixture.num_long, mixture.long_query_tokens
        tokens_a_tile = cut.tokens(group_of(call))
        num_tiles = num_sequences * -(-longest // tokens_a_tile)
        num_tiles = min(num_tiles, num_tokens // tokens_a_tile + num_sequences)
        seen = kv_length
        if call.window is not None:
            seen = min(seen, call.window + tokens_a_tile)
        return cls(
            count=num_tiles * cache.num_kv_heads * cut.head_parts,
            kv_tiles=-(-seen // cut.kv_tile),
            mean_kv_tiles=_mean_tiles(
                kv_length - longest, kv_length, call.window, tokens_a_tile, cut.kv_tile
            ),
            tile_seconds=4 * cut.rows * cut.kv_tile * cache.head_size * num_programs / PRODUCT_RATE,
            num_programs=num_programs,
            is_chunk=2 * longest <= kv_length,
        )

    def seconds(self, splits: int) -> float:
        """Estimate how many seconds all items take if keys are shared among so many."""
        rounds = -(-self.count * splits // self.num_programs)
        return rounds * (ITEM_SECONDS + -(-self.kv_tiles // splits) * self.tile_seconds)

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


def divided(
    call: AttentionCall,
    num_programs: int,
    mixture: Mixture | None,
    cut: Cut,
    *,
    price: Price | None = None,
    splits: int = 1,
) -> tuple[Cut, float]:
    """Choose into how many parts a cut divides heads.

    Args:
        call: of the launch.
        num_programs: that run at once.
        mixture: of the batch, if its long queries alone are taken.
        cut: whose `head_parts` are replaced.
        price: of the cut, if one is fitted.
        splits: shares of each tile's keys.

    Returns:
        The cut, and how many seconds it is estimated to take, without merging.

    """
    chosen, least = cut, math.inf
    for way in ways_to_divide(call, cut):
        items = Items.of(call, num_programs, mixture, way)
        if splits > 1:
            seconds = items.seconds(splits)
        else:
            seconds = items.seconds_at(price or Price(ITEM_SECONDS, items.tile_seconds))
        if seconds < (1 - LEAST_GAIN_OF_PARTS) * least:
            chosen, least = way, seconds
    return chosen, least


def cut_of(call: AttentionCall, num_programs: int, mixture: Mixture | None = None) -> Cut:
    """Choose the cut that is estimated to take the least time, from bounds that the host knows.

    Its tiles are others than the usual ones where these take longer by more than estimates are off.

    Args:
        call: of the launch, whose keys are not shared out.
        num_programs: that run at once.
        mixture: of the batch, if its long queries alone are taken.

    """
    usual = usual_cut(call)
    prices: dict[Cut, Price | None] = {**prices_of(call)} or {usual: None}
    estimates = {
        cut: divided(call, num_programs, mixture, cut, price=price) for cut, price in prices.items()
    }
    chosen, usual_seconds = estimates[usual]
    best, seconds = min(estimates.values(), key=lambda estimate: estimate[1])
    least_gain = LEAST_GAIN if usual_seconds < LONG_SECONDS else LEAST_LONG_GAIN
    return best if seconds < (1 - least_gain) * usual_seconds else chosen


def merge_seconds(call: AttentionCall, splits: int) -> float:
    """Estimate how many seconds merging takes.

    Args:
        call: of the launch; all of its output is merged.
        splits: shares of each tile's keys; 1 are not merged.

    """
    if splits == 1:
        return 0.0
    trips = (splits - 2) // parts_at_once(call.cache.head_size)
    written = 8 * call.out.numel() * splits
    return MERGE_SECONDS + trips * MERGE_TRIP_SECONDS + written / MERGE_RATE


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
    ways = [
        Items.of(call, num_programs, mixture, way) for way in ways_to_divide(call, usual_cut(call))
    ]
    if not call.causal or not ways[0].is_chunk:
        return 1
    if min(items.count for items in ways) >= 2 * num_programs:
        return 1  # who is done first takes what is left
    return min(
        _fewest_splits(ways[0].kv_tiles),
        key=lambda splits: (
            min(items.seconds(splits) for items in ways) + merge_seconds(call, splits)
        ),
    )


@functools.cache
def _fewest_splits(kv_tiles: int) -> list[int]:
    """Return for each number of tiles of keys that a share may have the fewest shares."""
    found, each = [1], kv_tiles
    while each > 1 and (splits := -(-kv_tiles // (each - 1))) <= MAX_SPLITS:
        found.append(splits)
        each = -(-kv_tiles // splits)
    return found
