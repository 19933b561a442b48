"""The KV cache: the tensors that hold every layer's keys and values, in blocks.

This module is the one place that knows the layout. A block's keys of one head lie together,
`[block_size, head_size]` contiguous, because that is what a program of the attention kernel
reads; a block's keys and values of all heads lie together too, so that copying or swapping a
block moves one contiguous range a layer.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from pagedattn.device import current_device

if TYPE_CHECKING:
    from collections.abc import Hashable

    from numpy.typing import NDArray

    from pagedattn.block_manager import BlockCopies
    from pagedattn.config import CacheConfig, ModelConfig

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


@dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values: views, so writing to them writes to the cache.

    Kernels take these by strides; only `head_size` must be contiguous. An fp8 cache (e4m3, at
    most 448) holds each head's keys divided by a scale of that head, and its values by another:
    what is stored, times the scale, is the key. One scale for all heads is the same number in each.

    Attributes:
        key: [num_blocks, num_kv_heads, block_size, head_size].
        value: the same shape, strides, dtype and device as `key`.
        key_scale: float32 [num_kv_heads], contiguous, above 0, on the same device; None is 1 in
            each head, and all that a cache of another dtype than `torch.float8_e4m3fn` has.
        value_scale: the same for the values.

    Raises:
        ValueError: key and value differ in one of these, or a shape, dtype, layout or device is not
            as described. Whether scales are above 0 is not looked at, which would wait for a GPU.

    """

    key: torch.Tensor
    value: torch.Tensor
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.key.dim() != 4 or self.key.stride(3) != 1:
            raise ValueError(
                "key must be [num_blocks, num_kv_heads, block_size, head_size], contiguous in "
                f"the last; given {tuple(self.key.shape)} with strides {self.key.stride()}"
            )
        for what, mine, other in (
            ("shape", tuple(self.key.shape), tuple(self.value.shape)),
            ("strides", self.key.stride(), self.value.stride()),
            ("dtype", self.key.dtype, self.value.dtype),
            ("device", self.key.device, self.value.device),
        ):
            if mine != other:
                raise ValueError(
                    f"key has {what} {mine}; value has {other}, and must have the same"
                )
        for name, scale in (("key_scale", self.key_scale), ("value_scale", self.value_scale)):
            if scale is not None:
                self._check_scale(name, scale)

    def _check_scale(self, name: str, scale: torch.Tensor) -> None:
        if self.dtype != FP8:
            raise ValueError(f"{name} is given; the cache is {self.dtype}, and only {FP8} has one")
        if scale.dtype != torch.float32 or scale.shape != (self.num_kv_heads,):
            raise ValueError(
                f"{name} is {scale.dtype} {tuple(scale.shape)}; it must be torch.float32 "
                f"[num_kv_heads], here {(self.num_kv_heads,)}"
            )
        if scale.device != self.key.device or not scale.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous and on {self.key.device}; "
                f"given strides {scale.stride()} on {scale.device}"
            )

    @cached_property
    def signature(self) -> Hashable:
        """Equal for caches that differ in contents and addresses alone.

        Of an address its place within 16 bytes counts.
        """
        key, value = self.key, self.value
        return (
            *(key.shape, key.stride(), key.dtype, value.stride()),
            (key.data_ptr() | value.data_ptr()) % 16,
            *(self.key_scale is None, self.value_scale is None),
        )

    @cached_property
    def dtype(self) -> torch.dtype:
        """Type of the stored elements."""
        return self.key.dtype

    @cached_property
    def num_blocks(self) -> int:
        """Blocks of the pool."""
        return self.key.shape[0]

    @cached_property
    def num_kv_heads(self) -> int:
        """KV heads."""
        return self.key.shape[1]

    @cached_property
    def block_size(self) -> int:
        """Tokens a block."""
        return self.key.shape[2]

    @cached_property
    def head_size(self) -> int:
        """Elements of one head's key or value of one token."""
        return self.key.shape[3]

    @cached_property
    def num_slots(self) -> int:
        """Tokens that the cache can hold; slots are from 0 to this, exclusive."""
        return self.num_blocks * self.block_size


