"""How long the prefill kernel takes for a batch, cut in one way or another: an estimate.

A program takes some time for an item, a tile of queries of a KV head or of a part of it, and some
for each tile of keys that the item sees: less if its rows are few, so that only one warpgroup
multiplies. Programs draw the longest items first, of up to 192 sequences. So all take as long as
their mean if items are many, but no shorter than the longest item; and no shorter than the memory
takes to bring K and V.
How many items there are, and how many keys they see, follows from what the host knows of lengths:
sums over short queries and over long ones, or bounds alone. All that an estimate depends on is a
launch's `Work`, so that what is chosen by it can be kept for launches of the same.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pagedattn.attention.cuda.decode_fits import fit_for
from pagedattn.attention.cuda.prefill_config import MOST_SORTED, Cut, group_of, usual_cut
from pagedattn.attention.known_lengths import Sequences

if TYPE_CHECKING:
    from pagedattn.attention.call import AttentionCall

# Fitted, with the prices below, to times of 143 batches of drafts, chunks, prompts and mixed ones
# on an H200, drawn as `tools/check_choices.py` draws them, in heads of 64 and 128.
LAUNCH_SECONDS = 3.1e-6  # of the beginning and the end of a launch
MERGE_SECONDS = 3.3e-6  # of one more, that merges shares,
MERGE_ROW_SECONDS = 0.24e-9  # besides each query and head of who has more than one share,
MERGE_RATE = 6e12  # and bytes a second of shares in float32, written and read
UNEVEN = 0.41  # of a mean item: how much longer than the mean the last program takes
EVEN = 0.7  # of the longest item: if the mean is more, all take as long
MORE_SHARES = 0.65  # that sequences have on average, besides their tiles of keys over a share's
READING_BESIDE = 4.7  # how much of reading is hidden behind multiplying: the power of a mean
READ_FP8 = 1.3  # times as long as 16 bits take to be read, as they are widened
# not fitted: what it takes to draw a number that no item has, where sequences are not sorted
DRAW_SECONDS = 0.8e-6
# of items for which no price is fitted
ITEM_SECONDS = 2e-6
PRODUCT_RATE = 7e14  # operations a second of all programs, if a tile's rows are filled,
FEW_ROWS = 0.8  # of that time for a tile of keys, if only one warpgroup multiplies

NUM_PROGRAMS = 132
"""Of the GPUs that this was fitted to, one on each multiprocessor."""
MOST_KEYS = (1 << 30) - 1
LENGTH_BITS = 7
"""To so many significant bits the longest sequence's length is rounded up, so that a batch has the
same `Work` for some steps: by less than 128 tokens up to 16 k, by 1.6 % at most beyond."""


@dataclass(frozen=True)
class Price:
    """What a program takes for an item.

    Attributes:
        item: seconds for what does not depend on keys.
        tiles: seconds for each tile of keys, if so many warpgroups multiply: one, two, three.

    """

    item: float
    tiles: tuple[float, ...]


_SMALL_HEADS = {
    Cut(3, 128): Price(0.83e-6, (0.89e-6, 1.20e-6, 1.49e-6)),
    Cut(2, 128): Price(0.64e-6, (0.83e-6, 1.22e-6)),
    Cut(3, 64): Price(0.98e-6, (0.54e-6, 0.75e-6, 0.84e-6)),
    Cut(2, 64): Price(0.48e-6, (0.54e-6, 0.69e-6)),
}
_HEADS_UP_TO_128 = {
    Cut(2, 128): Price(2.17e-6, (1.17e-6, 1.50e-6)),
    Cut(2, 64): Price(1.18e-6, (0.75e-6, 0.88e-6)),
}


@dataclass(frozen=True)
class Work:
    """What the estimate of a launch depends on.

    Attributes:
        group: query heads of a KV head.
        num_kv_heads: KV heads.
        head_size: elements of a head.
        kv_bytes: bytes of an element of the cache; 1 is fp8.
        causal: whether a query sees no key after its own.
        window: keys that a query sees, or `MOST_KEYS`.
        usual: the cut for many long queries.
        num_tokens: rows of the output.
        num_programs: that run at once.
        read_rate: bytes a second that the memory gives.
        sequences: those of short queries and those of long ones, in tokens, as far as there are any
            and they are not passed over.

    """

    group: int
    num_kv_heads: int
    head_size: int
    kv_bytes: int
    causal: bool
    window: int
    usual: Cut
    num_tokens: int
    num_programs: int
    read_rate: float
    sequences: tuple[Sequences, ...]

    @classmethod
    def of(
        cls, call: AttentionCall, num_programs: int = NUM_PROGRAMS, *, long_only: bool = False
    ) -> Work:
        """Tell a launch's.

        The longest sequence is taken to have grown to the batch's bound, and the others with it.
        Where bounds alone are known, all sequences are taken to be as the longest.

        Args:
            call: of the launch.
            num_programs: that run at once.
            long_only: whether short queries are passed over, of which the batch knows.

        """
        cache, batch = call.cache, call.batch
        known, longest = batch.known_lengths, _rounded_up(max(1, int(batch.expected_kv_length)))
        if known is not None:
            both = (None if long_only else known.short, known.long)
            sequences = tuple(each.in_tokens(longest) for each in both if each is not None)
        else:
            count, tokens = max(1, batch.num_sequences), max(1, call.query.shape[0])
            most = max(1, batch.max_query_length)
            seen = max(1.0, longest - (most - 1) / 2)
            sequences = (Sequences(count, tokens, most, longest, longest, seen),)
        return cls(
            group=group_of(call),
            num_kv_heads=cache.num_kv_heads,
            head_size=cache.head_size,
            kv_bytes=cache.dtype.itemsize,
            causal=call.causal,
            window=MOST_KEYS if call.window is None else call.window,
            usual=usual_cut(call),
            num_tokens=call.out.shape[0],
            num_programs=num_programs,
            read_rate=fit_for(call.query.device).read_rate,
            sequences=sequences,
        )


def _rounded_up(length: int) -> int:
    unit = 1 << max(0, length.bit_length() - LENGTH_BITS)
    return -(-length // unit) * unit


def prices_of(work: Work) -> dict[Cut, Price]:
    """Return the cuts that a launch can have if its keys are not shared out, and their prices.

    None have prices but those of `causal` calls in heads of up to 128. A cut into more parts of
    heads than these has the same price.
    """
    if not work.causal or work.head_size > 128:
        return {}
    return _prices(work.head_size <= 64, work.usual.warpgroups, work.group)


@functools.cache
def _prices(is_small: bool, most_warpgroups: int, group: int) -> dict[Cut, Price]:
    return {
        replace(cut, head_parts=-(-group // cut.rows)): price
        for cut, price in (_SMALL_HEADS if is_small else _HEADS_UP_TO_128).items()
        if cut.warpgroups <= most_warpgroups
    }


def price_of(work: Work, cut: Cut) -> Price:
    """Return a cut's price, or what operations take where none is fitted."""
    if work.causal and work.head_size <= 128:
        prices = _SMALL_HEADS if work.head_size <= 64 else _HEADS_UP_TO_128
        return prices[Cut(cut.warpgroups, cut.kv_tile)]
    operations = 4 * cut.rows * cut.kv_tile * work.head_size * work.num_programs
    filled = operations / PRODUCT_RATE
    return Price(ITEM_SECONDS, (FEW_ROWS * filled, *(filled,) * (cut.warpgroups - 1)))


