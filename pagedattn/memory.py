"""What a KV cache costs: plain arithmetic on a model's numbers.

Source: PagedAttention (SOSP 2023, arXiv 2309.06180), section 3 for the bytes of a token and
Table 1 for the blocks that fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import numpy as np

from pagedattn.config import (
    CACHE_DTYPES,
    DTYPE_BYTES,
    ConfigError,
    ModelConfig,
    one_of,
    positive_int,
)

if TYPE_CHECKING:
    import numpy.typing as npt

KV_SCALES = ("none", "per-tensor", "per-head", "per-token-head")
"""How K and V of 8 bits are scaled: a float32 for all of a layer's K (and one for its V), for each
head, or for each head of each token."""

_SCALE_BYTES = 4
_INT64_MAX = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class KVMemory:
    """What the K and V of a model cost on each of the GPUs that it runs on.

    ``dtype`` is the cache's, ``None`` the model's. A GPU of a tensor-parallel group keeps
    ``num_kv_heads / tensor_parallel_size`` KV heads, and one head, as its neighbours do, where
    there are fewer heads than GPUs. Raises :class:`pagedattn.config.ConfigError`, for one if heads
    cannot be dealt out evenly, or if there are scales and the dtype has more than 8 bits.

        >>> memory = KVMemory(ModelConfig.preset("llama-3-8b"), tensor_parallel_size=2)
        >>> memory.kv_heads_per_gpu, memory.bytes_per_token  # 2 * 32 layers * 4 heads * 128 * 2
        (4, 65536)
    """

    model: ModelConfig
    block_size: int = 16
    dtype: str | None = None
    scales: str = "none"
    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        for key in ("block_size", "tensor_parallel_size"):
            object.__setattr__(self, key, positive_int(key, getattr(self, key)))
        dtype = self.model.dtype if self.dtype is None else self.dtype
        object.__setattr__(self, "dtype", one_of("dtype", dtype, CACHE_DTYPES))
        one_of("scales", self.scales, KV_SCALES)
        if self.scales != "none" and self.item_bytes > 1:
            raise ConfigError(f"scales must be none for a cache in {dtype}, not {self.scales}.")
        heads, gpus = self.model.num_kv_heads, self.tensor_parallel_size
        if self.model.num_query_heads % gpus or (heads % gpus and gpus % heads):
            raise ConfigError(
                f"tensor_parallel_size must deal out {self.model.num_query_heads} query heads and "
                f"{heads} KV heads evenly, not {gpus}."
            )

    @property
    def item_bytes(self) -> int:
        """Bytes of one element of K or V."""
        return DTYPE_BYTES[self.dtype or self.model.dtype]

    @property
    def kv_heads_per_gpu(self) -> int:
        """KV heads of a layer whose K and V one GPU keeps."""
        return max(1, self.model.num_kv_heads // self.tensor_parallel_size)

    @property
    def bytes_per_token_and_layer(self) -> int:
        """Bytes of one token's K and V in one layer, with the scales that are its own."""
        own_scale = _SCALE_BYTES if self.scales == "per-token-head" else 0
        return 2 * self.kv_heads_per_gpu * (self.model.head_size * self.item_bytes + own_scale)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's K and V in all layers that keep them.

        ``2 (K and V) * layers with KV * KV heads a GPU * head_size * bytes of dtype``: for OPT-13B
        in float16, 2 * 40 * 40 * 128 * 2 = 819,200 (section 3).
        """
        return self.model.num_kv_layers * self.bytes_per_token_and_layer

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block of tokens in all layers that keep them."""
        return self.block_size * self.bytes_per_token

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales that belong to no token, but to a layer's or a head's K and V."""
        per_layer = {"per-tensor": 1, "per-head": self.kv_heads_per_gpu}.get(self.scales, 0)
        return 2 * _SCALE_BYTES * per_layer * self.model.num_kv_layers

    def num_blocks_in(self, budget_bytes: float) -> int:
        """Return how many whole blocks of all layers fit in ``budget_bytes`` of one GPU.

        ``floor((budget_bytes - scale_bytes) / bytes_per_block)``. Raises ``ValueError`` for a
        budget that is negative, infinite or not a number.
        """
        return self._whole(budget_bytes, self.bytes_per_block)

    @property
    def pool_windows(self) -> tuple[int | None, ...]:
        """The layer groups of a block manager for this model: their windows.

        A manager's blocks are all of one size, so layers of a kind are cut into groups of as many
        layers as divide the numbers of both kinds: Gemma-3-27B's 10 full layers and 52 of a window
        become 5 groups and 26 groups of 2 layers.
        """
        size = self._layers_per_pool_block
        return tuple(
            group.window
            for group in self.model.layer_groups
            for _ in range(group.num_layers // size)
        )

    @property
    def bytes_per_pool_block(self) -> int:
        """Bytes of one block of one of ``pool_windows``' groups."""
        return self.block_size * self._layers_per_pool_block * self.bytes_per_token_and_layer

    def num_pool_blocks_in(self, budget_bytes: float) -> int:
        """Return how many blocks of ``bytes_per_pool_block`` fit, as :meth:`num_blocks_in`."""
        return self._whole(budget_bytes, self.bytes_per_pool_block)

    @overload
    def bytes_of(self, num_tokens: int) -> int: ...
    @overload
    def bytes_of(self, num_tokens: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]: ...
    def bytes_of(self, num_tokens: int | npt.NDArray[np.integer]) -> int | npt.NDArray[np.int64]:
        """Return the bytes of the blocks that a sequence of ``num_tokens`` holds.

        Blocks that have left a layer's window are given back: 7 tokens in blocks of 4 hold 2 in a
        layer of full attention, and 1 in a layer with a window of 3. An array gives an array, a
        sequence an element. Raises ``ValueError`` for counts that are negative or not integers.
        """
        block_bytes = self.block_size * self.bytes_per_token_and_layer
        held = [
            group.num_layers * num_blocks_held(num_tokens, self.block_size, group.window)
            for group in self.model.layer_groups
        ]
        return block_bytes * sum(held)

    @property
    def weight_bytes(self) -> int | None:
        """Bytes of the model's weights on one GPU, or ``None`` where they are not known.

        The share of all, and the projections to those KV heads that several GPUs keep. Norms,
        which every GPU has whole, are left out: less than one in a thousand.
        """
        total = self.model.weight_bytes
        if total is None:
            return None
        gpus, model = self.tensor_parallel_size, self.model
        repeated = self.kv_heads_per_gpu * gpus - model.num_kv_heads
        projections = 2 * model.num_kv_layers * repeated * model.head_size * model.hidden_size
        return -(-(total + projections * DTYPE_BYTES[model.dtype]) // gpus)

    @property
    def _layers_per_pool_block(self) -> int:
        return math.gcd(*(group.num_layers for group in self.model.layer_groups))

    def _whole(self, budget_bytes: float, size: int) -> int:
        if (
            isinstance(budget_bytes, bool)
            or not isinstance(budget_bytes, int | float | np.integer | np.floating)
            or not 0 <= budget_bytes < math.inf
        ):
            raise ValueError(
                f"budget_bytes must be a finite number of bytes, 0 or more, not {budget_bytes!r}."
            )
        return max(0, int(budget_bytes) - self.scale_bytes) // size


def kv_bytes_per_token(model: ModelConfig, dtype: str | None = None) -> int:
    """Return :attr:`KVMemory.bytes_per_token` of a model on one GPU."""
    return KVMemory(model, dtype=dtype).bytes_per_token


def kv_bytes_per_block(model: ModelConfig, block_size: int, dtype: str | None = None) -> int:
    """Return the bytes of K and V that one block of ``block_size`` tokens takes over all layers.

    ``block_size * kv_bytes_per_token``: for OPT-13B in float16 and blocks of 16, 12.5 MiB.
    """
    return KVMemory(model, block_size, dtype).bytes_per_block


def num_blocks_in(
    budget_bytes: float, model: ModelConfig, block_size: int, dtype: str | None = None
) -> int:
    """Return how many whole blocks fit in ``budget_bytes``.

    ``floor(budget_bytes / kv_bytes_per_block)``: for OPT-13B and blocks of 16, 12 GiB hold 983.
    Raises ``ValueError`` for a budget that is negative, infinite or not a number.
    """
    return KVMemory(model, block_size, dtype).num_blocks_in(budget_bytes)


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
def num_blocks_held(num_tokens: int, block_size: int, window: int | None) -> int: ...
@overload
def num_blocks_held(
    num_tokens: npt.NDArray[np.integer], block_size: int, window: int | None
) -> npt.NDArray[np.int64]: ...
def num_blocks_held(
    num_tokens: int | npt.NDArray[np.integer], block_size: int, window: int | None
) -> int | npt.NDArray[np.int64]:
    """Return how many blocks a sequence holds whose layers see ``window`` tokens, or all.

    The newest token sees ``window`` tokens, itself included; blocks before them are given back:
    ``ceil(n / block_size) - floor(max(0, n - window) / block_size)``. 7 tokens in blocks of 4 with
    a window of 3 hold 1, the tokens 4 to 6; with a window of 4 they hold 2, as token 3 is seen.
    Raises ``ValueError`` as :func:`num_blocks_for` does.
    """
    blocks = num_blocks_for(num_tokens, block_size)
    if window is None:
        return blocks
    past = np.maximum(0, _token_counts(num_tokens) - positive_int("window", window))
    left = past // block_size
    return blocks - (left if isinstance(num_tokens, np.ndarray) else int(left))


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
