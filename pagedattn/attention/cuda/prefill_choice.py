"""Which cut of the prefill kernel a call has, and how many shares of keys: what takes least time.

A program works through tiles of keys whole. Large tiles take less time for each key, and of small
ones fewer keys are multiplied in vain, at a window's edges and on the diagonal. Over heads of 64
registers suffice for three warpgroups, which take less time for each row than two. Two have smaller
tiles of queries: of few queries more programs have one, and none has much more than others.

Of 48 heads two tokens fill three quarters of 128 rows; three parts of 16 heads, of eight tokens
each, fill them all. But so many tokens see more keys, on the diagonal, which the first of them do
not.

Few tiles over long keys leave programs without work, and one sequence that is longer than all
others keeps the last ones waiting. Shares of its keys go to several programs, are written in
float32, and merged by another launch.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pagedattn.attention.cuda.prefill_config import Cut, group_of, usual_cut
from pagedattn.attention.cuda.prefill_estimate import Estimate, prices_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pagedattn.attention.call import AttentionCall

MOST_SHARES = 64  # as in prefill_shares.cuh
SPLITS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, MOST_SHARES)
"""Shares of the longest keys that are looked at."""
MOST_SHARED_BYTES = 1 << 28
"""Of shares' results, at most."""
LONG_SECONDS = 1e-4  # from which on other tiles than the usual ones
LEAST_LONG_GAIN = 0.07  # are estimated to save so much of their time where they are chosen
LEAST_FILLED = 0.01  # of a tile's rows, that more parts of heads fill


@dataclass(frozen=True)
class Way:
    """How a launch is cut.

    Attributes:
        cut: how large tiles are.
        splits: shares of the longest sequence's keys; 1 is not to share.
        seconds: that it is estimated to take, merging included.

    """

    cut: Cut
    splits: int
    seconds: float


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


def divided(
    call: AttentionCall,
    num_programs: int,
    cut: Cut,
    splits: Iterable[int] = (1,),
    *,
    long_only: bool = False,
) -> Way:
    """Choose into how many parts a cut divides heads, and keys into how many shares.

    Args:
        call: of the launch.
        num_programs: that run at once.
        cut: whose `head_parts` are replaced.
        splits: numbers of shares, among which it chooses.
        long_only: whether short queries are passed over.

    """
    found = Way(cut, 1, math.inf)
    for way in ways_to_divide(call, cut):
        estimate = Estimate(call, num_programs, way, long_only=long_only)
        seconds, number = min((estimate.seconds(each), each) for each in splits)
        if seconds < found.seconds:
            found = Way(way, number, seconds)
    return found


def cut_of(call: AttentionCall, num_programs: int, *, long_only: bool = False) -> Way:
    """Choose the cut that is estimated to take the least time, if keys are not shared out.

    Long launches have other tiles than the usual ones only where these take much longer.

    Args:
        call: of the launch.
        num_programs: that run at once.
        long_only: whether short queries are passed over.

    """
    usual = usual_cut(call)
    ways = {
        cut: divided(call, num_programs, cut, long_only=long_only)
        for cut in (*prices_of(call),) or (usual,)
    }
    chosen = ways[usual]
    best = min(ways.values(), key=lambda way: way.seconds)
    least_gain = 0.0 if chosen.seconds < LONG_SECONDS else LEAST_LONG_GAIN
    return best if best.seconds < (1 - least_gain) * chosen.seconds else chosen


def way_of(
    call: AttentionCall,
    num_programs: int,
    *,
    long_only: bool = False,
    is_usual: bool = False,
) -> Way:
    """Choose how a call is cut, by what the host knows of its lengths.

    Args:
        call: of the launch.
        num_programs: that run at once.
        long_only: whether short queries are passed over, of which the batch knows.
        is_usual: whether tiles are the usual ones whatever they take.

    """
    if is_usual:
        whole = divided(call, num_programs, usual_cut(call), long_only=long_only)
    else:
        whole = cut_of(call, num_programs, long_only=long_only)
    most = min(MOST_SHARES, MOST_SHARED_BYTES // max(1, 4 * call.out.numel()))
    splits = [each for each in SPLITS if each <= most]
    if not call.causal or not splits:
        return whole
    # what other tiles take is known without shares alone
    shared = divided(call, num_programs, usual_cut(call), splits, long_only=long_only)
    return shared if shared.seconds < whole.seconds else whole
