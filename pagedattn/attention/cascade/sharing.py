"""What a batch's sequences share from step to step, and the plans that follow it."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from pagedattn.attention.cascade.plan import CascadePlan
from pagedattn.attention.cascade.schedule import Lengths, make_schedule
from pagedattn.shared_prefix import PrefixTree, Unchanged

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pagedattn.attention.batch import AttentionBatch
    from pagedattn.attention.cascade.costs import Layer
    from pagedattn.page_table import PageTable
    from pagedattn.shared_prefix import SharedBlocks


class SharedNow:
    """What the sequences of one step share, found when it is first asked for.

    Attributes:
        lengths: of the step.

    Args:
        page_table: of the step. One with a lineage is kept until it is looked at; of another, which
            may change afterwards, all that is needed is copied now.
        query_lengths: int64 [num_sequences]; kept.

    """

    def __init__(self, page_table: PageTable, query_lengths: NDArray[np.int64]) -> None:
        tokens, stays = page_table.num_tokens, page_table.lineage is not None
        tokens = tokens if stays else tokens.copy()
        self.lengths = Lengths(tokens, query_lengths, page_table.block_size)
        self._page_table = page_table if stays else None
        if not stays:
            self.tree = PrefixTree.of(page_table, query_lengths)

    @classmethod
    def nothing(cls, lengths: Lengths) -> SharedNow:
        """Say of a step of which no more is known that nothing is shared."""
        made = cls.__new__(cls)
        made.lengths, made._page_table, made.tree = lengths, None, None
        return made

    @cached_property
    def tree(self) -> PrefixTree | None:
        """Of shared blocks; None where there are none. Its nodes are searched for by `nodes`."""
        assert self._page_table is not None
        return PrefixTree.of(self._page_table, self.lengths.query_lengths)

    @cached_property
    def _unchanged(self) -> Unchanged | None:
        if self._page_table is None:
            return None
        return Unchanged.since(self._page_table, self.lengths.query_lengths, self.tree)

    def goes_on_in(self, later: SharedNow) -> bool:
        """Whether a later step has the same tree and query lengths; if so, it is told the tree.

        Lineages tell in a few comparisons of lengths; else trees are compared.
        """
        unchanged, table = self._unchanged, later._page_table
        queries = later.lengths.query_lengths
        if unchanged is not None and table is not None and unchanged.covers(table, queries):
            later.tree, later._unchanged = self.tree, unchanged
            return True
        if self.tree is None or later.tree is None:
            holds = self.tree is later.tree
        elif holds := self.tree.still_holds(later.tree):
            later.tree = self.tree  # which has been searched for
        return holds and np.array_equal(self.lengths.query_lengths, queries)


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
        self._num_changes = -1  # of the batch's memory, at the last step
        self._filled: CascadePlan | None = None  # whose own lengths the batch's `advance` fills

    @property
    def nodes(self) -> list[SharedBlocks]:
        """The tree's nodes, searched for at the first call."""
        return [] if self.now.tree is None else self.now.tree.nodes

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
                place = batch.place_of_own_lengths()
                self._plans[layer] = made = CascadePlan(schedule, layer, batch, place)
                self._filled = made if place is not None else self._filled
        found = self._plans[layer]
        return found if found is not None and found.pays else None

    def goes_on_in(self, later: SharedNow) -> bool:
        """Whether plans can follow to a later step as they are; False if there are none."""
        return bool(self._plans) and self.now.goes_on_in(later)

    def own_lengths(self, later: SharedNow) -> NDArray[np.int64] | None:
        """Own lengths in a later step, for the plan that keeps them in the batch's memory.

        None where there is no such plan.
        """
        filled = self._filled
        return None if filled is None else filled.own_lengths(later.lengths.num_tokens)

    def follow(
        self,
        later: SharedNow | None,
        batch: AttentionBatch,
        *,
        grows: bool | None = None,
        has_own_lengths: bool = False,
    ) -> None:
        """Plan what a later step shares, in place.

        Where the tree still holds and queries are as long, as in a step of decode in which all
        sequences grow, schedules stay, and so does whether they pay.

        Args:
            later: what it shares; None is nothing.
            batch: the one that shares, whose tensors have been updated before.
            grows: what `goes_on_in` says of it; None asks.
            has_own_lengths: whether what `own_lengths` returned is in its place.

        """
        if later is None:  # where nothing is shared the lengths only bound
            bound = np.full(batch.num_sequences, batch.max_kv_length)
            of_queries = np.zeros_like(bound)
            of_queries[:1] = batch.num_query_tokens
            later = SharedNow.nothing(Lengths(bound, of_queries, self.now.lengths.block_size))
        grows = self.goes_on_in(later) if grows is None else grows
        self.now = later
        memory = batch.memory
        has_new_blocks = memory is None or memory.num_changes != self._num_changes
        self._num_changes = 0 if memory is None else memory.num_changes
        if not grows:  # where it did not pay, it is looked at anew
            self._plans = {layer: plan for layer, plan in self._plans.items() if plan is not None}
        for plan in self._plans.values():
            if plan is not None and grows:
                plan.grow(
                    later.lengths.num_tokens,
                    batch,
                    has_new_blocks=has_new_blocks,
                    has_own_lengths=has_own_lengths and plan is self._filled,
                )
            elif plan is not None:
                plan.update(self.nodes, later.lengths, batch)
