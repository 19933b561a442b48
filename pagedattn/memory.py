"""What a KV cache costs: plain arithmetic on a model's numbers.

Source: PagedAttention (SOSP 2023, arXiv 2309.06180), section 3 for the bytes of a token and
Table 1 for the blocks that fit.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, overload

import numpy as np

from pagedattn.config import CACHE_DTYPES, DTYPE_BYTES, ModelConfig, one_of, positive_int

if TYPE_CHECKING:
    import numpy.typing as npt

_INT64_MAX = np.iinfo(np.int64).max


def kv_bytes_per_token(model: ModelConfig, dtype: str | None = None) -> int:
    """Return the bytes of K and V that one token takes over all layers.

    ``2 (K and V) * num_layers * num_kv_heads * head_size * bytes of dtype``: for OPT-13B in
    float16, 2 * 40 * 40 * 128 * 2 = 819,200 (section 3). ``dtype`` is the cache's; ``None`` means
    the model's. Raises :class:`pagedattn.config.ConfigError`.
    """
    item_bytes = DTYPE_BYTES[one_of("dtype", model.dtype if dtype is None else dtype, CACHE_DTYPES)]
    return 2 * model.num_layers * model.num_kv_heads * model.head_size * item_bytes


def kv_bytes_per_block(model: ModelConfig, block_size: int, dtype: str | None = None) -> int:
    """Return the bytes of K and V that one block of ``block_size`` tokens takes over all layers.

    ``block_size * kv_bytes_per_token``: for OPT-13B in float16 and blocks of 16, 12.5 MiB.
    """
    return positive_int("block_size", block_size) * kv_bytes_per_token(model, dtype)


def num_blocks_in(
    budget_bytes: float, model: ModelConfig, block_size: int, dtype: str | None = None
) -> int:
    """Return how many whole blocks fit in ``budget_bytes``.

    ``floor(budget_bytes / kv_bytes_per_block)``: for OPT-13B and blocks of 16, 12 GiB hold 983.
    Raises ``ValueError`` for a budget that is negative, infinite or not a number.
    """
    if (
        isinstance(budget_bytes, bool)
        or not isinstance(budget_bytes, int | float | np.integer | np.floating)
        or not 0 <= budget_bytes < math.inf
    ):
        raise ValueError(
            f"budget_bytes must be a finite number of bytes, 0 or more, not {budget_bytes!r}."
        )
    return int(budget_bytes) // kv_bytes_per_block(model, block_size, dtype)


@overload
def num_blocks_for(num_tokens: int, block_size: int) -> int: ...
@overload
def num_blocks_for(
    num_tokens: npt.NDArray[np.integer], block_size: int
) -> npt.NDArray[np.int64]: ...
def num_blocks_for(
    num_tokens: int | npt.NDArray[np.integer], block_size: int
) -> int | npt.NDArray[np.int64]:
    """Return how many blocks ``num_tokens`` tokens of one sequence need, the last one part filled.

    ``ceil(num_tokens / block_size)``: 7 tokens in blocks of 4 need 2. An array gives an array of
    the same shape, a sequence an element. Raises ``ValueError`` for a negative count or one that
    is not an integer.
    """
    tokens = _token_counts(num_tokens)
    return -(-tokens // positive_int("block_size", block_size))


@overload
def wasted_slots(num_tokens: int, block_size: int) -> int: ...
@overload
def wasted_slots(num_tokens: npt.NDArray[np.integer], block_size: int) -> npt.NDArray[np.int64]: ...
def wasted_slots(
    num_tokens: int | npt.NDArray[np.integer], block_size: int
) -> int | npt.NDArray[np.int64]:
    """Return how many slots of the last block stay unfilled: less than one block a sequence.

    ``-num_tokens mod block_size``: 7 tokens in blocks of 4 leave 1, 8 leave none, and neither do
    0, which need no block. An array gives an array of the same shape. Raises ``ValueError`` as
    :func:`num_blocks_for` does.
    """
    tokens = _token_counts(num_tokens)
    return -tokens % positive_int("block_size", block_size)


def _token_counts(num_tokens: object) -> int | npt.NDArray[np.int64]:
    if isinstance(num_tokens, np.ndarray):
        if num_tokens.dtype.kind not in "iu":
            raise ValueError(f"num_tokens must hold integers, not {num_tokens.dtype}.")
        if num_tokens.size and (num_tokens.min() < 0 or num_tokens.max() > _INT64_MAX):
            raise ValueError(
                f"num_tokens must be 0 to {_INT64_MAX}, "
                f"not {num_tokens.min()} to {num_tokens.max()}."
            )
        return num_tokens.astype(np.int64)
    if isinstance(num_tokens, bool) or not isinstance(num_tokens, int | np.integer):
        raise ValueError(f"num_tokens must be an integer or an integer array, not {num_tokens!r}.")
    if num_tokens < 0:
        raise ValueError(f"num_tokens must be 0 or more, not {num_tokens}.")
    return int(num_tokens)
