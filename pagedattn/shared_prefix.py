"""Which leading blocks the sequences of a batch share, found in its page table, as a tree."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from pagedattn.block_manager import Lineage
    from pagedattn.page_table import PageTable


FEW_COLUMNS = 64
ANY_LENGTH = np.iinfo(np.int64).max


@dataclass(frozen=True)
class SharedBlocks:
    """Blocks that two or more sequences have in common: a node of the tree.

    Attributes:
        begin: logical block from which these share and which `parent` does not reach; int.
        end: logical block behind the last one that all members share.
        members: int64, ascending, places of two or more sequences in the batch.
        parent: index of the node whose members, these among them, share the blocks before `begin`;
            None where `begin` is 0.

    """

    begin: int
    end: int
    members: NDArray[np.int64]
    parent: int | None


@dataclass(frozen=True)
class PrefixTree:
    """The tree of a batch that shares blocks, searched for when it is first needed.

    In most steps of serving all sequences only grow and the tree stays, which `still_holds` tells
    in less time than a search.

    Attributes:
        tables: int32 [num_sequences, most of `counts`], the block tables; never written.
        counts: int64 [num_sequences], whole blocks before each sequence's query tokens.

    """

    tables: NDArray[np.int32]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, page_table: PageTable, query_lengths: ArrayLike = 1) -> PrefixTree | None:
        """Keep of a page table what a search needs; return None where nothing is shared.

        Args:
            page_table: block tables and lengths; unchanged. One without a lineage is copied, and
                free to change afterwards.
            query_lengths: query tokens at the end of each sequence, one number for all or one each.

        """
        counts = _counts_if_shared(page_table, query_lengths)
        if counts is None:
            return None
        tables = page_table.block_tables[:, : counts.max()]
        return cls(tables if page_table.lineage is not None else tables.copy(), counts)

    @cached_property
    def nodes(self) -> list[SharedBlocks]:
        """The nodes, parents before their children; see `find_shared_blocks`."""
        return _find(self.tables, self.counts)

    @cached_property
    def num_spared(self) -> int:
        """Blocks that need not be read, of those of all sequences, if each is read once."""
        return sum((node.end - node.begin) * (node.members.size - 1) for node in self.nodes)

    def still_holds(self, later: PrefixTree) -> bool:
        """Whether a later batch has the same nodes, of the same physical blocks.

        A prefix of each sequence decides: the blocks that it shares, and the one behind them, which
        tells it from all others. Where all of these are the same, so is the tree, whatever comes
        behind. True is certain; False may also mean that the same nodes would be found: where a
        sequence gets its first whole block behind those that it shares, or all blocks have moved.

        Args:
            later: its tree, which is not searched for.

        """
        bounds, sizes, is_behind = self.bounds, *self._prefixes
        if bounds.shape != later.counts.shape:
            return False
        if not np.array_equal(np.minimum(later.counts, bounds), sizes):
            return False
        width = is_behind.shape[1]  # `later.tables` are as wide at least, since sizes are the same
        is_same = later.tables[:, :width] == self.tables[:, :width]
        return bool(np.logical_or(is_same, is_behind, out=is_same).all())

    @cached_property
    def bounds(self) -> NDArray[np.int64]:
        """One block more than each sequence shares, int64 [num_sequences]."""
        bounds = np.ones_like(self.counts)
        for node in self.nodes:  # deeper ones come later
            bounds[node.members] = node.end + 1
        return bounds

    @cached_property
    def _prefixes(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """What decides whether the tree holds.

        Returns:
            As many blocks as a sequence has of `bounds`, int64 [num_sequences], so much of it
            decides; and what of `tables` is behind that, bool.

        """
        sizes = np.minimum(self.counts, self.bounds)
        return sizes, np.arange(sizes.max()) >= sizes[:, None]


@dataclass(frozen=True)
class Unchanged:
    """Which later page tables share what one did, told by their lineage and lengths alone.

    The same blocks of a sequence decide as in `PrefixTree.still_holds`. With the same lineage they
    are what they were, so only their number is left to ask for, and that is a range of lengths.

    Worked example, block size 4, one query token each: sequences of 13 and 9 tokens that share
    their first block have three and two whole blocks, of which the first two decide. They stay the
    only ones from 9 tokens on. Had the second 8 tokens, its own whole block would be missing, and
    it could have 5 to 8.

    Attributes:
        lineage: of the page table.
        query_lengths: int64 [num_sequences].
        least: int64 [num_sequences], tokens of each sequence at least.
        most: int64 [num_sequences], and at most; None where there is no such limit.

    """

    lineage: Lineage
    query_lengths: NDArray[np.int64]
    least: NDArray[np.int64]
    most: NDArray[np.int64] | None

    @classmethod
    def since(
        cls, page_table: PageTable, query_lengths: NDArray[np.int64], tree: PrefixTree | None
    ) -> Unchanged | None:
        """Begin with a page table; None if it has no lineage.

        Args:
            page_table: of which only the lineage is kept.
            query_lengths: int64 [num_sequences], query tokens at the end of each sequence; kept.
            tree: its tree, or an earlier one that still holds for it; None where it has none.

        """
        if page_table.lineage is None:
            return None
        size = page_table.block_size
        bounds = np.ones_like(page_table.num_tokens) if tree is None else tree.bounds
        blocks = np.minimum((page_table.num_tokens - query_lengths) // size, bounds)
        least = blocks * size + query_lengths
        is_open = blocks == bounds
        most = None if is_open.all() else np.where(is_open, ANY_LENGTH, least + size - 1)
        return cls(page_table.lineage, query_lengths, least, most)

    def covers(
        self,
        page_table: PageTable,
        query_lengths: NDArray[np.int64],
        *,
        lineage_goes_on: bool | None = None,
    ) -> bool:
        """Whether a later page table has the same tree, of the same physical blocks.

        True is certain; False only says that lineage and lengths do not tell.

        Args:
            page_table: the later one.
            query_lengths: int64 [num_sequences], its query tokens.
            lineage_goes_on: whether the lineage goes on in it, if that is known.

        """
        tokens, queries = page_table.num_tokens, self.query_lengths
        return (
            (
                self.lineage.goes_on_in(page_table.lineage)
                if lineage_goes_on is None
                else lineage_goes_on
            )
            and (query_lengths is queries or bool((query_lengths == queries).all()))
            and not np.count_nonzero(tokens < self.least)
            and (self.most is None or not np.count_nonzero(tokens > self.most))
        )


def find_shared_blocks(page_table: PageTable, query_lengths: ArrayLike = 1) -> list[SharedBlocks]:
    """Find all leading blocks that sequences share, however they branch.

    Only whole blocks before a sequence's query tokens count: what is written in a step is its
    sequence's own. Entries past a sequence's end decide nothing. Where nothing is shared, the
    first column of the page table tells.

    Worked example, block size 4, one query token each: the lengths 13, 14 and 9 with the blocks
    (5, 2, 7, 1), (5, 2, 8, 3) and (5, 6, 4). The first three, three and two blocks count. All
    share block 5: a node (0, 1, members [0, 1, 2]); the first two go on with block 2: a node
    (1, 2, members [0, 1], parent 0).

    Cost: for each level of the tree a sort by one block and, as far as the level reaches, a
    comparison of all members with the first.

    Args:
        page_table: block tables and lengths; unchanged.
        query_lengths: query tokens at the end of each sequence, one number for all or one each.

    Returns:
        The nodes, parents before their children.

    """
    counts = _counts_if_shared(page_table, query_lengths)
    return [] if counts is None else _find(page_table.block_tables, counts)


def _counts_if_shared(page_table: PageTable, query_lengths: ArrayLike) -> NDArray[np.int64] | None:
    """Count whole blocks before the query tokens; None where the first column shares nothing."""
    tables = page_table.block_tables
    if not _is_any_repeated(tables[:, :1].ravel()):
        return None
    before_queries = page_table.num_tokens - np.asarray(query_lengths, np.int64)
    counts: NDArray[np.int64] = np.maximum(before_queries, 0) // page_table.block_size
    # entries of sequences without a whole block, such as padding, are often the same
    if not counts.all() and not _is_any_repeated(tables[counts > 0, 0]):
        return None
    return counts


def _is_any_repeated(blocks: NDArray[np.int32]) -> bool:
    ordered = np.sort(blocks)
    return bool((ordered[1:] == ordered[:-1]).any())


def _find(tables: NDArray[np.int32], counts: NDArray[np.int64]) -> list[SharedBlocks]:
    nodes: list[SharedBlocks] = []
    # a level of the tree: who goes on behind a node of the level before, where, and which node
    members = np.flatnonzero(counts > 0)
    begins = parents = np.zeros_like(members)
    while members.size:
        members, sizes, parents = _alike(members, parents, tables[members, begins])
        if members.size == 0:
            break
        starts = np.cumsum(sizes) - sizes
        ends = np.minimum.reduceat(counts[members], starts)
        _shorten(ends, tables, members, sizes, int(begins.min()))
        is_root = not nodes
        places = np.repeat(len(nodes) + np.arange(sizes.size), sizes)
        for start, size, end, parent in zip(
            starts.tolist(), sizes.tolist(), ends.tolist(), parents.tolist(), strict=True
        ):
            begin = 0 if is_root else nodes[parent].end
            of_node = members[start : start + size]
            nodes.append(SharedBlocks(begin, end, of_node, None if is_root else parent))
        begins = np.repeat(ends, sizes)
        goes_on = counts[members] > begins
        members, begins, parents = members[goes_on], begins[goes_on], places[goes_on]
    return nodes


def _alike(
    members: NDArray[np.int64], parents: NDArray[np.int64], blocks: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Divide members by their node and next block; leave out who is alone.

    Args:
        members: int64 [num_members], ascending in each node.
        parents: int64 [num_members], ascending.
        blocks: int32 [num_members].

    Returns:
        Members in order, ascending in each group; sizes of the groups; their `parents`.

    """
    keys = (parents << 32) + blocks
    order = keys.argsort(kind="stable")
    keys = keys[order]
    is_first = np.ones(members.size + 1, bool)
    np.not_equal(keys[1:], keys[:-1], out=is_first[1:-1])
    if is_first.all():
        return members[:0], members[:0], parents[:0]
    members, parents = members[order], parents[order]
    starts = is_first.nonzero()[0]
    starts, sizes = starts[:-1], starts[1:] - starts[:-1]
    is_kept = sizes > 1
    of_groups = np.repeat(is_kept, sizes)
    return members[of_groups], sizes[is_kept], parents[starts[is_kept]]


def _shorten(
    ends: NDArray[np.int64],
    tables: NDArray[np.int32],
    members: NDArray[np.int64],
    sizes: NDArray[np.int64],
    begin: int,
) -> None:
    """Lower each group's end to the first column in which its members' tables differ.

    Columns are compared some at a time, more each time, until all groups have ended.

    Args:
        ends: int64 [num_groups], changed.
        tables: int32 [num_sequences, max_blocks].
        members: int64 [num_members], a group after the other.
        sizes: int64 [num_groups], members of each.
        begin: column before which they are known to be the same.

    """
    starts, count = np.cumsum(sizes) - sizes, FEW_COLUMNS
    while begin < (last := int(ends.max())):
        columns = tables[members, begin : min(begin + count, last)]
        one_each = columns[:1] if sizes.size == 1 else np.repeat(columns[starts], sizes, axis=0)
        differs = columns != one_each
        if differs.any():
            first = differs.argmax(axis=1)
            first[~differs[np.arange(members.size), first]] = last  # all are the same
            np.minimum(ends, begin + np.minimum.reduceat(first, starts), out=ends)
        begin, count = begin + count, 4 * count
