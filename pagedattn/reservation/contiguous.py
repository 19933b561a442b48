"""Orca (OSDI '22), as SOSP '23, §6.1 models it: a chunk a request, from a buddy allocator."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pagedattn.reservation.buddy import BuddyAllocator, power_of_two_from
from pagedattn.reservation.rows import RequestError, RequestRows, check_request

if TYPE_CHECKING:
    from pagedattn.reservation.rows import Handles
    from pagedattn.reservation.use import KVUse


class _Orca:
    """Requests come and go between any two steps; each has one chunk from beginning to end."""

    name = "orca"
    is_static = False

    def __init__(self, num_slots: int, max_model_len: int) -> None:
        self.num_slots = num_slots
        self.max_model_len = max_model_len
        self._memory = BuddyAllocator(num_slots)
        self._rows = RequestRows()
        self._starts: dict[int, int] = {}

    def _length(self, prompt_tokens: int, output_tokens: int) -> int:
        """Slots that a request asks for."""
        raise NotImplementedError

    def admit(self, prompt_tokens: int, output_tokens: int, generated: int = 0) -> int | None:
        """See `Reservation.admit`."""
        check_request(prompt_tokens, output_tokens, generated, self.max_model_len)
        length = min(self.max_model_len, self._length(prompt_tokens, output_tokens))
        start = self._memory.allocate(length)
        if start is None:
            if not self._starts:
                raise RequestError(
                    f"{self.name} has no chunk for {length} tokens in {self.num_slots} slots"
                )
            return None
        final = prompt_tokens + output_tokens
        row = self._rows.add(prompt_tokens + generated, final, length)
        self._starts[row] = start
        return row

    def advance(self, handles: Handles) -> Handles:
        """See `Reservation.advance`; nobody has to go."""
        self._rows.tokens[handles] += 1
        return handles[:0]

    def finish(self, handles: Handles) -> None:
        """See `Reservation.finish`."""
        self._rows.remove(handles)
        for handle in handles.tolist():
            self._memory.free(self._starts.pop(handle))

    def use(self) -> KVUse:
        """See `Reservation.use`; what the allocator rounds up is external."""
        kept = int(self._rows.reserved.sum())
        rounding = self.num_slots - self._memory.num_free - kept
        return self._rows.use(self.num_slots, kept, rounding)

    def offloaded(self) -> int:
        """See `Reservation.offloaded`."""
        return 0

    def check_integrity(self) -> None:
        """See `Reservation.check_integrity`."""
        self._memory.check_integrity()
        rows = self._rows
        assert sorted(self._starts) == np.flatnonzero(rows.live).tolist(), "chunks are lost"
        for row, start in self._starts.items():
            assert rows.reserved[row] <= self._memory.size_of(start), "a chunk is too small"
        assert (rows.tokens <= rows.final).all(), "a request has more tokens than it was to have"
        assert (rows.final <= rows.reserved).all(), "a request was given too few slots"


class OrcaMax(_Orca):
    """Keeps the model's maximum length for every request."""

    name = "orca-max"

    def _length(self, prompt_tokens: int, output_tokens: int) -> int:
        del prompt_tokens, output_tokens
        return self.max_model_len


class OrcaPow2(_Orca):
    """Keeps at most twice the output's slots: an output of 25 gets 32 (SOSP '23, §6.1)."""

    name = "orca-pow2"

    def _length(self, prompt_tokens: int, output_tokens: int) -> int:
        return prompt_tokens + power_of_two_from(output_tokens)


class OrcaOracle(_Orca):
    """Knows each output's length, which no real system does, and keeps just that."""

    name = "orca-oracle"

    def _length(self, prompt_tokens: int, output_tokens: int) -> int:
        return prompt_tokens + output_tokens
