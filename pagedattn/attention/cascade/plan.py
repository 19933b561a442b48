"""A schedule as tensors on the batch's device, in places that stay, for a captured CUDA graph."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from pagedattn.attention.cascade.schedule import Lengths, Limits, is_short, make_schedule

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pagedattn.attention.batch import AttentionBatch
    from pagedattn.attention.cascade.costs import Layer
    from pagedattn.attention.cascade.schedule import Schedule
    from pagedattn.shared_prefix import SharedBlocks

    _Decisive = tuple[list[SharedBlocks], NDArray[np.int64]]
    """The tree and the query lengths, from which a schedule follows but for own lengths."""

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
        self._made_for: _Decisive | None = None
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

        Where the same sequences share as much as before, as in a step in which all of them grow,
        the schedule stays.

        Args:
            nodes: its tree of shared blocks.
            lengths: its lengths.
            batch: the batch, whose tensors have been updated before.

        """
        made_for = nodes, lengths.query_lengths
        if self._made_for is not None and _have_one_schedule(self._made_for, made_for):
            own = lengths.num_tokens - self.schedule.skipped * lengths.block_size
            self.schedule = replace(self.schedule, own_lengths=own)
            self._follow(batch)
        else:
            self._write(make_schedule(nodes, lengths, self.layer, self._limits), batch)
        self._made_for = made_for

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
        self._follow(batch)

    def _follow(self, batch: AttentionBatch) -> None:
        """Take lengths and tables from the batch, on its device."""
        made, tables = self.tensors, batch.block_tables
        own_begins = self._own * self.schedule.block_size
        torch.sub(batch.kv_lengths, own_begins, out=made.own_lengths)
        self._read_from(tables, self._own, made.own_tables)
        part_sources, part_blocks = self._of_parts
        self._read_from(tables[part_sources], part_blocks, made.tables)

    def _read_from(self, tables: torch.Tensor, first: torch.Tensor, out: torch.Tensor) -> None:
        """Write each table's entries from its first one on; behind a table's end is anything.

        Worked example: the tables [[5, 2, 7]] with first [1] become [[2, 7, 7]].
        """
        places = (first[:, None] + self._columns).clamp_(max=max(0, tables.shape[1] - 1))
        torch.gather(tables, 1, places, out=out)


def _have_one_schedule(one: _Decisive, other: _Decisive) -> bool:
    """Whether two batches get the same schedule, but for what is each sequence's own."""
    (nodes, queries), (other_nodes, other_queries) = one, other
    return (
        len(nodes) == len(other_nodes)
        and np.array_equal(queries, other_queries)
        and all(
            (a.begin, a.end, a.parent) == (b.begin, b.end, b.parent)
            and np.array_equal(a.members, b.members)
            for a, b in zip(nodes, other_nodes, strict=True)
        )
    )


class Sharing:
    """Which blocks a batch's sequences share, and a plan for each kind of layer that attends.

    Args:
        nodes: the tree of shared blocks.
        lengths: of the batch.
        always: share whatever can be, even nothing, and not only where it pays.

    """

    def __init__(self, nodes: list[SharedBlocks], lengths: Lengths, *, always: bool) -> None:
        self.nodes = nodes
        self.lengths = lengths
        self.always = always
        self._plans: dict[Layer, CascadePlan | None] = {}

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to share, and no plan that was made when there was."""
        return not self.nodes and not self.always and not self._plans

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

        Args:
            other: what it shares; None is nothing.
            batch: the one that shares, whose tensors have been updated before.

        """
        if other is not None:
            self.nodes, self.lengths = other.nodes, other.lengths
        else:  # where nothing is shared the lengths only bound
            bound = np.full(batch.num_sequences, batch.max_kv_length)
            queries = np.zeros_like(bound)
            queries[:1] = batch.num_query_tokens
            self.nodes, self.lengths = [], Lengths(bound, queries, self.lengths.block_size)
        # where it did not pay, it is looked at anew
        self._plans = {layer: plan for layer, plan in self._plans.items() if plan is not None}
        for plan in self._plans.values():
            assert plan is not None
            plan.update(self.nodes, self.lengths, batch)
