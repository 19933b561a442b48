"""Which blocks of a batch of prompts are there already, and which must be new."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pagedattn.block_manager.ragged import distinct, first_of_each, nonzero

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from pagedattn.block_manager.block_pool import BlockPool
    from pagedattn.block_manager.layer_groups import LayerGroups
    from pagedattn.block_manager.prefix_cache import PrefixCache
    from pagedattn.block_manager.prefix_index import PrefixIndex
    from pagedattn.block_manager.sequence_tables import SequenceTables


@dataclass(frozen=True)
class FullBlocks:
    """The full blocks of a batch of prompts, one after the other.

    Attributes:
        prompts: int64 [num_full], which prompt each is of.
        columns: int64 [num_full], its place in its prompt.
        digests: uint64 [num_full, 4].
        first: int64 [num_full], the first of these blocks that has the same digest: itself, or
            one of an earlier prompt (one prompt's digests all differ).
        told_apart: whether `first` was worked out; if not, each counts as the first.

    """

    prompts: NDArray[np.int64]
    columns: NDArray[np.int64]
    digests: NDArray[np.uint64]
    first: NDArray[np.int64]
    told_apart: bool = True

    @classmethod
    def of(
        cls,
        prompts: NDArray[np.int64],
        columns: NDArray[np.int64],
        digests: NDArray[np.uint64],
        *,
        may_share: bool = True,
    ) -> FullBlocks:
        """Find the duplicates of a batch, unless prompts may not share with each other.

        Prompts share blocks only if they share their first, so most are told apart by that.
        """
        first = np.arange(prompts.size)
        if not may_share:
            return cls(prompts, columns, digests, first, told_apart=False)
        if prompts.size == 0 or prompts[-1] == 0:  # no other prompt to share with
            return cls(prompts, columns, digests, first)
        heads = nonzero(columns == 0)
        same_head = heads[first_of_each(digests[heads])]
        if (same_head != heads).any():
            shares = np.zeros(int(prompts[-1]) + 1, dtype=bool)
            shares[prompts[same_head[same_head != heads]]] = True
            shares[prompts[heads[same_head != heads]]] = True
            among = nonzero(shares[prompts])
            first[among] = among[first_of_each(digests[among])]
        return cls(prompts, columns, digests, first)


@dataclass(frozen=True)
class CachedBlocks:
    """What of a batch of prompts need not be computed.

    Attributes:
        num_hit: int64 [num_prompts], full blocks at each prompt's beginning that are there
            already or are made for an earlier prompt of the batch.
        found: int32 [num_layer_groups, num_full], the block that the cache holds, or -1.

    """

    num_hit: NDArray[np.int64]
    found: NDArray[np.int32]


def look_up(
    full: FullBlocks, most: NDArray[np.int64], index: PrefixIndex, groups: LayerGroups
) -> CachedBlocks:
    """Find the longest beginning of each prompt that every layer group has.

    Args:
        full: the prompts' full blocks.
        most: int64 [num_prompts], full blocks that may be taken from the cache.
        index: where to look.
        groups: a group that sees a window needs its last blocks alone.

    """
    found = np.stack([index.find(groups.keys(full.digests, g)) for g in range(groups.count)])
    earlier = full.first < np.arange(full.first.size)
    num_hit = _longest(full, (found >= 0) | earlier, most, groups)
    if groups.has_window and earlier.any():
        # a block of an earlier prompt may lie before that prompt's window, and not exist
        num_hit = _longest(full, found >= 0, most, groups)
        for prompt in np.unique(full.prompts[earlier]).tolist():
            mine = np.arange(*np.searchsorted(full.prompts, (prompt, prompt + 1)))
            first = full.first[mine]
            made = earlier[mine] & (full.columns[mine] >= num_hit[full.prompts[first]])
            part = FullBlocks(np.zeros_like(mine), full.columns[mine], full.digests[mine], first)
            available = (found[:, mine] >= 0) | made
            num_hit[prompt] = _longest(part, available, most[prompt : prompt + 1], groups)[0]
    return CachedBlocks(num_hit, found)


def _longest(
    full: FullBlocks, available: NDArray[np.bool_], most: NDArray[np.int64], groups: LayerGroups
) -> NDArray[np.int64]:
    """Blocks of each prompt up to the last at which every group has what it needs."""
    places = np.arange(full.columns.size)
    before_prompt = places - full.columns - 1
    enough = full.columns < most[full.prompts]
    for group in range(groups.count):
        missing = np.where(available[group], before_prompt, places)
        run = places - np.maximum.accumulate(missing)  # available blocks that end here
        enough &= run >= np.minimum(full.columns + 1, groups.blocks_in_window(group))
    num_hit = np.zeros(most.size, dtype=np.int64)
    hits = nonzero(enough)
    np.maximum.at(num_hit, full.prompts[hits], full.columns[hits] + 1)
    return num_hit


def share(
    full: FullBlocks,
    cached: CachedBlocks,
    taken: NDArray[np.int64],
    tables: SequenceTables,
    pool: BlockPool,
    cache: PrefixCache,
    kept_free: int,
    written: Callable[[NDArray[np.int32]], None],
) -> NDArray[np.int64]:
    """Open sequences whose beginnings are cached; returns their rows, int64 [num_prompts].

    Args:
        full: the prompts' full blocks.
        cached: which of them are there.
        taken: int64 [num_prompts], tokens of each prompt that the sequences begin with.
        tables: gets the sequences.
        pool: gives the blocks.
        cache: gets the new full blocks.
        kept_free: blocks to leave free.
        written: told of the blocks that became findable.

    Raises:
        OutOfBlocksError: too few blocks are free; nothing has changed.

    """
    groups, num_hit = tables.groups, cached.num_hit
    numbers = range(groups.count)
    ends = tables.blocks_for(taken)
    hit = full.columns < num_hit[full.prompts]
    first = [groups.first_seen(group, num_hit * groups.block_size) for group in numbers]
    kept = [hit & (full.columns >= first[group][full.prompts]) for group in numbers]
    reused = [nonzero(kept[group] & (cached.found[group] >= 0)) for group in numbers]
    found = np.concatenate([cached.found[group][reused[group]] for group in numbers])
    idle = pool.num_reusable(distinct(found)) if found.size else 0
    pool.require(groups.count * int((ends - num_hit).sum()) + kept_free, pool.num_free - idle)
    tables.reserve(taken.size)
    pool.retain_found(found)
    rows = open_rows(tables, pool, taken, num_hit, first, ends)

    entries = tables.lists.entries
    new = ~hit & (full.columns < (taken // groups.block_size)[full.prompts])
    new &= full.first == np.arange(full.first.size)
    for group in numbers:
        start = tables.lists.start[tables.lists_of(rows, group)]
        at = start[full.prompts] + full.columns
        entries[at[reused[group]]] = cached.found[group][reused[group]]
        made = nonzero(kept[group] & (cached.found[group] < 0))
        if made.size:  # for an earlier prompt of the batch
            entries[at[made]] = entries[at[full.first[made]]]
            pool.retain_found(entries[at[made]])
        keys = groups.keys(full.digests[new], group)
        unknown = full.told_apart and bool((cached.found[group][new] < 0).all())
        written(cache.register(pool, entries[at[new]], keys, new=unknown))
    return rows


def share_one(
    digests: NDArray[np.uint64],
    num_tokens: int,
    max_new_tokens: int | None,
    tables: SequenceTables,
    pool: BlockPool,
    cache: PrefixCache,
    kept_free: int,
    written: Callable[[NDArray[np.int32]], None],
) -> tuple[int, int, int]:
    """Do what `look_up` and `share` do for one prompt and one layer group without a window.

    One prompt shares with no other of its call and lies in one run of the block lists, so slices
    take the place of index arrays.

    Args:
        digests: uint64 [num_full, 4], of the prompt's full blocks.
        num_tokens: tokens of the prompt.
        max_new_tokens: tokens to take in after the cached ones, or None for all.
        tables: gets the sequence.
        pool: gives the blocks.
        cache: where to look; gets the new full blocks.
        kept_free: blocks to leave free.
        written: told of the blocks that became findable.

    Returns:
        The sequence's row, the blocks found, and the tokens taken in.

    Raises:
        OutOfBlocksError: too few blocks are free; nothing has changed.

    """
    size = tables.groups.block_size
    found = cache.index.find(digests)
    most = (num_tokens - 1) // size
    missing = nonzero(found[:most] < 0)
    num_hit = int(missing[0]) if missing.size else most
    taken = num_tokens
    if max_new_tokens is not None:
        taken = min(num_tokens, num_hit * size + max_new_tokens)
    end, num_full = -(-taken // size), taken // size
    reused = found[:num_hit]
    num_new = end - num_hit
    pool.require(num_new + kept_free, pool.num_free - pool.num_reusable(reused))
    tables.reserve(1)
    pool.retain_found(reused)
    rows = tables.rows.add(1)
    tables.lists.open(rows, np.zeros(1, np.int64), np.array([end]))
    row = int(rows[0])
    start = int(tables.lists.start[row])
    new = pool.take(num_new)
    tables.lists.entries[start : start + num_hit] = reused
    tables.lists.entries[start + num_hit : start + end] = new
    tables.rows.num_tokens[row] = taken
    registered = slice(num_hit, num_full)
    unknown = bool((found[registered] < 0).all())
    blocks = new[: num_full - num_hit]
    written(cache.register(pool, blocks, digests[registered], new=unknown))
    return row, num_hit, taken


def open_rows(
    tables: SequenceTables,
    pool: BlockPool,
    lengths: NDArray[np.int64],
    num_hit: NDArray[np.int64],
    first: Sequence[NDArray[np.int64]],
    ends: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Open sequences with new blocks from `num_hit` to `ends`, for all of which there is room.

    Args:
        tables: gets the sequences.
        pool: gives the blocks.
        lengths: int64 [num_sequences], tokens of each.
        num_hit: int64 [num_sequences], the first logical block that must be new.
        first: for each layer group, the first logical block that is kept.
        ends: int64 [num_sequences], logical blocks of each.

    """
    rows = tables.rows.add(lengths.size)
    for group, first_kept in enumerate(first):
        tables.lists.open(tables.lists_of(rows, group), first_kept, ends)
    lists = tables.all_lists_of(rows)
    addresses = tables.lists.addresses(lists, tables.per_list(num_hit), tables.per_list(ends))
    tables.lists.entries[addresses] = pool.take(addresses.size)
    tables.rows.num_tokens[rows] = lengths
    return rows
