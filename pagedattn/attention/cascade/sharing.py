"""What a batch's sequences share from step to step, and the plans that follow it."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from pagedattn.attention.batch_memory import OwnSent
from pagedattn.attention.cascade.plan import CascadePlan
from pagedattn.attention.cascade.schedule import Lengths, make_schedule
from pagedattn.shared_prefix import PrefixTree, Unchanged

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pagedattn.attention.batch import AttentionBatch
    from pagedattn.attention.batch_memory import BatchMemory
    from pagedattn.attention.cascade.costs import Layer
    from pagedattn.attention.step import Step
    from pagedattn.page_table import PageTable
    from pagedattn.shared_prefix import SharedBlocks


class SharedNow:
    """What the sequences of one step share, found when it is first asked for.

    Attributes:
        num_tokens: int64 [num_sequences], of the step.
        query_lengths: int64 [num_sequences].

    Args:
        page_table: of the step. One with a lineage is kept until it is looked at; of another, which
            may change afterwards, all that is needed is copied now.
        query_lengths: kept.

    """

    def __init__(self, page_table: PageTable, query_lengths: NDArray[np.int64]) -> None:
        self.num_tokens, self.query_lengths = page_table.num_tokens, query_lengths
        self._page_table: PageTable | None = page_table
        if page_table.lineage is None:
            self.num_tokens = page_table.num_tokens.copy()
            self.lengths = Lengths(self.num_tokens, query_lengths, page_table.block_size)
            self.tree = PrefixTree.of(page_table, query_lengths)
            self._page_table = None

    @classmethod
    def nothing(cls, lengths: Lengths) -> SharedNow:
        """Say of a step of which no more is known that nothing is shared."""
        made = cls.__new__(cls)
        made.num_tokens, made.query_lengths = lengths.num_tokens, lengths.query_lengths
        made.lengths, made._page_table, made.tree = lengths, None, None
        return made

    @cached_property
    def lengths(self) -> Lengths:
        """Of the step, as a schedule is made from."""
        assert self._page_table is not None
        return Lengths(self.num_tokens, self.query_lengths, self._page_table.block_size)

    @cached_property
    def tree(self) -> PrefixTree | None:
        """Of shared blocks; None where there are none. Its nodes are searched for by `nodes`."""
        assert self._page_table is not None
        return PrefixTree.of(self._page_table, self.query_lengths)

    @cached_property
    def spares_half(self) -> bool:
        """Whether reading shared blocks once would spare half of all K and V, or more."""
        if self.tree is None:
            return False
        spared = self.tree.num_spared * self.lengths.block_size
        return bool(2 * spared >= (self.num_tokens - self.query_lengths).sum())

    @cached_property
    def _unchanged(self) -> Unchanged | None:
        if self._page_table is None:
            return None
        return Unchanged.since(self._page_table, self.query_lengths, self.tree)

    def goes_on_in(self, later: SharedNow, *, lineage_goes_on: bool | None = None) -> bool:
        """Whether a later step has the same tree and query lengths; if so, it is told the tree.

        Lineages tell in a few comparisons of lengths; else trees are compared.

        Args:
            later: what it shares.
            lineage_goes_on: whether the lineage goes on in it, if that is known.

        """
        unchanged, table = self._unchanged, later._page_table
        queries = later.query_lengths
        if (
            unchanged is not None
            and table is not None
            and unchanged.covers(table, queries, lineage_goes_on=lineage_goes_on)
        ):
            later.tree, later._unchanged = self.tree, unchanged
            return True
        if self.tree is None or later.tree is None:
            holds = self.tree is later.tree
        elif holds := self.tree.still_holds(later.tree):
            later.tree = self.tree  # which has been searched for
        return holds and np.array_equal(self.query_lengths, queries)


class Sharing:
    """Which blocks a batch's sequences share, and a plan for each kind of layer that attends.

    Attributes:
        now: what is shared in the step of now.
        always: share whatever can be, even nothing, and not only where it pays.

    """

    def __init__(self, now: SharedNow, *, always: bool) -> None:
        self.now = now
        self.always = always
        self._plans: dict[Layer, CascadePlan | None] = {}
        self._num_changes: int | None = None  # of the batch's memory, at the last `advance`
        self._filled: CascadePlan | None = None  # whose own lengths and tables `advance` fills

    @property
    def nodes(self) -> list[SharedBlocks]:
        """The tree's nodes, searched for at the first call."""
        return [] if self.now.tree is None else self.now.tree.nodes

    @property
    def spares_half(self) -> bool:
        """Whether reading shared blocks once would spare half of all K and V now, or more."""
        return self.now.spares_half

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to share, and no plan that was made when there was."""
        return not self.always and not self._plans and self.now.tree is None

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
            schedule = make_schedule(self.nodes, self.now.lengths, layer)
            self._plans[layer] = None
            if schedule.seconds_saved > 0:
                place = batch.place_of_own()
                self._plans[layer] = made = CascadePlan(schedule, layer, batch, place)
                self._filled = made if place is not None else self._filled
        found = self._plans[layer]
        return found if found is not None and found.pays else None

    def advance(self, step: Step, batch: AttentionBatch, memory: BatchMemory) -> None:
        """Bring a step to the batch's memory, and plan what it shares, in place.

        Args:
            step: within the batch's bounds.
            batch: the one that shares.
            memory: where the batch's tensors lie.

        """
        later = SharedNow(step.page_table, step.query_lengths)
        goes_on = memory.goes_on_in(step.page_table)
        # else the memory holds a step of which this was not told
        is_known = memory.num_changes == self._num_changes
        grows = bool(self._plans) and self.now.goes_on_in(
            later, lineage_goes_on=goes_on if is_known else None
        )
        filled = self._filled if grows and is_known else None
        skipped = None if filled is None else filled.skipped
        sent = memory.write(step, goes_on=goes_on, skipped=skipped)
        has_new_blocks = memory.num_changes != self._num_changes
        self._num_changes = memory.num_changes
        self._follow(later, batch, grows=grows, has_new_blocks=has_new_blocks, sent=sent)

    def follow(self, later: SharedNow | None, batch: AttentionBatch) -> None:
        """Plan what a later step shares, in place.

        Args:
            later: what it shares; None is nothing.
            batch: the one that shares, whose tensors have been updated before.

        """
        if later is None:  # where nothing is shared the lengths only bound
            bound = np.full(batch.num_sequences, batch.max_kv_length)
            of_queries = np.zeros_like(bound)
            of_queries[:1] = batch.num_query_tokens
            later = SharedNow.nothing(Lengths(bound, of_queries, self.now.lengths.block_size))
        grows = bool(self._plans) and self.now.goes_on_in(later)
        self._num_changes = None  # whether `later` is all that the memory was told is not known
        self._follow(later, batch, grows=grows, has_new_blocks=True, sent=OwnSent.NOTHING)

    def _follow(
        self,
        later: SharedNow,
        batch: AttentionBatch,
        *,
        grows: bool,
        has_new_blocks: bool,
        sent: OwnSent,
    ) -> None:
        """Bring the plans to a later step.

        Where the tree still holds and queries are as long, as in a step of decode in which all
        sequences grow, schedules stay, and so does whether they pay.
        """
        self.now = later
        if not grows:  # where it did not pay, it is looked at anew
            self._plans = {layer: plan for layer, plan in self._plans.items() if plan is not None}
        for plan in self._plans.values():
            if plan is not None and grows:
                of_plan = sent if plan is self._filled else OwnSent.NOTHING
                plan.grow(later.num_tokens, batch, has_new_blocks=has_new_blocks, sent=of_plan)
            elif plan is not None:
                plan.update(self.nodes, later.lengths, batch)
