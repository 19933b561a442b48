"""What every reservation knows of its running requests, as arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pagedattn.reservation.use import KVUse

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Handles = NDArray[np.int64]


class RequestError(ValueError):
    """A request cannot be served by this system, however empty it is."""


class RequestRows:
    """Rows of running requests: a handle is a row's number, and is used again.

    Attributes:
        tokens: int64 [rows], tokens that each request has stored so far.
        final: int64 [rows], tokens that it will have stored at its end.
        first: int64 [rows], tokens that were stored when it was admitted.
        reserved: int64 [rows], slots kept for it.
        live: bool [rows], whether the row is in use.

    """

    def __init__(self) -> None:
        self.tokens = np.zeros(16, dtype=np.int64)
        self.final = np.zeros(16, dtype=np.int64)
        self.first = np.zeros(16, dtype=np.int64)
        self.reserved = np.zeros(16, dtype=np.int64)
        self.live = np.zeros(16, dtype=bool)
        self._unused = list(reversed(range(16)))

    def __len__(self) -> int:
        return self.live.size - len(self._unused)

    def add(self, tokens: int, final: int, reserved: int) -> int:
        """Use a row; returns its number."""
        if not self._unused:
            old = self.live.size
            for name in ("tokens", "final", "first", "reserved", "live"):
                values = getattr(self, name)
                setattr(self, name, np.concatenate([values, np.zeros_like(values)]))
            self._unused = list(reversed(range(old, 2 * old)))
        row = self._unused.pop()
        self.first[row] = self.tokens[row] = tokens
        self.final[row], self.reserved[row] = final, reserved
        self.live[row] = True
        return row

    def remove(self, rows: Handles) -> None:
        """Stop using `rows`."""
        assert self.live[rows].all(), "a request ends twice"
        for values in (self.tokens, self.final, self.first, self.reserved):
            values[rows] = 0
        self.live[rows] = False
        self._unused += rows.tolist()

    def use(self, num_slots: float, kept: float, lost: float = 0.0) -> KVUse:
        """Use of a memory of which `kept` slots are kept for requests and `lost` for nobody."""
        stored = float(self.tokens.sum())
        to_come = float((self.final - self.tokens).sum())
        internal = kept - stored - to_come
        return KVUse(stored, to_come, internal, lost, num_slots - kept - lost)


def check_request(prompt_tokens: int, output_tokens: int, generated: int, most: int) -> None:
    """Raise `RequestError` unless a request is whole and fits the model."""
    if prompt_tokens < 1 or output_tokens < 1 or not 0 <= generated <= output_tokens:
        raise RequestError(
            f"a request needs a prompt and an output of at least 1 token, and no more generated "
            f"than its output; given {prompt_tokens}, {output_tokens} and {generated}"
        )
    if prompt_tokens + output_tokens > most:
        raise RequestError(
            f"a request of {prompt_tokens} and {output_tokens} tokens is longer than the model's "
            f"maximum of {most}"
        )
