"""How the host has decode divided: heads side by side, ranges, clusters, rows that stay whole."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pagedattn.attention.cuda.decode_fits import Fit

WHOLE_TOKENS, WHOLE_ROW_BYTES = 1024, 512 << 10  # see decode_shape.cuh
FEW = 16  # one row in so many may be missing
UNREAD_BYTES = 64 << 20  # that programs without work may leave, of two on a multiprocessor
HALVED_TOKENS = 900  # of a row, from which on half of the programs may have all
HALF_COST = 31  # parts of 1000 that these take longer
SHARED_RATE = 71  # `full_rate` of what comes from the L2, at least; not fitted
NO_LIMIT = 1 << 62
# columns times elements of a head, and up to so many the bytes that a range may have more for rows
# to begin with one: as in decode_shape.cuh
ALIGN_BYTES = ((512, 128 << 10), (1024, 192 << 10), (math.inf, 384 << 10))
MOST_PARTS = 20  # of a row, that are merged at once: FAN_IN of decode_shape.cuh
LEAST_OF_PART = 96  # KV tokens that make a part worth merging
FEW_BYTES = 12 << 20  # K and V, of which half as many parts are made
PATH_RATE = 65e9  # bytes a second that come by a path to the L2 to one multiprocessor
ALONE_RATE = 88e9  # bytes a second that come to one multiprocessor, if others are idle,
HALVED_BY = 80  # and half of it if so many others read, each by a path of its own
PAIRED_RATE = 36e9  # bytes a second to each where paths to the L2 are shared,
SPREAD_OUT = 50  # programs of clusters of more than two that all have a path of their own
CLUSTERS = {2: 66, 4: 30, 5: 20, 6: 16, 8: 15}  # programs of a cluster, and how many run at once
ONE_CLUSTER = 0.25e-6  # seconds that merging takes in one cluster,
ONE_CLUSTER_PROGRAM = 0.08e-6  # and more for each program of it,
SEVERAL_CLUSTERS = 1.8e-6  # and by way of the last of several
_MERGING = (
    (1, 0.0),
    (4, 1.4e-6),
    (10, 2.1e-6),
    (20, 2.9e-6),
    (40, 3.1e-6),
    (math.inf, 4.3e-6),
)
"""Parts of a row, and seconds that merging as many by way of the L2 takes.

