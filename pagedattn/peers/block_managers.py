"""The block manager and vLLM's behind one interface, to give both the same requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pagedattn.block_manager import BlockManager

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray


class ComparedBlockManager(Protocol):
    """A block manager to be compared: what it is asked, in the form that suits it.

    `prepare` and `tokens` bring requests and tokens into the system's own form and are no part of
    its bookkeeping. The other methods are.
    """

    name: str
    num_blocks: int
    block_size: int

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no request holds, whether or not they can be found again."""

    @property
    def num_cached_blocks(self) -> int:
        """Free blocks that prompts can find."""

    def prepare(self, prompts: Iterable[NDArray[np.integer[Any]]]) -> Any:
        """Make a batch of requests of token ids, int [num_prompt_tokens] each."""

    def tokens(self, token_ids: NDArray[np.integer[Any]]) -> Any:
        """Bring one new token a request, int [num_requests], into the form of `append`."""

    def hash(self, batch: Any) -> None:
        """Hash the prompts, if that is a step before `admit`; asked once a batch."""

    def admit(self, batch: Any) -> Sequence[int] | NDArray[np.int64]:
        """Give each request blocks for its prompt; return how many of its tokens were cached."""

    def append(self, batch: Any, tokens: Any = None) -> None:
        """Make room for one more token of each request; `tokens` are what `tokens` made."""

    def free(self, batch: Any) -> None:
        """End the batch's requests; their full blocks stay findable until they are needed."""

    def reset_prefix_cache(self) -> None:
        """Forget every cached block; no request may hold one."""


@dataclass
class PagedattnBatch:
    """Requests of `PagedattnBlockManager`; `sequence_ids` is empty until they are admitted."""

    prompts: list[Any]
    lengths: NDArray[np.int64]
    sequence_ids: NDArray[np.int64]


class PagedattnBlockManager:
    """`pagedattn.BlockManager`, which takes whole batches.

    Args:
        num_blocks: blocks in the pool.
        block_size: tokens a block.
        prefix_caching: whether full blocks are hashed and found again; without, `admit` needs the
            prompts' lengths alone, as vLLM's manager does.
        from_lists: take token ids as Python lists, as vLLM does, not as arrays.

    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        prefix_caching: bool = True,
        from_lists: bool = False,
    ) -> None:
        self.name = "pagedattn_from_lists" if from_lists else "pagedattn"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.manager = BlockManager(num_blocks, block_size, prefix_caching=prefix_caching)
        self._prefix_caching = prefix_caching
        self._from_lists = from_lists

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no request holds, whether or not they can be found again."""
        return self.manager.num_free_blocks

    @property
    def num_cached_blocks(self) -> int:
        """Free blocks that prompts can find."""
        return self.manager.num_cached_blocks

    def prepare(self, prompts: Iterable[NDArray[np.integer[Any]]]) -> PagedattnBatch:
        """Make a batch of requests of token ids, int [num_prompt_tokens] each."""
        given = list(prompts)
        lengths = np.array([prompt.size for prompt in given], dtype=np.int64)
        return PagedattnBatch([self.tokens(prompt) for prompt in given], lengths, lengths[:0])

    def tokens(self, token_ids: NDArray[np.integer[Any]]) -> Any:
        """Return token ids as an array or, with `from_lists`, as a list."""
        return token_ids.tolist() if self._from_lists else token_ids

    def hash(self, batch: PagedattnBatch) -> None:
        """Do nothing: `admit` hashes."""

    def admit(self, batch: PagedattnBatch) -> NDArray[np.int64]:
        """Hash, look up and share; return each prompt's cached tokens, int64 [num_requests].

        Raises :class:`pagedattn.OutOfBlocksError`, having changed nothing.
        """
        if not self._prefix_caching:
            batch.sequence_ids = self.manager.allocate(batch.lengths)
            return np.zeros_like(batch.lengths)
        admission = self.manager.admit(batch.prompts)
        batch.sequence_ids = admission.sequence_ids
        return admission.num_cached_tokens

    def append(self, batch: PagedattnBatch, tokens: Any = None) -> None:
        """Make room for one more token of each request.

        Raises :class:`pagedattn.OutOfBlocksError`, having changed nothing.
        """
        self.manager.append(batch.sequence_ids, token_ids=tokens)

    def free(self, batch: PagedattnBatch) -> None:
        """End the batch's requests."""
        self.manager.free(batch.sequence_ids)

    def reset_prefix_cache(self) -> None:
        """Forget every cached block; no request may hold one."""
        self.manager.reset_prefix_cache()
