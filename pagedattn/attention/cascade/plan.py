"""A schedule as tensors on the batch's device, in places that stay, for a captured CUDA graph."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from pagedattn.attention.batch_memory import OwnSent, Skipped, send, staged_for
from pagedattn.attention.cascade.schedule import Limits, is_short, make_schedule

if TYPE_CHECKING:
    import weakref

    import numpy as np
    from numpy.typing import NDArray

    from pagedattn.attention.batch import AttentionBatch
    from pagedattn.attention.cascade.costs import Layer
    from pagedattn.attention.cascade.schedule import Lengths, Schedule
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


@dataclass(frozen=True)
class KeptBatches:
    """The batches of which a call in parts is made, so that each layer of a step has the same.

    Attributes:
        schedule: of which they were made.
        batch: of which they were made; it would else be kept for as long as its plan, and so by
            itself.
        made: by whether a graph is being captured, that of the parts and that of what is each
            sequence's own.

    """

    schedule: Schedule
    batch: weakref.ref[AttentionBatch]
    made: dict[bool, tuple[AttentionBatch, AttentionBatch]]


class CascadePlan:
    """How one kind of layer attends over a batch whose sequences share blocks.

    Attributes:
        layer: heads and costs.
        tensors: read by the kernels; `update` writes them in place.
        skipped: what is not read through own lengths and tables.
        max_queries: no part has more query tokens (a bound, baked into a captured graph).
        kept: batches that calls of a step share, or None before the first.

    Args:
        schedule: the batch's, made without limits; it decides how much room there is.
        layer: heads and costs.
        batch: whose blocks are shared.
        own: where to keep own lengths, int32 [num_sequences], and own tables, int32 [num_sequences,
            max_blocks]; None makes tensors.

    """

    def __init__(
        self,
        schedule: Schedule,
        layer: Layer,
        batch: AttentionBatch,
        own: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        self.layer = layer
        self.kept: KeptBatches | None = None
        self._schedule: Schedule
        self._num_tokens: NDArray[np.int64] | None = None  # of a later step than `_schedule`
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
        if own is None:
            own = torch.empty_like(batch.kv_lengths), torch.empty_like(batch.block_tables)
        self.tensors = PartTensors(
            own_lengths=own[0],
            lengths=lengths,
            starts=starts,
            rows=rows,
            parts_of_token=parts.view(num_queries, limits.parts_of_a_token),
            own_tables=own[1],
            tables=torch.empty((limits.parts, width), dtype=torch.int32, device=device),
        )
        self._write(schedule, batch)

    @property
    def schedule(self) -> Schedule:
        """What is in the tensors."""
        if self._num_tokens is not None:
            own = self._num_tokens - self.skipped.tokens
            self._schedule, self._num_tokens = replace(self._schedule, own_lengths=own), None
        return self._schedule

    @property
    def pays(self) -> bool:
        """Whether the batch of now is faster with it than without."""
        return self._schedule.seconds_saved > 0

    def update(self, nodes: list[SharedBlocks], lengths: Lengths, batch: AttentionBatch) -> None:
        """Plan another batch in place; it shares less than it could where there is no room.

        Args:
            nodes: its tree of shared blocks.
            lengths: its lengths.
            batch: the batch, whose tensors have been updated before.

        """
        self._write(make_schedule(nodes, lengths, self.layer, self._limits), batch)

    def grow(
        self,
        num_tokens: NDArray[np.int64],
        batch: AttentionBatch,
        *,
        has_new_blocks: bool,
        sent: OwnSent,
    ) -> None:
        """Follow the batch, in place, to a step with the same tree and query lengths.

        The schedule stays but for what is each sequence's own. So do the tables of the parts: their
        entries up to the parts' lengths are the tree's, and what is behind is never read.

        Args:
            num_tokens: int64 [num_sequences], the step's lengths; kept.
            batch: the batch, whose tensors have been updated before.
            has_new_blocks: whether its block tables may have changed since the step before.
            sent: what of own lengths and tables has been updated with them.

        """
        self._num_tokens = num_tokens
        if sent is OwnSent.NOTHING:
            self._take_own_lengths(batch)
        if has_new_blocks and sent is not OwnSent.LENGTHS_AND_TABLES:
            self._take_own_tables(batch)

    def _write(self, schedule: Schedule, batch: AttentionBatch) -> None:
        self._schedule, self._num_tokens, limits = schedule, None, self._limits
        width = self._columns.shape[0]
        self.skipped = Skipped.of(schedule.skipped, schedule.block_size, width)
        staged = staged_for(self._packed)
        packed = staged.numpy()
        packed[:] = 0
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
        send(staged, self._packed)
        part_sources, part_blocks = self._of_parts
        tables = batch.block_tables[part_sources]
        torch.gather(tables, 1, self._places(part_blocks), out=self.tensors.tables)
        self._own_places = self._places(self._own)
        self._take_own_lengths(batch)
        self._take_own_tables(batch)

    def _take_own_lengths(self, batch: AttentionBatch) -> None:
        size, own = self._schedule.block_size, self.tensors.own_lengths
        torch.sub(batch.kv_lengths, self._own, alpha=size, out=own)

    def _take_own_tables(self, batch: AttentionBatch) -> None:
        torch.gather(batch.block_tables, 1, self._own_places, out=self.tensors.own_tables)

    def _places(self, first: torch.Tensor) -> torch.Tensor:
        """Where to read tables from their first entries on; int64 [len(first), max_blocks].

        Worked example: first [1] in tables of 3 blocks gives [[1, 2, 2]], which reads [5, 2, 7]
        as [2, 7, 7]. Behind a table's end is anything.
        """
        last = max(0, self._columns.shape[0] - 1)
        return (first[:, None] + self._columns).clamp_(max=last)
