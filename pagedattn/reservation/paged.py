"""PagedAttention (SOSP '23), by the project's own block manager."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pagedattn.block_manager import BlockManager
from pagedattn.memory import num_blocks_for
from pagedattn.reservation.rows import RequestError, RequestRows, check_request
from pagedattn.reservation.use import KVUse

if TYPE_CHECKING:
    from pagedattn.reservation.rows import Handles


class Paged:
    """Blocks on demand; when none is left, the last that came goes and is computed again later.

    Args:
        num_slots: slots of the memory; those after the last whole block are lost.
        max_model_len: most tokens a request may have.
        block_size: tokens a block.
        watermark: share of the pool that admission leaves to those that run, as vLLM's did.

    """

    name = "paged"
    is_static = False

    def __init__(
        self, num_slots: int, max_model_len: int, block_size: int = 16, watermark: float = 0.01
    ) -> None:
        self.num_slots = num_slots
        self.max_model_len = max_model_len
        self.manager = BlockManager(
            num_slots // block_size, block_size, prefix_caching=False, watermark=watermark
        )
        self._rows = RequestRows()
        self._ids = np.zeros(16, dtype=np.int64)

    def admit(self, prompt_tokens: int, output_tokens: int, generated: int = 0) -> int | None:
        """See `Reservation.admit`."""
        check_request(prompt_tokens, output_tokens, generated, self.max_model_len)
        manager, final = self.manager, prompt_tokens + output_tokens
        if num_blocks_for(final, manager.block_size) > manager.num_blocks:
            raise RequestError(
                f"{self.name} cannot hold one request of {prompt_tokens} and {output_tokens} "
                f"tokens in {self.num_slots} slots"
            )
        tokens = prompt_tokens + generated
        if not manager.can_allocate([tokens]):
            return None
        row = self._rows.add(tokens, final, 0)
        if row >= self._ids.size:
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
        self._ids[row] = manager.allocate([tokens])[0]
        return row

    def advance(self, handles: Handles) -> Handles:
        """See `Reservation.advance`; the last to come go first (SOSP '23, §4.5)."""
        staying = handles.size
        while not self.manager.can_append(self._ids[handles[:staying]]):
            staying -= 1
            self.finish(handles[staying : staying + 1])
        self.manager.append(self._ids[handles[:staying]])
        self._rows.tokens[handles[:staying]] += 1
        return handles[staying:]

    def finish(self, handles: Handles) -> None:
        """See `Reservation.finish`."""
        self._rows.remove(handles)
        self.manager.free(self._ids[handles])

    def use(self) -> KVUse:
        """See `Reservation.use`; counted by the block manager."""
        handles = np.flatnonzero(self._rows.live)
        order = np.argsort(self._ids[handles])
        by_id = np.argsort(self.manager.sequence_ids())
        finals = np.empty_like(handles)
        finals[by_id] = self._rows.final[handles][order]
        counted = self.manager.statistics(finals)
        return KVUse(
            counted.num_token_slots,
            counted.num_reserved_slots,
            counted.num_internal_slots,
            counted.num_external_slots,
            self.num_slots - counted.num_used_blocks * self.manager.block_size,
        )

    def offloaded(self) -> int:
        """See `Reservation.offloaded`."""
        return 0

    def check_integrity(self) -> None:
        """See `Reservation.check_integrity`."""
        self.manager.check_integrity()
        handles = np.flatnonzero(self._rows.live)
        ids = self._ids[handles]
        assert sorted(ids) == sorted(self.manager.sequence_ids()), "a request has no sequence"
        lengths = self.manager.num_tokens(ids)
        assert np.array_equal(lengths, self._rows.tokens[handles]), "lengths differ"
