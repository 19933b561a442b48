"""Which shared blocks are worth it, how they are cut into parts, and the arrays that follow."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from pagedattn.attention.cascade.costs import GPU, TILE_ROWS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pagedattn.attention.cascade.costs import Costs, Layer
    from pagedattn.shared_prefix import SharedBlocks

CUT_TOKENS = 128  # parts are cut at multiples of it: tiles of keys


@dataclass(frozen=True)
class Lengths:
    """The lengths of a batch on the host.

    Attributes:
        num_tokens: int64 [num_sequences].
        query_lengths: int64 [num_sequences].
        block_size: tokens a block.

    """

    num_tokens: NDArray[np.int64]
    query_lengths: NDArray[np.int64]
    block_size: int

    @property
    def query_starts(self) -> NDArray[np.int64]:
        """First query token of each sequence; int64 [num_sequences]."""
        return np.cumsum(self.query_lengths) - self.query_lengths


@dataclass(frozen=True)
class Limits:
    """Room that a schedule has to keep to.

    Attributes:
        parts: ranges of blocks with their queries.
        rows: query tokens of all parts.
        parts_of_a_token: parts that one query token is in.
        queries: query tokens of a part.

    """

    parts: int
    rows: int
    parts_of_a_token: int
    queries: int


@dataclass(frozen=True)
class Schedule:
    """The parts of a batch, as arrays.

    Part p has the blocks `first_blocks[p]` onwards of sequence `sources[p]`, `lengths[p]` tokens,
    and the query tokens `rows[starts[p] : starts[p + 1]]` of the batch.

    Attributes:
        skipped: int64 [num_sequences], leading blocks of each sequence that are read in parts.
        own_lengths: int64 [num_sequences], tokens behind them.
        sources: int64 [num_parts].
        first_blocks: int64 [num_parts].
        lengths: int64 [num_parts].
        starts: int64 [num_parts + 1].
        rows: int64 [num_rows].
        parts_of_token: int64 [num_query_tokens, most parts of a token], for each query token its
            places in `rows`, then -1.
        block_size: tokens a block.
        seconds_saved: of a launch, as estimated; negative where sharing does not pay, infinite
            where costs do not count.

    """

    skipped: NDArray[np.int64]
    own_lengths: NDArray[np.int64]
    sources: NDArray[np.int64]
    first_blocks: NDArray[np.int64]
    lengths: NDArray[np.int64]
    starts: NDArray[np.int64]
    rows: NDArray[np.int64]
    parts_of_token: NDArray[np.int64]
    block_size: int
    seconds_saved: float

    @property
    def most_queries(self) -> int:
        """Query tokens of the part that has the most."""
        return int(np.diff(self.starts).max(initial=0))


@dataclass(frozen=True)
class _Shared:
    """A node that is shared.

    Attributes:
        begin: its first block.
        end: the block behind its last.
        members: sequences.
        rows: int64, their query tokens.

    """

    begin: int
    end: int
    members: NDArray[np.int64]
    rows: NDArray[np.int64]


def make_schedule(
    nodes: list[SharedBlocks], lengths: Lengths, layer: Layer, limits: Limits | None = None
) -> Schedule:
    """Decide what is shared, and cut it.

    Args:
        nodes: the tree of shared blocks.
        lengths: of the batch.
        layer: heads and costs.
        limits: None for none; what does not keep to them is cut into fewer parts, or not shared.

    """
    shared = _worthwhile(nodes, lengths, layer)
    if limits is None:
        limits = Limits(*[1 << 30] * 4)
    counts = _part_counts(shared, lengths.block_size, layer)
    while shared and not _fits(shared, counts, lengths.query_lengths.size, limits):
        if counts.max() > 1:
            counts = -(-counts // 2)
        else:  # the last node is nobody's parent
            shared, counts = shared[:-1], counts[:-1]
    return _arrays(shared, counts, lengths, layer, limits)


def _worthwhile(nodes: list[SharedBlocks], lengths: Lengths, layer: Layer) -> list[_Shared]:
    """Choose nodes, parents first; blocks of one that is left out go to its children.

    Where costs count, sequences whose queries fill a tile by themselves take no part: the matrix
    units limit them, for whom the same products remain.
    """
    queries, starts = lengths.query_lengths, lengths.query_starts
    taking_part = queries > 0
    if layer.costs is not None:
        taking_part &= queries * layer.group < TILE_ROWS
    all_do = bool(taking_part.all())
    reach: list[int] = []  # for each node, behind which block its members are still on their own
    shared = []
    for node in nodes:
        begin = 0 if node.parent is None else reach[node.parent]
        members = node.members if all_do else node.members[taking_part[node.members]]
        of_members = queries[members]
        num_rows = int(of_members.sum())
        tokens = (node.end - begin) * lengths.block_size
        is_shared = members.size > 1 and _pays(members.size, num_rows, tokens, layer)
        if is_shared:
            rows = starts[members]
            if num_rows > rows.size:  # some have more than one
                rows = np.repeat(rows - np.cumsum(of_members) + of_members, of_members)
                rows += np.arange(num_rows)
            shared.append(_Shared(begin, node.end, members, rows))
        reach.append(node.end if is_shared else begin)
    return shared


def _pays(num_members: int, num_rows: int, num_tokens: int, layer: Layer) -> bool:
    """Whether blocks cost less once than once a member, apart from what is paid once a batch."""
    costs = layer.costs
    if costs is None:
        return True
    saved = num_members * num_tokens * layer.token_bytes / costs.read_again
    tiles = layer.tiles(num_rows)
    spent = tiles * layer.num_kv_heads * num_tokens * layer.tile_seconds(costs, tiles)
    spent = spent / layer.processors + num_rows * layer.row_bytes / costs.merge
    return saved > costs.margin * spent


def _part_counts(shared: list[_Shared], block_size: int, layer: Layer) -> NDArray[np.int64]:
    """Into how many parts to cut each node so that tiles of queries fill the processors.

    Where all queries of a node are few, kernels divide its keys by themselves. Else all parts get
    about one length, the one with which the estimate is least.
    """
    ones = np.ones(len(shared), np.int64)
    if not shared or is_short(max(node.rows.size for node in shared), layer):
        return ones
    tokens = np.array([(node.end - node.begin) * block_size for node in shared])
    unit = CUT_TOKENS if CUT_TOKENS % block_size == 0 else block_size
    units = -(-tokens // unit)
    longest = int(units.max())
    most = min(layer.processors, longest)
    # each length that cuts the longest node into another number of parts
    length = np.array(sorted({-(-longest // parts) for parts in range(1, most + 1)}))
    counts = -(-units[:, None] // length)
    rows = np.array([node.rows.size for node in shared])
    seconds = _seconds(counts, tokens[:, None], rows[:, None], length * unit, layer)
    fewest = len(length) - 1 - int(seconds[::-1].argmin())  # of equals the longest parts
    chosen: NDArray[np.int64] = counts[:, fewest]
    return chosen


def is_short(queries: int, layer: Layer) -> bool:
    """Whether kernels divide the keys of so many query tokens over the GPU by themselves."""
    return queries * layer.group <= layer.short_rows


def _seconds_saved(
    shared: list[_Shared],
    counts: NDArray[np.int64],
    num_queries: int,
    block_size: int,
    layer: Layer,
    costs: Costs,
) -> float:
    """Seconds that a launch takes longer without sharing, less the margin of what it takes with."""
    if not shared:
        return -costs.fixed
    tokens = np.array([(node.end - node.begin) * block_size for node in shared])
    rows = np.array([node.rows.size for node in shared])
    members = np.array([node.members.size for node in shared])
    node_bytes = tokens * layer.token_bytes
    once = float(node_bytes.sum())
    alone = once / costs.read + float(((members - 1) * node_bytes).sum()) / costs.read_again
    if is_short(int(rows.max()), layer):
        parts = costs.divided + once / costs.read
        parts += float((counts * rows).sum()) * layer.row_bytes / costs.merge
    else:
        longest = (-(-tokens // counts)).max(keepdims=True)
        way = (counts[:, None], tokens[:, None], rows[:, None], longest)
        parts = float(_seconds(*way, layer)[0])
    # each query token's own result moves in float32, and then once more as what is asked for
    merged = 2 * num_queries * layer.row_bytes / costs.merge
    return alone - costs.margin * (costs.fixed + parts + merged)


def _seconds(
    counts: NDArray[np.int64],
    tokens: NDArray[np.int64],
    rows: NDArray[np.int64],
    longest: NDArray[np.int64],
    layer: Layer,
) -> NDArray[np.float64]:
    """Estimate of a launch over all parts and of merging them, for several ways to cut.

    Args:
        counts: [num_nodes, num_ways], parts.
        tokens: [num_nodes, 1], of a node.
        rows: [num_nodes, 1], query tokens of a node.
        longest: [num_ways], tokens of the longest part.
        layer: heads and costs.

    """
    costs = layer.costs or GPU
    tiles = np.array([layer.tiles(size) for size in rows.ravel().tolist()])[:, None]
    of_token = layer.tile_seconds(costs, tiles.sum() / tiles.size)
    items = (counts * tiles).sum(0) * layer.num_kv_heads
    work = (tiles * (counts * costs.item + tokens * of_token)).sum(0) * layer.num_kv_heads
    longest_item = costs.item + longest * of_token
    in_rounds = -(-items // layer.processors) * longest_item
    attended = np.minimum(in_rounds, work / layer.processors + longest_item)
    seconds: NDArray[np.float64] = attended + (counts * rows).sum(0) * (
        layer.row_bytes / costs.merge
    )
    return seconds


def _bundles(node: _Shared, limits: Limits) -> list[NDArray[np.int64]]:
    """A node's query tokens, as many at once as a part may have."""
    return [node.rows[at : at + limits.queries] for at in range(0, node.rows.size, limits.queries)]


