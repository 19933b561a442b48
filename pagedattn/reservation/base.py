"""What a serving system's way to reserve KV memory must offer, to be compared with others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pagedattn.reservation.rows import Handles
    from pagedattn.reservation.use import KVUse


class Reservation(Protocol):
    """Keeps KV memory for requests, one system's way; no tensors, only slots.

    Attributes:
        name: the system's.
        num_slots: slots of the memory; a slot holds one token's K and V over all layers.
        max_model_len: most tokens a request may have, prompt and output.
        is_static: whether a batch is formed before its first step and takes in nobody later.

    """

    name: str
    num_slots: int
    max_model_len: int
    is_static: bool

    def admit(self, prompt_tokens: int, output_tokens: int, generated: int = 0) -> int | None:
        """Keep memory for one more request, whose prompt is then stored.

        Args:
            prompt_tokens: tokens of its prompt.
            output_tokens: tokens it will generate; only an oracle looks at them.
            generated: tokens of the output that it has already, and that are stored with the
                prompt: a request that was preempted, or a snapshot of a running system.

        Returns:
            A handle, or None where there is no room now; then nothing has changed.

        Raises:
            RequestError: it would not fit if it were alone.

        """

    def advance(self, handles: Handles) -> Handles:
        """Store one more token of each running request.

        Args:
            handles: int64 [num_running], all that run, in order of arrival.

        Returns:
            int64, those that had to go for the others' sake; they hold nothing any longer.

        """

    def finish(self, handles: Handles) -> None:
        """End requests: int64 [num_finished]."""

    def use(self) -> KVUse:
        """Say what the slots are used for now."""

    def offloaded(self) -> int:
        """Slots in use that are not in the GPU's memory, and must pass a bus in every step."""

    def check_integrity(self) -> None:
        """Raise `AssertionError` if the books are wrong."""
