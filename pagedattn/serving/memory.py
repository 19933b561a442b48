"""What memory a run used, beside what the calculator and the block manager say it should."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pagedattn.block_manager import BlockManager

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pagedattn.serving.load import ServingRequest


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """What an engine says of its memory once it has started; bytes, None where it is silent.

    Attributes:
        device_bytes: memory of the device, or of the host for a CPU.
        weights: of the model.
        kv_pool: given to the KV cache.
        graphs: of captured CUDA graphs.
        in_use: of the device, by the driver's count, after the start: everybody's.
        num_blocks: blocks of the pool.
        block_size: tokens a block.
        tokens_ahead: tokens of an answer that have slots before the one received last: 1 where the
            next step is scheduled while a step runs.

    """

    device_bytes: int | None
    weights: int | None
    kv_pool: int | None
    graphs: int | None
    in_use: int | None
    num_blocks: int
    block_size: int
    tokens_ahead: int = 0


@dataclass(frozen=True, slots=True)
class MemorySample:
    """The pool after one step.

    Attributes:
        seconds: since the first request was sent.
        blocks: in use, by the engine's own metric.
        mirrored: in use in this project's block manager, which was given the same requests; None
            while a prompt may be stored in part.
        empty_slots: slots of last blocks that hold no token, by the block manager; None likewise.
        running: requests that run.
        waiting: requests that wait.

    """

    seconds: float
    blocks: int
    mirrored: int | None
    empty_slots: int | None
    running: int
    waiting: int


class Gauges(Protocol):
    """An engine's own count of its pool."""

    def usage(self) -> tuple[float, int, int]:
        """Return the share of the KV pool in use, 0 to 1, and requests running and waiting."""


@dataclass(slots=True)
class MemoryWatch:
    """Reads an engine's metrics after every step, and gives a block manager the same requests.

    A request's prompt is stored when its first token is received, and that token itself only with
    the next step: an engine that has given n tokens of an answer holds prompt + n - 1, and one
    more where it is a step ahead.

    Attributes:
        gauges: the engine's.
        manager: a pool of the engine's size.
        pool_blocks: that `usage` is a share of.
        tokens_ahead: as the engine's memory says.
        samples: one for each step.

    """

    gauges: Gauges
    manager: BlockManager
    pool_blocks: int
    tokens_ahead: int = 0
    samples: list[MemorySample] = field(default_factory=list)
    _waiting: dict[int, ServingRequest] = field(default_factory=dict)
    _ids: dict[int, int] = field(default_factory=dict)
    _left: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, gauges: Gauges, memory: EngineMemory, *, prefix_caching: bool) -> MemoryWatch:
        """Watch an engine with a pool of these blocks, one of which it keeps for itself."""
        pool = memory.num_blocks - 1
        manager = BlockManager(pool, memory.block_size, prefix_caching=prefix_caching)
        return cls(gauges, manager, pool, memory.tokens_ahead)

    def sent(self, number: int, request: ServingRequest) -> None:
        """A request waits until its first token comes."""
        self._waiting[number] = request
        self._left[number] = request.output_tokens

    def received(self, seconds: float, tokens: Sequence[tuple[int, int]]) -> None:
        """Bring the block manager to where the engine is, and compare."""
        first = [number for number, _ in tokens if number in self._waiting]
        if first:
            requests = [self._waiting.pop(number) for number in first]
            admission = self.manager.admit([request.prompt for request in requests])
            self._ids.update(zip(first, admission.sequence_ids.tolist(), strict=True))
        begun = set(first)
        grown = [
            (number, new - (1 - self.tokens_ahead if number in begun else 0))
            for number, new in tokens
            if self._left[number] > new
        ]
        grown = [(number, new) for number, new in grown if new]
        if grown:
            ids = [self._ids[number] for number, _ in grown]
            self.manager.append(ids, np.array([new for _, new in grown]))
        ended = []
        for number, new in tokens:
            self._left[number] -= new
            if self._left[number] <= 0:
                ended.append(self._ids.pop(number))
        if ended:
            self.manager.free(ended)
        self._compare(seconds)

    def _compare(self, seconds: float) -> None:
        usage, running, waiting = self.gauges.usage()
        mirrored = empty = None
        if not self._waiting and not waiting:
            state = self.manager.statistics()
            mirrored = state.num_used_blocks
            empty = state.num_internal_slots
        blocks = round(usage * self.pool_blocks)
        self.samples.append(MemorySample(seconds, blocks, mirrored, empty, running, waiting))
