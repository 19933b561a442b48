"""vLLM's `KVCacheManager`, driven as vLLM's scheduler drives it.

vLLM is imported when a manager is made. Written against vLLM 0.32.
"""

from __future__ import annotations

import importlib.util
import itertools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np
    from numpy.typing import NDArray

_NO_LIMIT = 1 << 40


def unavailable() -> str | None:
    """Say why vLLM's block manager cannot be used here, or None if it can."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    try:
        import vllm.v1.core.kv_cache_manager  # noqa: F401
    except ImportError as error:
        return f"vLLM cannot be imported ({error})"
    return None


class VllmBlockManager:
    """One model's blocks under vLLM, every layer with full attention.

    Requests are admitted whole, in order, one at a time, and grow by one token a step, as vLLM's
    scheduler asks of its manager: look a request's prefix up, allocate slots, count the tokens
    as computed. The scheduler's own work, its statistics and its second check that a whole prompt
    fits are left out. Hashes are made by vLLM's default algorithm.

    A request is made by `prepare` and then hashed by `hash`, so that making the object can be left
    out of a measurement.

    Args:
        num_blocks: blocks that requests can use; vLLM gets one more, for it keeps one as its
            null block.
        block_size: tokens a block.
        prefix_caching: whether full blocks are hashed and found again.

    Raises:
        RuntimeError: vLLM cannot be used; the message says why.

    """

    name = "vllm"

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        reason = unavailable()
        if reason is not None:
            raise RuntimeError(f"VllmBlockManager needs vLLM: {reason}.")
        import torch
        from vllm.config import CacheConfig
        from vllm.sampling_params import SamplingParams
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.request import Request, RequestStatus

        self.num_blocks = num_blocks
        self.block_size = block_size
        self.hash_algorithm: str = CacheConfig.prefix_caching_hash_algo
        hash_function = get_hash_fn_by_name(self.hash_algorithm)
        init_none_hash(hash_function)
        self._hasher = None
        if prefix_caching:
            self._hasher = get_request_block_hasher(block_size, hash_function)
        # the bookkeeping does not depend on what a block holds
        spec = FullAttentionSpec(
            block_size=block_size, num_kv_heads=1, head_size=1, dtype=torch.float16
        )
        self._manager = KVCacheManager(
            KVCacheConfig(
                num_blocks=num_blocks + 1,
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
            ),
            max_model_len=_NO_LIMIT,
            scheduler_block_size=block_size,
            hash_block_size=block_size,
            enable_caching=prefix_caching,
        )
        self._make_request = Request
        self._running = RequestStatus.RUNNING
        self._sampling = SamplingParams(max_tokens=_NO_LIMIT)
        self._next_id = itertools.count()

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no request holds, whether or not they can be found again."""
        return int(self._manager.block_pool.get_num_free_blocks())

    @property
    def num_cached_blocks(self) -> int:
        """Free blocks that can be found by their hash; looks at one block after the other."""
        return sum(
            block.block_hash is not None and not block.ref_cnt
            for block in self._manager.block_pool.blocks
        )

    def prepare(self, prompts: Iterable[NDArray[np.integer[Any]]]) -> list[Any]:
        """Make vLLM's requests of token ids, int [num_prompt_tokens] each; not hashed yet."""
        made = []
        for prompt in prompts:
            name = f"{next(self._next_id)}"
            request = self._make_request(name, prompt.tolist(), self._sampling, None)
            # given to the constructor, it would hash there
            request._block_hasher = self._hasher
            made.append(request)
        return made

    def tokens(self, token_ids: NDArray[np.integer[Any]]) -> list[int]:
        """Return one new token a request, int [num_requests], as `append` takes them."""
        made: list[int] = token_ids.tolist()
        return made

    def hash(self, requests: Sequence[Any]) -> None:
        """Hash the requests' full blocks; nothing without prefix caching."""
        for request in requests:
            request.update_block_hashes()

    def admit(self, requests: Sequence[Any]) -> list[int]:
        """Give each request blocks for its whole prompt; return how many tokens were cached.

        Raises ``MemoryError`` at a request that does not fit; those before it stay admitted.
        """
        manager, running = self._manager, self._running
        manager.new_step_starts()
        cached = []
        for request in requests:
            blocks, num_cached, _ = manager.get_computed_blocks(request)
            num_tokens = request.num_tokens
            slots = manager.allocate_slots(request, num_tokens - num_cached, num_cached, blocks)
            if slots is None:
                raise MemoryError(f"request {request.request_id} does not fit.")
            request.status = running
            request.num_computed_tokens = num_tokens
            cached.append(num_cached)
        return cached

    def append(self, requests: Sequence[Any], token_ids: Sequence[int] | None = None) -> None:
        """Make room for one more token of each request: a decode step.

        With `token_ids`, one for each request, the token is appended to it first, and a block
        that it fills is hashed and can be found. Raises ``MemoryError`` as `admit` does.
        """
        manager = self._manager
        manager.new_step_starts()
        if token_ids is not None:
            for request, token in zip(requests, token_ids, strict=True):
                request.append_output_token_ids(token)
        for request in requests:
            if manager.allocate_slots(request, 1) is None:
                raise MemoryError(f"request {request.request_id} cannot grow.")
            request.num_computed_tokens += 1

    def free(self, requests: Sequence[Any]) -> None:
        """Give back the requests' blocks; full ones stay findable until they are needed."""
        free = self._manager.free
        for request in requests:
            free(request)

    def reset_prefix_cache(self) -> None:
        """Forget every hash; no request may hold a block.

        Raises ``RuntimeError`` if one does.
        """
        if not self._manager.reset_prefix_cache():
            raise RuntimeError("the prefix cache cannot be reset while requests hold blocks.")
