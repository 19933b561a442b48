"""Caches without NaN, for kernels that multiply what they masked by 0."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pagedattn.kv_cache import LayerCache


def zero_nan(cache: LayerCache) -> None:
    """Replace NaN in a cache by 0, as a cache has it that was allocated with zeros; changes it."""
    for part in (cache.key, cache.value):
        if part.dtype.itemsize == 1:  # fp8, for which PyTorch has few operations
            part.view(torch.uint8).masked_fill_(part.isnan(), 0)
        else:
            part.nan_to_num_(nan=0.0)


@contextmanager
def finite(cache: LayerCache) -> Iterator[None]:
    """Replace NaN in a cache by 0 inside of the block, and put it back after it."""
    kept = [part.clone() for part in (cache.key, cache.value)]
    zero_nan(cache)
    try:
        yield
    finally:
        for part, before in zip((cache.key, cache.value), kept, strict=True):
            part.copy_(before)
