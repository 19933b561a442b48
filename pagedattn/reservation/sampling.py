"""How much memory forks save: parallel sampling and beam search on the block manager (§6.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pagedattn.block_manager import BlockManager
from pagedattn.memory import num_blocks_for

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pagedattn.reservation.requests import Requests

_CANDIDATES = 32  # tokens that a beam may go on with


@dataclass(frozen=True)
class SharedBlocks:
    """What a run of forks held, summed over its steps.

    Attributes:
        num_unshared: blocks that the sequences would have held if nothing were shared.
        num_used: blocks that they held.
        num_copied: blocks that were copied because a fork wrote into them.

    """

    num_unshared: int
    num_used: int
    num_copied: int

    @property
    def saving(self) -> float:
        """Blocks saved by sharing, over blocks without sharing (SOSP '23, Figure 15)."""
        return 1 - self.num_used / self.num_unshared


class _Forks:
    """Requests of `width` sequences each in one block manager; all get a token a step."""

    def __init__(self, requests: Requests, width: int, block_size: int) -> None:
        if width < 1:
            raise ValueError(f"width is {width}; it must be at least 1")
        lengths = requests.prompt_tokens + requests.output_tokens
        most = num_blocks_for(lengths, block_size) * width + width  # and copies on their way
        self.width = width
        self.manager = BlockManager(int(most.sum()), block_size, prefix_caching=False)
        first = self.manager.allocate(requests.prompt_tokens)
        forks = self.manager.fork(first, width - 1) if width > 1 else first[:0]
        # int64 [num_requests, width]
        self.ids = np.column_stack([first, forks.reshape(len(requests), width - 1)])
        self.left = requests.output_tokens.copy()
        self.unshared = self.used = 0

    def keep_running(self) -> NDArray[np.bool_]:
        """Free requests that are done; returns which of those before go on."""
        running = self.left > 0
        self.manager.free(self.ids[~running].reshape(-1))
        self.ids, self.left = self.ids[running], self.left[running]
        return running

    def choose(self, parents: NDArray[np.int64]) -> None:
        """Let sequence i of a request go on from its sequence `parents[request, i]`."""
        chosen = np.take_along_axis(self.ids, parents, axis=1)
        order = np.argsort(chosen, axis=1, kind="stable")
        ordered = np.take_along_axis(chosen, order, axis=1)
        again = np.zeros_like(ordered, dtype=bool)
        again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        dead = self.ids[~np.isin(self.ids, chosen)]
        if again.any():
            ordered[again] = self.manager.fork(ordered[again])
            self.manager.free(dead)
        np.put_along_axis(self.ids, order, ordered, axis=1)

    def step(self) -> None:
        """Append a token to each sequence, and count."""
        self.manager.append(self.ids.reshape(-1))
        self.left -= 1
        counted = self.manager.statistics()
        self.unshared += counted.num_unshared_blocks
        self.used += counted.num_used_blocks

    def result(self) -> SharedBlocks:
        copied = self.manager.statistics().num_copied_blocks
        return SharedBlocks(self.unshared, self.used, copied)


def parallel_sampling(requests: Requests, width: int, block_size: int = 16) -> SharedBlocks:
    """Generate `width` outputs of each prompt, all as long as the request says (§4.4).

    Args:
        requests: all run at once, from the first step on.
        width: outputs a prompt.
        block_size: tokens a block.

    """
    forks = _Forks(requests, width, block_size)
    while forks.left.size:
        forks.step()
        forks.keep_running()
    return forks.result()


def beam_search(
    requests: Requests, width: int, rng: np.random.Generator, sharpness: float, block_size: int = 16
) -> SharedBlocks:
    """Search with `width` beams a request, over a model that is only a source of scores (§4.4).

    In every step each beam has 32 candidates for its next token. Their logits are normally
    distributed with standard deviation `sharpness`: the larger, the surer the model, and the more
    seldom a beam dies. The best `width` candidates of a request by summed log-probability go on.

    Args:
        requests: all run at once, from the first step on.
        width: beams a request.
        rng: source of the logits.
        sharpness: standard deviation of the logits, above 0.
        block_size: tokens a block.

    """
    forks = _Forks(requests, width, block_size)
    scores = np.full((len(requests), width), -np.inf)
    scores[:, 0] = 0.0  # all beams are alike: the first speaks for all
    while forks.left.size:
        logits = sharpness * rng.standard_normal((*scores.shape, _CANDIDATES))
        logits -= logits.max(axis=2, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=2, keepdims=True))
        candidates = (scores[:, :, None] + logits).reshape(len(scores), -1)
        best = np.argpartition(-candidates, width - 1, axis=1)[:, :width]
        forks.choose(best // _CANDIDATES)
        scores = np.take_along_axis(candidates, best, axis=1)
        forks.step()
        scores = scores[forks.keep_running()]
    return forks.result()
