"""What the blocks of a pool are used for, and what is wasted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pagedattn.block_manager.state import ManagerState


@dataclass(frozen=True)
class BlockStatistics:
    """A snapshot of counts; nothing is kept up to date for it but the counters at the end.

    Blocks: used + cached + empty + deferred = all. Slots of used blocks, by the causes of the
    paper's Figure 2: token states + reservation + internal + external = all of them.

    Attributes:
        num_blocks: blocks in the pool.
        num_used_blocks: blocks that sequences refer to.
        num_cached_blocks: free blocks whose contents can still be found.
        num_empty_blocks: free blocks without such contents.
        num_deferred_blocks: unreferenced blocks that steps in flight may still read.
        num_shared_blocks: used blocks that more than one block-table entry names.
        num_unshared_blocks: blocks that the sequences would hold if nothing were shared.
        num_token_slots: slots that hold a token's K and V.
        num_reserved_slots: empty slots that a known later token will fill.
        num_internal_slots: slots of used blocks that hold nothing, and will not as far as is
            known: internal fragmentation, less than one block a sequence and layer group.
        num_external_slots: slots that are free but cannot be handed out: none, as any free block
            serves any sequence.
        num_lookup_tokens: prompt tokens that were looked up in the prefix cache so far.
        num_hit_tokens: those of them that it held.
        num_evicted_blocks: blocks with findable contents that were reused so far.
        num_copied_blocks: blocks copied on write so far.
        num_swapped_out_blocks: blocks copied to the host so far.
        num_swapped_in_blocks: blocks copied back so far.

    """

    num_blocks: int
    num_used_blocks: int
    num_cached_blocks: int
    num_empty_blocks: int
    num_deferred_blocks: int
    num_shared_blocks: int
    num_unshared_blocks: int
    num_token_slots: int
    num_reserved_slots: int
    num_internal_slots: int
    num_external_slots: int
    num_lookup_tokens: int
    num_hit_tokens: int
    num_evicted_blocks: int
    num_copied_blocks: int
    num_swapped_out_blocks: int
    num_swapped_in_blocks: int

    @property
    def hit_rate(self) -> float:
        """Share of the tokens looked up that the prefix cache held; 0 before the first."""
        return self.num_hit_tokens / max(1, self.num_lookup_tokens)

    @property
    def waste(self) -> float:
        """Share of the used blocks' slots that hold no token; 0 if none are used."""
        wasted = self.num_reserved_slots + self.num_internal_slots + self.num_external_slots
        return wasted / max(1, wasted + self.num_token_slots)

    @classmethod
    def of(
        cls, manager: ManagerState, final_num_tokens: NDArray[np.int64] | None
    ) -> BlockStatistics:
        """Count; linear in the pool and the block tables."""
        pool, cache, tables = manager._pool, manager._cache, manager._tables
        size = manager.block_size
        rows = tables.rows.live_rows()
        if final_num_tokens is not None and final_num_tokens.size != rows.size:
            raise ValueError(
                f"{final_num_tokens.size} final lengths were given for {rows.size} sequences"
            )
        resident = ~tables.rows.swapped[rows]
        lengths = tables.rows.num_tokens[rows]
        finals = lengths if final_num_tokens is None else np.maximum(final_num_tokens, lengths)
        rows, lengths, finals = rows[resident], lengths[resident], finals[resident]
        references = pool.ref_counts(np.arange(pool.num_blocks, dtype=np.int32))
        used = int(np.count_nonzero(references))
        # a block's slots are counted once, for the sequence of its owners that fills most
        filled, reserved = np.zeros((2, pool.num_blocks), dtype=np.int64)
        spare = -lengths % size
        last = lengths // size
        partly = np.flatnonzero(spare)
        filled[references > 0] = size
        for group in range(tables.groups.count):
            blocks = tables.lists.entries[tables.at(rows[partly], group, last[partly])]
            filled[blocks] = size - spare[partly]
            coming = np.minimum(finals - lengths, spare)[partly]
            np.maximum.at(reserved, blocks, coming)
        num_token_slots, num_reserved = int(filled.sum()), int(reserved.sum())
        return cls(
            num_blocks=pool.num_blocks,
            num_used_blocks=used,
            num_cached_blocks=pool.num_cached,
            num_empty_blocks=pool.num_free - pool.num_cached,
            num_deferred_blocks=pool.num_deferred,
            num_shared_blocks=int(np.count_nonzero(references > 1)),
            num_unshared_blocks=int(references.sum()),
            num_token_slots=num_token_slots,
            num_reserved_slots=num_reserved,
            num_internal_slots=used * size - num_token_slots - num_reserved,
            num_external_slots=0,
            num_lookup_tokens=cache.num_lookup_tokens if cache else 0,
            num_hit_tokens=cache.num_hit_tokens if cache else 0,
            num_evicted_blocks=pool.num_evicted,
            num_copied_blocks=manager.num_copied_blocks,
            num_swapped_out_blocks=manager.num_swapped_out_blocks,
            num_swapped_in_blocks=manager.num_swapped_in_blocks,
        )
