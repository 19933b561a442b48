"""Which leading blocks the sequences of a batch share, found in its page table, as a tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from pagedattn.page_table import PageTable


FEW_COLUMNS = 64


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
    tables = page_table.block_tables
    if not _is_any_repeated(tables[:, :1].ravel()):
        return []
    before_queries = np.maximum(page_table.num_tokens - np.asarray(query_lengths, np.int64), 0)
    counts = before_queries // page_table.block_size
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


def _is_any_repeated(blocks: NDArray[np.int32]) -> bool:
    ordered = np.sort(blocks)
    return bool((ordered[1:] == ordered[:-1]).any())


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
