"""Which leading blocks the sequences of a batch share, found in its page table, as a tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from pagedattn.page_table import PageTable


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

    Cost: a comparison of neighbours, after a sort of the rows that begin with a block of another.

    Args:
        page_table: block tables and lengths; unchanged.
        query_lengths: query tokens at the end of each sequence, one number for all or one each.

    Returns:
        The nodes, parents before their children.

    """
    first_blocks = page_table.block_tables[:, :1].ravel()
    if not _repeated(first_blocks).size:
        return []
    before_queries = np.maximum(page_table.num_tokens - np.asarray(query_lengths, np.int64), 0)
    counts = before_queries // page_table.block_size
    # places without a whole block have an entry that means nothing
    first_blocks = first_blocks[counts > 0]
    candidates = (counts > 0).nonzero()[0][np.isin(first_blocks, _repeated(first_blocks))]
    if candidates.size == 0:
        return []
    counts = counts[candidates]
    tables = page_table.block_tables[candidates, : counts.max()]
    # no block has this id: rows differ at the latest where one of them ends
    tables = np.where(np.arange(tables.shape[1]) < counts[:, None], tables, -1)
    # bytes in any order that is the same for all: equal beginnings become neighbours
    as_bytes = np.ascontiguousarray(tables).view(f"V{tables.itemsize * tables.shape[1]}")
    order = np.argsort(as_bytes[:, 0], kind="stable")
    tables, counts = tables[order], counts[order]
    differs = tables[1:] != tables[:-1]
    first = np.where(differs.any(axis=1), differs.argmax(axis=1), tables.shape[1])
    shared = np.minimum(first, np.minimum(counts[1:], counts[:-1]))
    return _tree(shared, candidates[order])


def _repeated(blocks: NDArray[np.int32]) -> NDArray[np.int32]:
    """Those that are there more than once, ascending; some of them several times."""
    ordered = np.sort(blocks)
    repeated: NDArray[np.int32] = ordered[1:][ordered[1:] == ordered[:-1]]
    return repeated


def _tree(shared: NDArray[np.int64], sequences: NDArray[np.int64]) -> list[SharedBlocks]:
    """Make nodes of ordered sequences.

    A node is a run of neighbours that share more blocks than those at its ends; runs are found with
    a stack, as the intervals of a suffix array are (Abouelhoda et al. 2004, §3), and only where
    the number of blocks changes.

    Args:
        shared: int64 [num_sequences - 1], blocks that neighbours share.
        sequences: int64 [num_sequences], their places in the batch.

    """
    changes = np.flatnonzero(np.diff(shared, prepend=0, append=0))
    values = np.append(shared, 0)
    open_runs: list[tuple[int, int]] = []  # blocks shared, first sequence
    found: list[tuple[int, int, int]] = []  # blocks shared, first and last sequence
    for place, value in zip(changes.tolist(), values[changes].tolist(), strict=True):
        first = place
        while open_runs and open_runs[-1][0] > value:
            depth, first = open_runs.pop()
            found.append((depth, first, place))
        if value > 0 and (not open_runs or open_runs[-1][0] < value):
            open_runs.append((value, first))
    nodes: list[SharedBlocks] = []
    around: list[tuple[int, int]] = []  # index and last sequence of the runs around the next one
    for depth, first, last in sorted(found, key=lambda run: (run[1], -run[2])):
        while around and around[-1][1] < last:
            around.pop()
        parent = around[-1][0] if around else None
        begin = 0 if parent is None else nodes[parent].end
        around.append((len(nodes), last))
        nodes.append(SharedBlocks(begin, depth, np.sort(sequences[first : last + 1]), parent))
    return nodes
