"""Token ids of prompts: drawn at random, or made from the block hashes of a trace."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from pagedattn.workloads.traces import Request

_TOKEN_BITS = 17
VOCABULARY = 1 << _TOKEN_BITS
"""Token ids are below it: about as many as Llama 3 has."""

_NAME_TOKENS = 4  # they spell a hash of up to 64 bits
_MULTIPLIER = 0x9E3779B97F4A7C15


def random_prompts(rng: np.random.Generator, lengths: Iterable[int]) -> list[npt.NDArray[np.int32]]:
    """Draw a prompt of each length, int32 ``[length]``, uniformly from the vocabulary."""
    return [rng.integers(0, VOCABULARY, length, dtype=np.int32) for length in lengths]


def prompt_of_hashes(
    hashes: Sequence[int], block_tokens: int, last_token: int = 0
) -> npt.NDArray[np.int32]:
    """Make a prompt whose blocks are equal exactly where their hashes are.

    Each hash, 0 or more, stands for `block_tokens` tokens that follow from it alone: the first
    four spell it, the others are mixed from it. One token comes after them all, `last_token`, so
    that even the last of these blocks may be taken from a cache. Returns int32
    ``[len(hashes) * block_tokens + 1]``. Raises ``ValueError`` for fewer than 4 tokens a block.

        >>> one, two = prompt_of_hashes([7, 8], 6), prompt_of_hashes([7, 9], 6, last_token=1)
        >>> (one == two).tolist()
        [True, True, True, True, True, True, False, True, True, True, False, False, False]
    """
    if block_tokens < _NAME_TOKENS:
        raise ValueError(f"block_tokens must be {_NAME_TOKENS} or more, not {block_tokens}.")
    values = np.array(hashes, dtype=np.uint64)[:, None]
    places = np.arange(block_tokens, dtype=np.uint64)
    mixed = (values * np.uint64(block_tokens) + places) * np.uint64(_MULTIPLIER)
    mixed >>= np.uint64(64 - _TOKEN_BITS)
    shifts = np.uint64(_TOKEN_BITS) * places[:_NAME_TOKENS]
    mixed[:, :_NAME_TOKENS] = (values >> shifts) % np.uint64(VOCABULARY)
    prompt = np.empty(mixed.size + 1, dtype=np.int32)
    prompt[:-1] = mixed.reshape(-1)
    prompt[-1] = last_token
    return prompt


def count_repeated_blocks(requests: Iterable[Request]) -> tuple[int, int]:
    """Count a trace's hashed blocks: those that an earlier request had, and all.

    Their ratio is the hit rate of a prefix cache that never forgets.
    """
    seen: set[int] = set()
    num_repeated = num_blocks = 0
    for request in requests:
        num_repeated += sum(value in seen for value in request.prefix_hashes)
        num_blocks += len(request.prefix_hashes)
        seen.update(request.prefix_hashes)
    return num_repeated, num_blocks
