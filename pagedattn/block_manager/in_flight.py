"""Steps that were launched and may still read blocks."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from pagedattn.block_manager.ragged import whole_number

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray


class StepsInFlight:
    """Numbers the steps of an engine and knows which of them are not done.

    Args:
        num_blocks: blocks in the pool.

    Attributes:
        newest: number of the step that was started last; 0 before the first.

    """

    def __init__(self, num_blocks: int) -> None:
        self.newest = 0
        self._num_blocks = num_blocks
        self._num_noted = 0  # of the step to come
        self._running: deque[tuple[int, Callable[[], bool] | None]] = deque()
        # blocks that become findable with a step whose work has not been confirmed
        self._written: deque[tuple[int, list[NDArray[np.int32]]]] = deque()

    @property
    def oldest_running(self) -> int:
        """The oldest step that is not done, or the next to start."""
        return self._running[0][0] if self._running else self.newest + 1

    @property
    def newest_running(self) -> int:
        """The newest step that is not done; 0 if all are."""
        return self._running[-1][0] if self._running else 0

    def start(self, is_done: Callable[[], bool] | None) -> int:
        """Number the work that is launched now."""
        if is_done is not None and not callable(is_done):
            raise ValueError(f"is_done is {is_done!r}; it must be a function, or None")
        self.newest += 1
        self._running.append((self.newest, is_done))
        return self.newest

    def finish(self, step: int) -> None:
        """Note that `step` and those before it are done."""
        self.require_started(step)
        while self._running and self._running[0][0] <= step:
            self._running.popleft()
        while self._written and self._written[0][0] <= step:
            self._written.popleft()

    def poll(self) -> bool:
        """Finish the steps that say they are done; whether there was one."""
        done = 0
        for step, is_done in self._running:
            if is_done is None or not is_done():
                break
            done = step
        if done:
            self.finish(done)
        return done > 0

    def note_written(self, blocks: NDArray[np.int32]) -> None:
        """Keep that the next step writes `blocks`, which can be found from now on."""
        if self.newest == 0:
            return  # nothing has run yet, so if the first step fails nothing can be found
        if not self._written or self._written[-1][0] != self.newest + 1:
            self._written.append((self.newest + 1, []))
            self._num_noted = 0
        parts = self._written[-1][1]
        parts.append(blocks)
        self._num_noted += blocks.size
        if self._num_noted > self._num_blocks:  # ids repeat
            parts[:] = [np.unique(np.concatenate(parts))]
            self._num_noted = parts[0].size

    def fail(self, step: int) -> NDArray[np.int32] | None:
        """End `step` and all later ones; the blocks they were to write, None for all blocks."""
        self.require_started(step)
        if step < self.oldest_running:
            raise ValueError(f"step {step} is done, so it cannot fail")
        while self._running and self._running[-1][0] >= step:
            self._running.pop()
        if step == 1:
            self._written.clear()
            return None
        lost: list[NDArray[np.int32]] = [np.empty(0, np.int32)]
        while self._written and self._written[-1][0] >= step:
            lost.extend(self._written.pop()[1])
        return np.unique(np.concatenate(lost))

    def state(self) -> dict[str, NDArray[np.int64]]:
        """Copies of what `restore` needs; what tells that a step is done cannot be kept."""
        written = [(step, blocks) for step, parts in self._written for blocks in parts]
        return {
            "running": np.array([step for step, _ in self._running], np.int64),
            "written_steps": np.array([s for s, blocks in written for _ in blocks], np.int64),
            "written": np.array([b for _, blocks in written for b in blocks.tolist()], np.int64),
        }

    def restore(self, newest: int, state: Mapping[str, NDArray[np.int64]]) -> None:
        """Become what `state` says; the running steps wait for `finish`."""
        running = state["running"]
        if (np.diff([0, *running.tolist(), newest + 1]) < 1).any():
            raise ValueError(f"steps {running.tolist()} run, and {newest} is the newest")
        self.newest = newest
        self._running.extend((step, None) for step in state["running"].tolist())
        for step in np.unique(state["written_steps"]).tolist():
            blocks = state["written"][state["written_steps"] == step].astype(np.int32)
            self._written.append((step, [blocks]))

    def require_started(self, step: int) -> None:
        """Raise `ValueError` for a number that no step has."""
        step = whole_number(step, "a step", -(1 << 62))
        if not 1 <= step <= self.newest:
            raise ValueError(f"step {step} was never started; the newest is {self.newest}")