def _fits(
    shared: list[_Shared], counts: NDArray[np.int64], num_sequences: int, limits: Limits
) -> bool:
    of_sequence = np.zeros(num_sequences, np.int64)
    parts = rows = 0
    for node, count in zip(shared, counts.tolist(), strict=True):
        of_sequence[node.members] += count
        parts += count * -(-node.rows.size // limits.queries)
        rows += count * node.rows.size
    return (
        parts <= limits.parts
        and rows <= limits.rows
        and int(of_sequence.max(initial=0)) <= limits.parts_of_a_token
    )


def _arrays(
    shared: list[_Shared],
    counts: NDArray[np.int64],
    lengths: Lengths,
    layer: Layer,
    limits: Limits,
) -> Schedule:
    skipped = np.zeros(lengths.num_tokens.size, np.int64)
    of_token = np.zeros(int(lengths.query_lengths.sum()), np.int64)  # parts so far
    unit = max(1, CUT_TOKENS // lengths.block_size)
    sources: list[int] = []
    first_blocks: list[int] = []
    blocks: list[int] = []
    sizes: list[int] = []
    rows: list[NDArray[np.int64]] = []
    places: list[tuple[NDArray[np.int64], int, NDArray[np.int64]]] = []
    at = 0
    for node, count in zip(shared, counts.tolist(), strict=True):
        skipped[node.members] = node.end
        units = -(-(node.end - node.begin) // unit)
        cuts = [node.begin + part * units // count * unit for part in range(count)] + [node.end]
        for bundle in _bundles(node, limits):
            sources += [int(node.members[0])] * count
            first_blocks += cuts[:-1]
            blocks += [after - before for before, after in itertools.pairwise(cuts)]
            sizes += [bundle.size] * count
            rows += [bundle] * count
            of_parts = np.arange(at, at + count * bundle.size).reshape(count, -1)
            # all members are in the same parts so far: those of the nodes around this one
            places.append((bundle, int(of_token[bundle[0]]), of_parts.T))
            of_token[bundle] += count
            at += count * bundle.size
    parts_of_token = np.full((of_token.size, int(of_token.max(initial=0))), -1, np.int64)
    for bundle, column, of_parts in places:
        parts_of_token[bundle, column : column + of_parts.shape[1]] = of_parts
    schedule = Schedule(
        skipped=skipped,
        own_lengths=lengths.num_tokens - skipped * lengths.block_size,
        sources=np.array(sources, np.int64),
        first_blocks=np.array(first_blocks, np.int64),
        lengths=np.array(blocks, np.int64) * lengths.block_size,
        starts=np.array([0, *itertools.accumulate(sizes)], np.int64),
        rows=np.concatenate(rows) if rows else np.empty(0, np.int64),
        parts_of_token=parts_of_token,
        block_size=lengths.block_size,
        seconds_saved=math.inf,
    )
    if layer.costs is None:
        return schedule
    saved = _seconds_saved(shared, counts, of_token.size, lengths.block_size, layer, layer.costs)
    return replace(schedule, seconds_saved=saved)