Up to 4 are taken to be swapped by twos, though parts of many columns are not.
"""
TOKEN_SECONDS = 5.5e-9  # that a program takes for a KV token of a head, at least,
GATHERED_TOKEN_SECONDS = 16e-9  # and in blocks of one token
SHARED_PATH_DELAY = 12e-9  # seconds for each program that shares a path to the L2: all begin later
MIN_TILE = 16  # tokens, which each program of a cluster has


@dataclass(frozen=True)
class RowKind:
    """How fast programs read rows of a kind on a GPU; see `decode_fits`.

    What is shared is read from the L2, which gives more than the memory does, to more programs.

    Attributes:
        full_rate: programs that read all there is to get, if no two share a path to the L2.
        fewer_cost: how much longer all takes by fewer programs than there are multiprocessors, as
            some share a path and end last; parts of 1000.
        halves: whether half of the programs may have all, each with a path for itself.
        token_seconds: that a program takes for a KV token of a head, at least.
        fit: of the GPU.

    """

    full_rate: int
    fewer_cost: int
    halves: bool
    token_seconds: float
    fit: Fit

    @classmethod
    def of(
        cls,
        head_size: int,
        kv_bytes: int,
        columns: int,
        block_size: int,
        *,
        is_shared: bool = False,
        fit: Fit,
    ) -> RowKind:
        """Tell them by their kind.

        Args:
            head_size: elements of a head.
            kv_bytes: bytes of an element of the cache.
            columns: queries times heads of a group.
            block_size: tokens a block.
            is_shared: whether half of K and V or more come from the L2.
            fit: of the GPU.

        """
        rates, narrow, gathered = fit.full_rates, head_size <= 64, block_size == 1
        if gathered:
            full_rate = rates.gathered
        elif columns > rates.wide_from:
            full_rate = rates.wide
        elif kv_bytes == 1:
            full_rate = rates.fp8
        else:
            full_rate = rates.narrow if head_size <= rates.narrow_to else rates.others
        if is_shared:
            full_rate = max(full_rate, SHARED_RATE)
        costs = fit.fewer_costs
        if columns > 8 or gathered:
            fewer_cost = costs.wide
        else:
            fewer_cost = costs.narrow if narrow else costs.others
        halves = fit.halves and narrow and kv_bytes > 1 and not is_shared
        token_seconds = GATHERED_TOKEN_SECONDS if gathered else TOKEN_SECONDS
        return cls(full_rate, fewer_cost, halves, token_seconds, fit)


@dataclass(frozen=True)
class WholeRows:
    """How rows of one length are divided if none is cut, and up to which size that is done.

    Attributes:
        of_range: rows of a range.
        more: ranges that have one row more, the first.
        most_bytes: K and V of a head of a row, at most; else rows are cut.

    """

    of_range: int
    more: int
    most_bytes: int

    @classmethod
    def ways(cls, num_rows: int, ranges: int) -> list[WholeRows]:
        """Return the ways to leave all rows whole, whatever their size.

        Args:
            num_rows: sequences times groups of KV heads that are read side by side; at least 1.
            ranges: there are so many; at least 1.

        """
        of_range, more = divmod(num_rows, ranges)
        ways = [(-(-num_rows // ranges), 0), (-(-num_rows // max(1, ranges // 2)), 0)]
        if of_range and more:
            ways.append((of_range, more))
        return [cls(*way, NO_LIMIT) for way in dict.fromkeys(ways)]

    @classmethod
    def of(
        cls,
        num_rows: int,
        heads: int,
        ranges: int,
        num_programs: int,
        kv_length: int,
        kind: RowKind,
        *,
        programs: int = 1,
    ) -> WholeRows:
        """Choose the way that takes least time; rows are cut if merging parts takes less.

        What a way takes longer than all programs would, reading all the time, grows with the size
        of a row, and is counted in rows that would be read meanwhile. One is as few ranges as can
        have all, another that the first have one more. Over heads of 64 half of the programs may
        have all, where that comes out nearly even. Of two programs on a multiprocessor, some have
        one more, if few rows are missing for all to have as many, or little could be read by those
        that have less.

        Args:
            num_rows: sequences times groups of `heads` KV heads.
            heads: that are read side by side.
            ranges: there are so many.
            num_programs: of the launch.
            kv_length: tokens that each sequence has, or that its window has.
            kind: of the rows.
            programs: on a multiprocessor, 1 or 2.

        """
        num_rows, ranges = max(1, num_rows), max(1, ranges)
        of_range, more = divmod(num_rows, ranges)
        if programs > 1:
            missing = -num_rows % ranges
            if few_missing(num_rows, ranges):
                return cls(of_range, more, NO_LIMIT)
            most_bytes = UNREAD_BYTES // (missing * heads) if missing <= num_rows else 0
            return cls(of_range, more, most_bytes)

        def cost(with_work: int, each: int, rows: int) -> int:
            """1000 times the rows that all programs read while so many take longer for `rows`."""
            idle = num_programs - with_work
            lost = rows * kind.fewer_cost if FEW * idle > num_programs else 0
            return max(lost, 1000 * (each * kind.full_rate - rows))

        every, most_of_range = num_rows * heads, -(-num_rows // ranges)
        fewer = cost(-(-num_rows // most_of_range) * heads, most_of_range, every)
        one_more = cost(more * heads, 1, more * heads) if more else 0
        ways = [(fewer, most_of_range, 0), (one_more, of_range, more)]
        half = max(1, ranges // 2)
        by_half = -(-num_rows // half)
        if (
            kind.halves
            and kv_length >= HALVED_TOKENS
            and most_of_range < by_half
            and few_missing(num_rows, half)
        ):
            ways.append((every * HALF_COST, by_half, 0))
        least, of_range, more = min(ways, key=lambda way: way[0])
        return cls(of_range, more, 1000 * kind.fit.merge_bytes // least if least else NO_LIMIT)


def keeps_whole(kv_length: int, row_bytes: int) -> bool:
    """Return whether rows of several lengths are short enough to stay whole, however many.

    More rows than multiprocessors are cut as soon as one is longer, and short ones too where one is
    much longer than the others; see `decode_config.Cutting`.

    Args:
        kv_length: tokens that a sequence has at most, or that its window has.
        row_bytes: K and V of a head of them.

    """
    return kv_length <= WHOLE_TOKENS and row_bytes <= WHOLE_ROW_BYTES


@functools.cache
def heads_in_parallel(num_kv_heads: int, num_programs: int) -> int:
    """Return how many programs read the same blocks, each for a KV head.

    As many as divide the heads and leave no more than one program in twenty without work: of 40
    heads 10 where there are 132 programs, 2 of which then have nothing to do.
    """
    return max(
        heads
        for heads in range(1, num_kv_heads + 1)
        if num_kv_heads % heads == 0 and 20 * (num_programs % heads) <= num_programs
    )


def ranges_of(
    num_rows: int, heads: int, num_programs: int, kv_length: int, row_bytes: int, fit: Fit
) -> int:
    """Return into how many ranges the work is cut, each for `heads` programs, one a multiprocessor.

    As many as there are programs for, where rows are many. Few rows would be cut into more parts
    than are merged at once, or than are loaded at two places at a time, or into parts of few
    tokens. Then fewer programs work, unless reading takes longer for it than merging would: each
    has a path to the L2 alone, and about half of the programs take all that the memory gives: less
    on an H100, by which the limits were measured, and a bit more on an H200.

    Args:
        num_rows: sequences times groups of `heads` KV heads.
        heads: that are read side by side.
        num_programs: of the launch, one on each multiprocessor.
        kv_length: tokens that a sequence has at most, or that its window has.
        row_bytes: K and V of a head of them.
        fit: of the GPU.

    """
    ranges = num_programs // heads
    num_bytes = num_rows * heads * row_bytes
    # parts of a row, the most bytes for that, and the seconds that merging so few saves
    for parts, most_bytes, saved in (
        (MOST_PARTS // 2, FEW_BYTES, 0.5e-6),
        (MOST_PARTS, math.inf, 1e-6),
    ):
        fewer = num_rows * min(parts, max(1, kv_length // LEAST_OF_PART))
        if fewer >= ranges:
            break
        rate = min(fewer * heads * PATH_RATE, fit.read_rate)
        if num_bytes <= most_bytes and num_bytes / rate - num_bytes / fit.read_rate < saved:
            return fewer
    return ranges


def clusters_of(
    num_rows: int, heads: int, num_programs: int, kv_length: int, row_bytes: int, kind: RowKind
) -> tuple[int, int]:
    """Return how many programs of a cluster add up a row of one length, and the row's parts.

    Programs of a cluster send each other what they have, which takes less time than merging by way
    of the L2, but not as many of them run at once, and they share paths to it. So what each way
    takes is estimated: reading by the rate that so many programs get together, or as fast as one
    asks for its tokens, beginning, and merging. A row has one cluster; or several, and one trip to
    the L2 is left. Times were fitted to batches on both an H100 and an H200. Rates are of
    `decode_fits` where they depend on the memory.

    Args:
        num_rows: sequences times groups of `heads` KV heads.
        heads: that are read side by side.
        num_programs: of the launch, one on each multiprocessor.
        kv_length: tokens that each sequence has, or that its window has.
        row_bytes: K and V of a head of them.
        kind: of the rows.

    Returns:
        Programs of a cluster, and how many parts each row then has; or 1 and 0 for none.

    """
    num_bytes = num_rows * heads * row_bytes
    most = num_programs // heads
    ranges = ranges_of(num_rows, heads, num_programs, kv_length, row_bytes, kind.fit)
    whole = WholeRows.of(num_rows, heads, ranges, num_programs, kv_length, kind)
    if row_bytes <= whole.most_bytes:
        ranges = num_rows
    parts = max(1.0, ranges / num_rows)

    def reading(programs: int, tokens: float, cluster: int = 1) -> float:
        rate = _rate_of(programs, num_programs, kind.fit, cluster)
        sharing = max(0, programs - _spread_out(num_programs, cluster))
        return max(num_bytes / rate, tokens * kind.token_seconds) + sharing * SHARED_PATH_DELAY

    merging = next(seconds for limit, seconds in _MERGING if parts <= limit)
    best = reading(min(ranges * heads, num_programs), kv_length / parts) + merging
    found = 1, 0
    for cluster, at_once in CLUSTERS.items():
        several = min(most // num_rows // cluster, at_once // (num_rows * heads), MOST_PARTS)
        for count in (1, several) if cluster == max(CLUSTERS) else (1,):
            num_parts = count * cluster
            if not 0 < count <= several or num_parts * MIN_TILE > kv_length:
                continue
            adding = ONE_CLUSTER + cluster * ONE_CLUSTER_PROGRAM if count == 1 else SEVERAL_CLUSTERS
            programs = num_parts * num_rows * heads
            seconds = reading(programs, kv_length / num_parts, cluster) + adding
            if seconds < best:
                best, found = seconds, (cluster, num_parts)
    return found


def _spread_out(num_programs: int, cluster: int) -> int:
    """Return how many programs of clusters of this size, at most, share no path to the L2."""
    return num_programs // 2 if cluster <= 2 else SPREAD_OUT


def _rate_of(programs: int, num_programs: int, fit: Fit, cluster: int) -> float:
    """Estimate what so many programs read, in bytes a second: see `clusters_of`."""
    if programs <= _spread_out(num_programs, cluster):
        rate = programs * ALONE_RATE / (1 + programs / HALVED_BY)
    else:
        rate = programs * (PAIRED_RATE if cluster == 1 else fit.clustered_rate)
    return min(rate, fit.read_rate)


def few_missing(num_rows: int, ranges: int) -> bool:
    """Return whether few rows are missing for all ranges to have as many, if none is cut."""
    return FEW * (-num_rows % ranges) <= num_rows


def shares_paths_unevenly(
    num_sequences: int,
    num_kv_heads: int,
    num_programs: int,
    row_bytes: int,
    kv_length: int,
    kind: RowKind,
) -> bool:
    """Return whether 2 to 4 of 5 pairs of multiprocessors have work for both, the others for one.

    Of sequences of one length, each program that has work a whole row of a head then, and one
    program a multiprocessor.

    Args:
        num_sequences: of one length.
        num_kv_heads: of each.
        num_programs: of the launch.
        row_bytes: K and V of a head of a sequence.
        kv_length: tokens that each has, or that its window has.
        kind: of the rows.

    """
    heads = heads_in_parallel(num_kv_heads, num_programs)
    ranges, rows = num_programs // heads, num_sequences * num_kv_heads // heads
    both = 2 * rows * heads - num_programs  # multiprocessors of pairs that both have work
    whole = WholeRows.of(rows, heads, ranges, num_programs, kv_length, kind)
    return 2 * num_programs <= 5 * both <= 4 * num_programs and row_bytes <= whole.most_bytes
