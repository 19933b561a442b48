"""A schedule as tensors on the batch's device, in places that stay, for a captured CUDA graph."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from pagedattn.attention.cascade.schedule import Lengths, Limits, is_short, make_schedule
from pagedattn.shared_prefix import PrefixTree

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pagedattn.attention.batch import AttentionBatch
    from pagedattn.attention.cascade.costs import Layer
    from pagedattn.attention.cascade.schedule import Schedule
    from pagedattn.page_table import PageTable
    from pagedattn.shared_prefix import SharedBlocks

LEAST_PARTS = 32
LEAST_ROWS = 1024
LEAST_PARTS_OF_A_TOKEN = 16
"""Room that a plan has in any case, so that batches that share otherwise find some."""


@dataclass(frozen=True)
class PartTensors:
    """What the kernels read of a schedule; int32, views of one tensor but for the tables.

    Parts that are not used come first, with lengths of 0 and no queries: kernels that begin with
    the last work of a batch come to them at the end.

    Attributes:
        own_lengths: [num_sequences], tokens of each sequence behind those that are read in parts.
        lengths: [max_parts], tokens of each part.
        starts: [max_parts + 1], the parts' query tokens in `rows`.
        rows: [max_rows], query tokens of the batch, -1 where none is.
        parts_of_token: [num_query_tokens, max_parts_of_a_token], places in `rows`, then -1.
        own_tables: [num_sequences, max_blocks], block tables from the first own block on.
        tables: [max_parts, max_blocks], block tables of the parts.

    """

    own_lengths: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor
    rows: torch.Tensor
    parts_of_token: torch.Tensor
    own_tables: torch.Tensor
    tables: torch.Tensor


class CascadePlan:
    """How one kind of layer attends over a batch whose sequences share blocks.

    Attributes:
        layer: heads and costs.
        schedule: what is in the tensors.
        tensors: read by the kernels; `update` writes them in place.
        max_queries: no part has more query tokens (a bound, baked into a captured graph).

    Args:
        schedule: the batch's, made without limits; it decides how much room there is.
        layer: heads and costs.
        batch: whose blocks are shared.

    """

    def __init__(self, schedule: Schedule, layer: Layer, batch: AttentionBatch) -> None:
        self.layer = layer
        self.schedule: Schedule
        num_queries, parts_of_a_token = schedule.parts_of_token.shape
        most = schedule.most_queries
        self.max_queries = num_queries
        if most > 0 and is_short(most, layer):
            # as many as the kernel's columns hold anyway
            columns = next(columns for columns in (8, 16, 32) if most * layer.group <= columns)
            self.max_queries = min(columns, layer.short_rows) // layer.group
        self._limits = limits = Limits(
            parts=max(schedule.lengths.size, LEAST_PARTS),
            rows=max(schedule.rows.size, num_queries, min(LEAST_ROWS, 4 * num_queries)),
            parts_of_a_token=max(parts_of_a_token, LEAST_PARTS_OF_A_TOKEN),
            queries=self.max_queries,
        )
        device, width = batch.device, batch.block_tables.shape[1]
        self._sizes = [batch.num_sequences, *[limits.parts] * 3, limits.parts + 1, limits.rows]
        self._sizes.append(num_queries * limits.parts_of_a_token)
        self._packed = torch.empty(sum(self._sizes), dtype=torch.int32, device=device)
        views = torch.split(self._packed, self._sizes)
        skipped, sources, first_blocks, lengths, starts, rows, parts = views
        self._columns = torch.arange(width, device=device)
        self._own = skipped
        self._of_parts = sources, first_blocks
        self.tensors = PartTensors(
            own_lengths=torch.empty_like(batch.kv_lengths),
            lengths=lengths,
            starts=starts,
            rows=rows,
            parts_of_token=parts.view(num_queries, limits.parts_of_a_token),
            own_tables=torch.empty((batch.num_sequences, width), dtype=torch.int32, device=device),
            tables=torch.empty((limits.parts, width), dtype=torch.int32, device=device),
        )
        self._write(schedule, batch)

    @property
    def pays(self) -> bool:
        """Whether the batch of now is faster with it than without."""
        return self.schedule.seconds_saved > 0

    def update(self, nodes: list[SharedBlocks], lengths: Lengths, batch: AttentionBatch) -> None:
        """Plan another batch in place; it shares less than it could where there is no room.

        Args:
            nodes: its tree of shared blocks.
            lengths: its lengths.
            batch: the batch, whose tensors have been updated before.

        """
        self._write(make_schedule(nodes, lengths, self.layer, self._limits), batch)

    def grow(self, lengths: Lengths, batch: AttentionBatch) -> None:
        """Follow the batch, in place, to a step with the same tree and query lengths.

        The schedule stays but for what is each sequence's own. So do the tables of the parts: their
        entries up to the parts' lengths are the tree's, and what is behind is never read.

        Args:
            lengths: the step's lengths.
            batch: the batch, whose tensors have been updated before.

        """
        own = lengths.num_tokens - self.schedule.skipped * lengths.block_size
        self.schedule = replace(self.schedule, own_lengths=own)
        self._follow(batch)

    def _write(self, schedule: Schedule, batch: AttentionBatch) -> None:
        self.schedule, limits = schedule, self._limits
        packed = np.zeros(self._packed.shape[0], np.int32)
        ends = list(itertools.accumulate(self._sizes))
        skipped, sources, first_blocks, lengths, starts, rows, parts = (
            packed[end - size : end] for size, end in zip(self._sizes, ends, strict=True)
        )
        idle = limits.parts - schedule.lengths.size
        skipped[:] = schedule.skipped
        sources[idle:] = schedule.sources
        first_blocks[idle:] = schedule.first_blocks
        lengths[idle:] = schedule.lengths
        starts[idle:] = schedule.starts
        rows[:] = -1
        rows[: schedule.rows.size] = schedule.rows
        parts[:] = -1
        columns = schedule.parts_of_token.shape[1]
        parts.reshape(-1, limits.parts_of_a_token)[:, :columns] = schedule.parts_of_token
        self._packed.copy_(torch.from_numpy(packed))
        part_sources, part_blocks = self._of_parts
        tables = batch.block_tables[part_sources]
        torch.gather(tables, 1, self._places(part_blocks), out=self.tensors.tables)
        self._own_places = self._places(self._own)
        self._follow(batch)

    def _follow(self, batch: AttentionBatch) -> None:
        """Take own lengths and own tables from the batch, on its device: two launches."""
        made, block_size = self.tensors, self.schedule.block_size
        torch.sub(batch.kv_lengths, self._own, alpha=block_size, out=made.own_lengths)
        torch.gather(batch.block_tables, 1, self._own_places, out=made.own_tables)

    def _places(self, first: torch.Tensor) -> torch.Tensor:
        """Where to read tables from their first entries on; int64 [len(first), max_blocks].

        Worked example: first [1] in tables of 3 blocks gives [[1, 2, 2]], which reads [5, 2, 7]
        as [2, 7, 7]. Behind a table's end is anything.
        """
        last = max(0, self._columns.shape[0] - 1)
        return (first[:, None] + self._columns).clamp_(max=last)


class Sharing:
    """Which blocks a batch's sequences share, and a plan for each kind of layer that attends.

    It keeps copies of all it needs: the tree is searched for when a layer first asks for a plan.

    Attributes:
        tree: of shared blocks, or None where there are none.
        lengths: of the batch.
        always: share whatever can be, even nothing, and not only where it pays.

    Args:
        page_table: of the batch.
        query_lengths: int64 [num_sequences].
        always: as above.

    """

    def __init__(
        self, page_table: PageTable, query_lengths: NDArray[np.int64], *, always: bool
    ) -> None:
        self.tree = PrefixTree.of(page_table, query_lengths)
        self.lengths = Lengths(
            page_table.num_tokens.copy(), query_lengths.copy(), page_table.block_size
        )
        self.always = always
        self._plans: dict[Layer, CascadePlan | None] = {}

    @property
    def nodes(self) -> list[SharedBlocks]:
        """The tree's nodes, searched for at the first call."""
        return [] if self.tree is None else self.tree.nodes

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to share, and no plan that was made when there was."""
        return self.tree is None and not self.always and not self._plans

    def plan(self, layer: Layer, batch: AttentionBatch) -> CascadePlan | None:
        """Return the plan for a layer, made at the first call; None where there is none to follow.

        While a CUDA graph is captured no plan is made: whoever captures runs the same call before.

        Args:
            layer: heads and costs.
            batch: the one that shares.

        """
        if self.is_idle:
            return None
        if layer not in self._plans:
            if batch.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return None
            schedule = make_schedule(self.nodes, self.lengths, layer)
            pays = schedule.seconds_saved > 0
            self._plans[layer] = CascadePlan(schedule, layer, batch) if pays else None
        found = self._plans[layer]
        return found if found is not None and found.pays else None

    def update(self, other: Sharing | None, batch: AttentionBatch) -> None:
        """Plan what another batch shares, in place.

        Where the tree still holds and queries are as long, as in a step of decode in which all
        sequences grow, schedules stay, and so does whether they pay.

        Args:
            other: what it shares; None is nothing.
            batch: the one that shares, whose tensors have been updated before.

        """
        tree, queries = self.tree, self.lengths.query_lengths
        if other is not None:
            self.tree, self.lengths = other.tree, other.lengths
        else:  # where nothing is shared the lengths only bound
            bound = np.full(batch.num_sequences, batch.max_kv_length)
            of_queries = np.zeros_like(bound)
            of_queries[:1] = batch.num_query_tokens
            self.tree, self.lengths = None, Lengths(bound, of_queries, self.lengths.block_size)
        if not self._plans:
            return
        if tree is None or self.tree is None:
            holds = tree is self.tree
        elif holds := tree.still_holds(self.tree):
            self.tree = tree  # which has been searched for
        grows = holds and np.array_equal(queries, self.lengths.query_lengths)
        if not grows:  # where it did not pay, it is looked at anew
            self._plans = {layer: plan for layer, plan in self._plans.items() if plan is not None}
        for plan in self._plans.values():
            if plan is not None and grows:
                plan.grow(self.lengths, batch)
            elif plan is not None:
                plan.update(self.nodes, self.lengths, batch)
