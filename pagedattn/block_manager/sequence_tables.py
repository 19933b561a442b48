"""A block table for each sequence and layer group."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pagedattn.block_manager.block_lists import BlockLists
from pagedattn.block_manager.ragged import ragged
from pagedattn.block_manager.sequence_rows import SequenceRows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pagedattn.block_manager.layer_groups import LayerGroups


class SequenceTables:
    """Rows of sequences, and their block tables: list `row * num_groups + group`.

    Attributes:
        rows: what is known of each sequence.
        lists: the block tables of all layer groups.
        groups: the layer groups.

    """

    def __init__(self, groups: LayerGroups, tail_size: int) -> None:
        self.groups = groups
        self.rows = SequenceRows(tail_size)
        self.lists = BlockLists(self.rows.capacity * groups.count)

    def blocks_for(self, num_tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Blocks that hold so many tokens: ceil(n / block_size)."""
        return -(-num_tokens // self.groups.block_size)

    def reserve(self, num_new: int) -> None:
        """Make room for `num_new` more sequences."""
        missing = self.rows.num_missing(num_new)
        if missing:
            self.rows.grow(missing)
            self.lists.add_lists(missing * self.groups.count)

    def lists_of(self, rows: NDArray[np.int64], group: int) -> NDArray[np.int64]:
        """Lists of one layer group; int64 [num_rows]."""
        return rows * self.groups.count + group if self.groups.count > 1 else rows

    def all_lists_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Lists of all layer groups, row after row; int64 [num_rows * num_groups]."""
        if self.groups.count == 1:
            return rows
        return (rows[:, None] * self.groups.count + np.arange(self.groups.count)).reshape(-1)

    def per_list(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """A row's value for each of its lists, in the order of `all_lists_of`."""
        return np.repeat(values, self.groups.count) if self.groups.count > 1 else values

    def held(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places in `lists.entries` of all blocks that `rows` hold, in logical order."""
        lists = self.all_lists_of(rows)
        ends = self.per_list(self.blocks_for(self.rows.num_tokens[rows]))
        return self.lists.addresses(lists, self.lists.first[lists], ends)

    def tails_first(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places in `lists.entries` of all blocks that `rows` hold, in the order to evict them.

        The last row's before the others', and of each row, whatever the layer group, a later
        logical block before an earlier one, since a prefix is of use only as a whole.
        """
        if self.groups.count == 1:
            return self.held(rows)[::-1]
        lists = self.all_lists_of(rows)
        first = self.lists.first[lists]
        numbers, columns = ragged(first, self.per_list(self.blocks_for(self.rows.num_tokens[rows])))
        order = np.lexsort((columns, numbers // self.groups.count))[::-1]
        return (self.lists.start[lists[numbers]] + columns)[order]

    def at(
        self, rows: NDArray[np.int64], group: int, columns: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Places in `lists.entries` of one column of each row."""
        return self.lists.start[self.lists_of(rows, group)] + columns
