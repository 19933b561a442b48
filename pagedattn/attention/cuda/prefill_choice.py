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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pagedattn.attention.cuda.prefill_estimate import Estimate, Work, prices_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pagedattn.attention.cuda.prefill_config import Cut

MOST_KEPT = 1024
"""Launches whose ways are kept."""
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


def ways_to_divide(work: Work, cut: Cut) -> tuple[Cut, ...]:
    """Return a cut with each number of parts of heads that a launch can have, fewest first.

    Where queries see all keys, only the cut itself.
    """
    return _ways(cut, work.group) if work.causal else (cut,)


@functools.cache
def _ways(cut: Cut, group: int) -> tuple[Cut, ...]:
    return tuple(replace(cut, head_parts=parts) for parts in head_parts_of(group, cut.rows))


def divided(work: Work, cut: Cut, splits: int = 1) -> Way:
    """Choose into how many parts a cut divides heads.

    Args:
        work: of the launch.
        cut: whose `head_parts` are replaced.
        splits: shares of the longest sequence's keys.

    """
    return _fastest(_estimates(work, cut), splits)


def _estimates(work: Work, cut: Cut) -> list[Estimate]:
    return [Estimate(work, way) for way in ways_to_divide(work, cut)]


def _fastest(estimates: Iterable[Estimate], splits: int = 1) -> Way:
    ways = (Way(each.cut, splits, each.seconds(splits)) for each in estimates)
    return min(ways, key=lambda way: way.seconds)


def cut_of(work: Work) -> Way:
    """Choose the cut that is estimated to take the least time, if keys are not shared out.

    Long launches have other tiles than the usual ones only where these take much longer.
    """
    return _whole(work, _estimates(work, work.usual))


def way_of(work: Work, *, is_usual: bool = False) -> Way:
    """Choose how a launch is cut, by what the host knows of its lengths.

    Args:
        work: of the launch.
        is_usual: whether tiles are the usual ones whatever they take.

    """
    return _way_of(work, is_usual)  # by one key, whether `is_usual` is given or not


@functools.lru_cache(maxsize=MOST_KEPT)
def _way_of(work: Work, is_usual: bool) -> Way:
    usual = _estimates(work, work.usual)
    found = _fastest(usual) if is_usual else _whole(work, usual)
    if not work.causal:
        return found
    share_bytes = 4 * work.num_tokens * work.num_kv_heads * work.group * work.head_size
    most = min(MOST_SHARES, MOST_SHARED_BYTES // max(1, share_bytes))
    # what other tiles take is known without shares alone
    for estimate in usual:
        if estimate.most_kv_tiles < 2 or estimate.least_shared_seconds >= found.seconds:
            continue
        for splits in SPLITS:
            if splits <= most and (seconds := estimate.seconds(splits)) < found.seconds:
                found = Way(estimate.cut, splits, seconds)
    return found


def _whole(work: Work, usual: Iterable[Estimate]) -> Way:
    """Choose a cut, of which those of usual tiles are given: see `cut_of`."""
    chosen = _fastest(usual)
    others = (divided(work, cut) for cut in prices_of(work) if cut != work.usual)
    best = min(others, key=lambda way: way.seconds, default=chosen)
    least_gain = 0.0 if chosen.seconds < LONG_SECONDS else LEAST_LONG_GAIN
    return best if best.seconds < (1 - least_gain) * chosen.seconds else chosen