class KVCache:
    """Keys and values of all layers, in `num_blocks` blocks of `block_size` tokens.

    Attributes:
        storage: [num_layers, num_blocks, 2, num_kv_heads, block_size, head_size]; index 0 of the
            third dimension is K, 1 is V. Not initialised: a slot means nothing until written.
        scales: of an fp8 cache, float32 [num_layers, 2, num_kv_heads]: what the stored K (index
            0) and V (index 1) of a head are multiplied by; ones at first. None for other dtypes.
            Set them, above 0, before anything is written: they hold for all that is stored.

    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_layers, num_blocks, 2, num_kv_heads, block_size, head_size)
        if min(shape) < 1:
            raise ValueError(
                "every size of a KV cache must be at least 1; "
                f"given num_layers={num_layers}, num_blocks={num_blocks}, "
                f"block_size={block_size}, num_kv_heads={num_kv_heads}, head_size={head_size}"
            )
        self.storage = torch.empty(shape, dtype=dtype, device=device)
        self.scales: torch.Tensor | None = None
        if dtype == FP8:
            self.scales = torch.ones((num_layers, 2, num_kv_heads), device=device)

    @classmethod
    def of(
        cls, model: ModelConfig, cache: CacheConfig, device: torch.device | str = "cpu"
    ) -> KVCache:
        """Make the cache that a model needs."""
        torch_name = "float8_e4m3fn" if cache.dtype == "float8_e4m3" else cache.dtype
        dtype: torch.dtype = getattr(torch, torch_name)
        return cls(
            num_layers=model.num_layers,
            num_blocks=cache.num_blocks,
            block_size=cache.block_size,
            num_kv_heads=model.num_kv_heads,
            head_size=model.head_size,
            dtype=dtype,
            device=device,
        )

    @property
    def num_layers(self) -> int:
        """Layers."""
        return self.storage.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' keys and values."""
        return self.storage.nbytes

    def layer(self, index: int) -> LayerCache:
        """Views of one layer's keys and values, and of its scales."""
        blocks = self.storage[index]
        if self.scales is None:
            return LayerCache(blocks[:, 0], blocks[:, 1])
        return LayerCache(blocks[:, 0], blocks[:, 1], *self.scales[index])

    def write(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Write tokens' K and V into their slots; changes this cache.

        The plain way, for tests and for a CPU; `pagedattn.write_kv` chooses the fastest.

        Args:
            layer: index of the layer.
            key: [num_tokens, num_kv_heads, head_size]; stored as `quantised` says.
            value: the same shape.
            slots: int64 [num_tokens], distinct; a slot outside the cache is skipped.

        """
        write_slots(self.layer(layer), key, value, slots)

    def copy_blocks(self, copies: BlockCopies, source: KVCache | None = None) -> None:
        """Copy whole blocks of all layers; changes this cache.

        All sources are read before a destination is written. On a GPU with Triton this is one
        launch for all layers, unless a block is both source and destination.
        Scales of an fp8 cache stay as they are: both caches must have the same.

        Args:
            copies: which blocks, as copy on write or a swap asks.
            source: the cache that `copies.sources` are blocks of, for a swap: a cache of the
                same layers and blocks, perhaps on another device; by default this one.
                `pagedattn.kv_swap` swaps faster.

        Raises:
            ValueError: the caches differ in more than their number of blocks, a block is outside
                its cache or written twice, sources are not as many as destinations, or a CUDA graph
                is captured, which would keep the first list; nothing is copied.

        """
        source = self if source is None else source
        mine, theirs = self.storage, source.storage
        if (len(mine), mine.shape[2:], mine.dtype) != (len(theirs), theirs.shape[2:], theirs.dtype):
            raise ValueError(
                "blocks can be copied between caches that differ in their number of blocks alone; "
                f"given {tuple(theirs.shape)} of {theirs.dtype} to copy into "
                f"{tuple(mine.shape)} of {mine.dtype}"
            )
        copies.check_integrity()
        if not len(copies):
            return
        for what, blocks, num_blocks in (
            ("sources", copies.sources, theirs.shape[1]),
            ("destinations", copies.destinations, mine.shape[1]),
        ):
            if blocks.min() < 0 or blocks.max() >= num_blocks:
                raise ValueError(
                    f"{what} name blocks {blocks.min()} to {blocks.max()}; "
                    f"their cache has the blocks 0 to {num_blocks - 1}"
                )
        if mine.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "a captured copy_blocks would copy the same blocks in each replay; "
                "copy_block_pairs reads its list when it runs"
            )
        overlap = source is self and np.isin(copies.sources, copies.destinations).any()
        if _launchable(mine) and theirs.device == mine.device and not overlap:
            from pagedattn.block_copy import launch_block_copy, pairs_on

            pairs = pairs_on(mine.device, copies.sources, copies.destinations)
            with current_device(mine.device):
                launch_block_copy(theirs, mine, pairs)
        else:
            sources = torch.from_numpy(copies.sources).to(theirs.device, torch.int64)
            destinations = torch.from_numpy(copies.destinations).to(mine.device, torch.int64)
            mine[:, destinations] = theirs[:, sources].to(mine.device)

    def copy_block_pairs(self, pairs: torch.Tensor) -> None:
        """Copy whole blocks of all layers, named by a tensor that is read when the copy runs.

        So a captured CUDA graph copies what the tensor names at each replay.

        Args:
            pairs: int32 or int64 [2, num_pairs] on this cache's device: sources, and below them
                destinations, which are distinct and none of the sources. A pair of which one is
                outside the cache is skipped: pad with -1.

        Raises:
            ValueError: `pairs` is not as described, as far as its shape and type tell.

        """
        if (
            pairs.dim() != 2
            or len(pairs) != 2
            or pairs.dtype not in (torch.int32, torch.int64)
            or pairs.device != self.storage.device
        ):
            raise ValueError(
                f"pairs are {pairs.dtype} {tuple(pairs.shape)} on {pairs.device}; they must be "
                f"int32 or int64 [2, num_pairs] on {self.storage.device}"
            )
        if _launchable(self.storage):
            from pagedattn.block_copy import launch_block_copy

            with current_device(self.storage.device):
                launch_block_copy(self.storage, self.storage, pairs.contiguous())
        else:
            inside = ((pairs >= 0) & (pairs < self.storage.shape[1])).all(0)
            sources, destinations = pairs[:, inside].long()
            self.storage[:, destinations] = self.storage[:, sources]

    def gather(
        self, layer: int, block_table: NDArray[np.int32], num_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Collect one sequence's keys and values in token order: for tests and debugging.

        Args:
            layer: index of the layer.
            block_table: int32 [at least ceil(num_tokens / block_size)], physical block ids.
            num_tokens: tokens to collect.

        Returns:
            key, value: [num_tokens, num_kv_heads, head_size], copies; of an fp8 cache in float32,
            multiplied by the scales.

        """
        view = self.layer(layer)
        num_blocks = -(-num_tokens // view.block_size)
        blocks = torch.tensor(block_table[:num_blocks], device=view.key.device).long()
        key, value = (
            dequantised(part[blocks].transpose(1, 2).flatten(0, 1)[:num_tokens], scale, view.dtype)
            for part, scale in ((view.key, view.key_scale), (view.value, view.value_scale))
        )
        return key.contiguous(), value.contiguous()


def dequantised(
    stored: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Return the numbers that stored elements mean.

    Args:
        stored: [..., num_kv_heads, head_size], elements of a cache.
        scale: float32 [num_kv_heads], or None for 1.
        dtype: of the result and of the multiplication; an fp8 dtype stands for float32.

    """
    numbers = stored.to(torch.float32 if dtype == FP8 else dtype)
    return numbers if scale is None else numbers * scale.to(numbers.dtype)[:, None]


def quantised(
    numbers: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Return numbers as a cache stores them; the inverse of `dequantised` but for the rounding.

    Worked example: 100 with a scale of 0.25 would be 400, between the neighbours 384 and 416 of
    e4m3 in the middle, and is stored as 384, the even one; 120 would be 480, and is stored as 448.

    Args:
        numbers: [..., num_kv_heads, head_size], any floating dtype.
        scale: float32 [num_kv_heads], or None for 1.
        dtype: of the cache. For fp8 the numbers are divided by the scale in float32, limited to
            +-448 and rounded to nearest, ties to even; NaN stays NaN. Others are cast.

    """
    if dtype != FP8:
        return numbers.to(dtype)
    numbers = numbers.float()
    if scale is not None:
        numbers = numbers / scale[:, None]
    return numbers.clamp(-FP8_MAX, FP8_MAX).to(dtype)


def _launchable(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and importlib.util.find_spec("triton") is not None


def write_slots(
    cache: LayerCache, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write tokens' K and V into slots of one layer with PyTorch's indexing; changes `cache`.

    Worked example: block size 4, slot 10 is block 10 // 4 = 2, offset 10 % 4 = 2.

    Args:
        cache: the layer's views.
        key: [num_tokens, num_kv_heads, head_size]; stored as `quantised` says.
        value: the same shape.
        slots: int64 [num_tokens], distinct; a slot outside the cache is skipped.

    """
    inside = (slots >= 0) & (slots < cache.num_slots)
    slots = slots[inside]
    blocks = slots // cache.block_size
    offsets = slots % cache.block_size
    cache.key[blocks, :, offsets] = quantised(key[inside], cache.key_scale, cache.dtype)
    cache.value[blocks, :, offsets] = quantised(value[inside], cache.value_scale, cache.dtype)
