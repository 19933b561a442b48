"""Systems whose batch is one tensor: FasterTransformer, HF Transformers, FlexGen, the first TGI."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pagedattn.reservation.buddy import power_of_two_from
from pagedattn.reservation.rows import RequestError, RequestRows, check_request
from pagedattn.reservation.use import KVUse

if TYPE_CHECKING:
    from pagedattn.reservation.rows import Handles


class _StaticBatch:
    """A batch that is formed, runs, and ends when its longest request ends.

    A request that is done stays in the batch, since it is a row of the tensor; all its slots are
    then internal waste.
    """

    name = "static"
    is_static = True

    def __init__(self, num_slots: int, max_model_len: int) -> None:
        self.num_slots = num_slots
        self.max_model_len = max_model_len
        self._rows = RequestRows()
        self._width = 0  # rows of the batch, those that are done included
        self._started = False

    def _fits(self, width: int, prompt: int, output: int) -> bool:
        """Whether a batch of `width` with at most such lengths fits, at its worst."""
        raise NotImplementedError

    def _kept(self) -> tuple[float, float]:
        """Slots that are kept for the batch, and those that are lost."""
        raise NotImplementedError

    def admit(self, prompt_tokens: int, output_tokens: int, generated: int = 0) -> int | None:
        """See `Reservation.admit`; nobody is let into a batch that runs."""
        check_request(prompt_tokens, output_tokens, generated, self.max_model_len)
        if self._started:
            return None
        rows = self._rows
        prompt = max(prompt_tokens + generated, int(rows.first.max()))
        output = max(output_tokens - generated, int((rows.final - rows.first).max()))
        if not self._fits(self._width + 1, prompt, output):
            if self._width == 0:
                raise RequestError(
                    f"{self.name} cannot hold one request of {prompt_tokens} and {output_tokens} "
                    f"tokens in {self.num_slots} slots"
                )
            return None
        final = prompt_tokens + output_tokens
        self._width += 1
        return rows.add(prompt_tokens + generated, final, final)

    def advance(self, handles: Handles) -> Handles:
        """See `Reservation.advance`; nobody has to go."""
        self._started = True
        self._rows.tokens[handles] += 1
        return handles[:0]

    def finish(self, handles: Handles) -> None:
        """See `Reservation.finish`; memory comes back when the last request has ended."""
        self._rows.remove(handles)
        if not len(self._rows):
            self._width, self._started = 0, False

    def use(self) -> KVUse:
        """See `Reservation.use`."""
        return self._rows.use(self.num_slots, *self._kept())

    def offloaded(self) -> int:
        """See `Reservation.offloaded`."""
        return 0

    def check_integrity(self) -> None:
        """See `Reservation.check_integrity`."""
        rows = self._rows
        assert len(rows) <= self._width, "more requests run than the batch has rows"
        assert (rows.tokens <= rows.final).all(), "a request has more tokens than it was to have"
        assert sum(self._kept()) <= self.num_slots, "the batch is larger than the memory"
        assert self.use().internal >= 0, "a request was given too few slots"


class FasterTransformer(_StaticBatch):
    """Keeps the model's maximum length for every row of a static batch (SOSP '23, §6.1)."""

    name = "fastertransformer"

    def _fits(self, width: int, prompt: int, output: int) -> bool:
        del prompt, output
        return width * self.max_model_len <= self.num_slots

    def _kept(self) -> tuple[float, float]:
        return self._width * self.max_model_len, 0.0


class Transformers(_StaticBatch):
    """A cache that grows by one column a step, by copying it (HF Transformers, `generate`).

    Prompts are padded to the longest, and every row has a column as long as one row runs.
    `torch.cat` makes each layer's new cache beside its old one. In the caches that were tuples
    (before version 4.36) all old layers lived until the last new one was made: `copies` is 1. A
    `DynamicCache` frees each layer's at once: `copies` is 1 over the number of layers. The batch
    must leave room for that, and for requests that run to the model's maximum, as nobody knows
    how long they will be: so many columns as the longest prompt and what the shortest may generate.

    Args:
        num_slots: slots of the memory.
        max_model_len: most tokens a request may have.
        copies: size of the second copy while the cache grows, as a share of the cache.

    """

    name = "transformers"

    def __init__(self, num_slots: int, max_model_len: int, copies: float = 1.0) -> None:
        super().__init__(num_slots, max_model_len)
        self.copies = copies
        self._column = self._shortest = 0

    def _fits(self, width: int, prompt: int, output: int) -> bool:
        del output
        columns = prompt + self.max_model_len - self._shortest
        return width * columns * (1 + self.copies) <= self.num_slots

    def admit(self, prompt_tokens: int, output_tokens: int, generated: int = 0) -> int | None:
        """See `Reservation.admit`."""
        stored = prompt_tokens + generated
        before = self._shortest
        self._shortest = min(stored, before) if self._width else stored
        row = super().admit(prompt_tokens, output_tokens, generated)
        if row is None:
            self._shortest = before
        else:
            self._column = max(self._column, stored)
        return row

    def advance(self, handles: Handles) -> Handles:
        """See `Reservation.advance`; the tensor grows by a column."""
        self._column += 1
        return super().advance(handles)

    def finish(self, handles: Handles) -> None:
        """See `Reservation.finish`."""
        super().finish(handles)
        self._column = self._column if self._width else 0

    def use(self) -> KVUse:
        """See `Reservation.use`; tokens to come have no slots yet, and the copy is external."""
        cache = float(self._width * self._column)
        stored = float(self._rows.tokens.sum())
        copy = cache * self.copies
        free = self.num_slots - cache - copy
        return KVUse(stored, 0.0, cache - stored, copy, free)

    def _kept(self) -> tuple[float, float]:
        cache = float(self._width * self._column)
        return cache, cache * self.copies


class FlexGen(_StaticBatch):
    """Offline batches over GPU, host and disk (Sheng et al., ICML '23): many rows, slow steps.

    A batch's slots are kept from its beginning: the longest prompt, to which all are padded, and
    the longest output, for every row. What does not fit the GPU lies in host memory or on disk,
    and passes the bus in every step; large batches spread the cost of moving weights and cache.

    Args:
        num_slots: slots of the GPU's memory.
        max_model_len: most tokens a request may have.
        num_host_slots: slots of host memory; by default 4 times the GPU's.
        num_disk_slots: slots on disk; by default none.

    """

    name = "flexgen"

    def __init__(
        self,
        num_slots: int,
        max_model_len: int,
        num_host_slots: int | None = None,
        num_disk_slots: int = 0,
    ) -> None:
        host = 4 * num_slots if num_host_slots is None else num_host_slots
        super().__init__(num_slots + host + num_disk_slots, max_model_len)
        self.num_gpu_slots = num_slots
        self._prompt = self._output = 0

    def _fits(self, width: int, prompt: int, output: int) -> bool:
        return width * (prompt + output) <= self.num_slots

    def admit(self, prompt_tokens: int, output_tokens: int, generated: int = 0) -> int | None:
        """See `Reservation.admit`."""
        row = super().admit(prompt_tokens, output_tokens, generated)
        if row is not None:
            self._prompt = max(self._prompt, prompt_tokens + generated)
            self._output = max(self._output, output_tokens - generated)
        return row

    def finish(self, handles: Handles) -> None:
        """See `Reservation.finish`."""
        super().finish(handles)
        if not self._width:
            self._prompt = self._output = 0

    def offloaded(self) -> int:
        """See `Reservation.offloaded`."""
        return max(0, self._width * (self._prompt + self._output) - self.num_gpu_slots)

    def _kept(self) -> tuple[float, float]:
        return self._width * (self._prompt + self._output), 0.0


class TextGenerationInference:
    """TGI before its flash models (2023): requests join a running batch, which is one tensor.

    Rows are padded to the longest on every change of the batch. A request says the most tokens it
    wants (`max_new_tokens`), here the power of two from its output, as nobody knows better; it
    joins if the batch, padded to its longest row with the most tokens still to come, fits
    (`max_batch_total_tokens`).

    Args:
        num_slots: slots of the memory.
        max_model_len: most tokens a request may have.

    """

    name = "tgi"
    is_static = False

    def __init__(self, num_slots: int, max_model_len: int) -> None:
        self.num_slots = num_slots
        self.max_model_len = max_model_len
        self._rows = RequestRows()

    def _kept(self) -> int:
        """Slots that the batch may come to need."""
        rows = self._rows
        to_come = (rows.reserved - rows.tokens).max(initial=0)
        return len(rows) * int(rows.tokens.max(initial=0) + to_come)

    def admit(self, prompt_tokens: int, output_tokens: int, generated: int = 0) -> int | None:
        """See `Reservation.admit`."""
        check_request(prompt_tokens, output_tokens, generated, self.max_model_len)
        most = min(self.max_model_len, prompt_tokens + power_of_two_from(output_tokens))
        tokens = prompt_tokens + generated
        row = self._rows.add(tokens, prompt_tokens + output_tokens, most)
        if self._kept() <= self.num_slots:
            return row
        self._rows.remove(np.array([row]))
        if not len(self._rows):
            raise RequestError(
                f"{self.name} cannot hold one request of {prompt_tokens} and {output_tokens} "
                f"tokens in {self.num_slots} slots"
            )
        return None

    def advance(self, handles: Handles) -> Handles:
        """See `Reservation.advance`; nobody has to go."""
        self._rows.tokens[handles] += 1
        return handles[:0]

    def finish(self, handles: Handles) -> None:
        """See `Reservation.finish`."""
        self._rows.remove(handles)

    def use(self) -> KVUse:
        """See `Reservation.use`; padding is internal."""
        return self._rows.use(self.num_slots, self._kept())

    def offloaded(self) -> int:
        """See `Reservation.offloaded`."""
        return 0

    def check_integrity(self) -> None:
        """See `Reservation.check_integrity`."""
        rows = self._rows
        assert (rows.tokens <= rows.final).all(), "a request has more tokens than it was to have"
        assert (rows.final <= rows.reserved).all(), "a request was given too few slots"
        assert self._kept() <= self.num_slots, "the batch is larger than the memory"