@dataclass(frozen=True)
class Items:
    """What programs draw for sequences of one sort: tiles of queries of some heads each.

    Attributes:
        count: of them, if keys are not shared out.
        mean_kv_tiles: tiles of keys that an item sees on average.
        most_kv_tiles: tiles of keys that an item sees at most.
        item_seconds: that a program takes for one besides its tiles of keys.
        tile_seconds: that it takes for each of these.
        are_alike: whether all items see as many keys.
        rows: queries times heads, of all of them.

    """

    count: float
    mean_kv_tiles: float
    most_kv_tiles: int
    item_seconds: float
    tile_seconds: float
    are_alike: bool
    rows: int

    @classmethod
    def of(cls, work: Work, cut: Cut, lengths: Sequences) -> Items:
        """Count a launch's.

        Args:
            work: of the launch.
            cut: of the launch.
            lengths: of the sequences, one of the work's.

        """
        tokens, heads = cut.tokens(work.group), cut.heads(work.group)
        if lengths.query_tokens == lengths.count * lengths.most_queries:
            tiles: float = lengths.count * -(-lengths.most_queries // tokens)
        else:
            tiles = lengths.query_tokens / tokens + lengths.count / 2
        more_queries = min(tokens, lengths.query_tokens / lengths.count) - 1  # of a tile
        # by a tile's last query, of which the mean of its queries sees half a tile less
        seen, more = lengths.mean_seen + more_queries / 2, 0.5  # as the last tile is seen in part
        is_cut = work.window < seen
        if is_cut:
            seen, more = work.window + more_queries, 0.75  # and the first
        most = min(lengths.most_kv, work.window + tokens)
        are_alike = lengths.are_alike and lengths.most_queries <= tokens and not is_cut
        most_tiles = max(1, math.ceil(most / cut.kv_tile))
        mean_tiles = min(most_tiles + is_cut, seen / cut.kv_tile + more)
        price = price_of(work, cut)
        used = min(cut.rows, min(tokens, lengths.most_queries) * heads)
        return cls(
            count=tiles * work.num_kv_heads * cut.head_parts,
            mean_kv_tiles=most_tiles if are_alike else mean_tiles,
            most_kv_tiles=most_tiles,
            item_seconds=price.item,
            tile_seconds=price.tiles[max(0, -(-used // 64) - 1)],
            are_alike=are_alike,
            rows=lengths.query_tokens * work.num_kv_heads * work.group,
        )

    def shares(self, share_tiles: int, splits: int) -> tuple[float, int]:
        """Return how many shares an item has, on average and at most.

        Args:
            share_tiles: tiles of keys of a share, unless that makes more than `splits` of them.
            splits: the most shares.

        """
        most = min(splits, -(-self.most_kv_tiles // share_tiles))
        if most == 1 or self.are_alike:
            return most, most
        return min(most, max(1.0, self.mean_kv_tiles / share_tiles + MORE_SHARES)), most


def share_tiles_of(call: AttentionCall, cut: Cut, splits: int, *, long_only: bool = False) -> int:
    """Return how many tiles of keys a share has, if the longest sequence has so many shares now.

    One that grows beyond that goes on to have as many, which are longer. If shares were as long as
    at the bound, sequences would have few of them until they come near it.

    Args:
        call: of the launch.
        cut: of the launch.
        splits: shares of the longest sequence's keys.
        long_only: whether short queries are passed over, of which the batch knows.

    """
    known, most = call.batch.known_lengths, float(max(1, call.batch.expected_kv_length))
    if known is not None:
        both = (None if long_only else known.short, known.long)
        of_longest = max((each.most_kv for each in both if each is not None), default=1.0)
        most = of_longest * max(1, min(most, known.longest))
    tiles = math.ceil(min(most, most_keys_of(call, cut)) / cut.kv_tile)
    return -(-max(1, tiles) // splits)


def most_keys_of(call: AttentionCall, cut: Cut) -> int:
    """Return how many keys a tile of queries sees at most, by its window."""
    return MOST_KEYS if call.window is None else call.window + cut.tokens(group_of(call))


class Estimate:
    """Of a launch with one cut, for any number of shares.

    Args:
        work: of the launch.
        cut: of it.

    Attributes:
        cut: of the launch.
        most_kv_tiles: tiles of keys that an item sees at most.

    """

    def __init__(self, work: Work, cut: Cut) -> None:
        self.cut = cut
        self._num_programs = work.num_programs
        self._head_size = work.head_size
        self._items = [Items.of(work, cut, each) for each in work.sequences]
        self._reading = sum(read_seconds(work, each) for each in work.sequences)
        self.most_kv_tiles = max((each.most_kv_tiles for each in self._items), default=1)
        self._are_sorted = sum(each.count for each in work.sequences) <= MOST_SORTED

    @property
    def least_shared_seconds(self) -> float:
        """Seconds that all take at least if keys are shared out, but for merging rows."""
        work = sum(
            items.count * (items.item_seconds + items.mean_kv_tiles * items.tile_seconds)
            for items in self._items
        )
        return LAUNCH_SECONDS + self._beside_reading(work / self._num_programs) + MERGE_SECONDS

    def _beside_reading(self, multiplying: float) -> float:
        power = READING_BESIDE
        both: float = (multiplying**power + self._reading**power) ** (1 / power)
        return both

    def seconds(self, splits: int = 1) -> float:
        """Estimate how many seconds all take, merging included.

        Args:
            splits: shares of the longest item's keys.

        """
        share_tiles = -(-self.most_kv_tiles // splits)
        count = work = longest = merged_rows = shares_of_rows = 0.0
        for items in self._items:
            shares, most = items.shares(share_tiles, splits)
            drawn = items.count * shares
            count += drawn
            work += drawn * items.item_seconds
            work += items.count * items.mean_kv_tiles * items.tile_seconds
            of_longest = items.item_seconds + -(-items.most_kv_tiles // most) * items.tile_seconds
            longest = max(longest, of_longest)
            if most > 1:
                merged_rows += items.rows
                shares_of_rows += items.rows * shares
            if not self._are_sorted:
                work += items.count * (splits - shares) * DRAW_SECONDS
        seconds = self._beside_reading(self._spread(count, work, longest, is_shared=splits > 1))
        seconds += LAUNCH_SECONDS
        if merged_rows:
            seconds += MERGE_SECONDS + merged_rows * MERGE_ROW_SECONDS
            seconds += 8 * shares_of_rows * self._head_size / MERGE_RATE
        return seconds

    def _spread(self, count: float, work: float, longest: float, *, is_shared: bool) -> float:
        """Return how long the last program takes for its part of all work."""
        if count == 0:
            return 0.0
        mean, each = work / count, count / self._num_programs
        is_one_sort = len(self._items) == 1
        if is_one_sort and (self._items[0].are_alike or (not is_shared and mean >= EVEN * longest)):
            return max(longest, math.ceil(each - 1e-9) * mean)
        return max(longest, work / self._num_programs + UNEVEN * mean if each > 1 else longest)


def read_seconds(work: Work, lengths: Sequences, *, widened: bool = True) -> float:
    """Return how many seconds the memory takes for the keys and values of sequences.

    Args:
        work: of the launch.
        lengths: of the sequences, one of the work's.
        widened: whether what reads fp8 widens it in shared memory, as prefill does.

    """
    tokens = min(lengths.mean_kv, work.window + lengths.query_tokens / lengths.count)
    token_bytes = 2 * work.num_kv_heads * work.head_size * work.kv_bytes
    seconds = lengths.count * tokens * token_bytes / work.read_rate
    return seconds * (READ_FP8 if widened and work.kv_bytes == 1 else 1.0)
