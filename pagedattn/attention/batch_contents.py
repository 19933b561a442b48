"""What a batch must be for a cache, and its tensors hold, which nothing looks at while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pagedattn.attention.batch import AttentionBatch
    from pagedattn.kv_cache import LayerCache


def check_block_size(batch: AttentionBatch, cache: LayerCache) -> None:
    """Raise ValueError where a batch's blocks are known to be others than the cache's."""
    if batch.block_size not in (None, cache.block_size):
        raise ValueError(
            f"the batch's page table is of blocks of {batch.block_size} tokens; the cache's have "
            f"{cache.block_size}"
        )


def check_contents(batch: AttentionBatch, cache: LayerCache, window: int | None) -> None:
    """Raise ValueError where a batch's tensors hold what they must not.

    Args:
        batch: on any device, for which this waits.
        cache: whose blocks the tables name.
        window: keys that a query sees at most; None is all.

    """
    check_block_size(batch, cache)
    block_size = cache.block_size
    tables = batch.block_tables.cpu().numpy()
    lengths = batch.kv_lengths.cpu().numpy().astype(np.int64)
    starts = batch.query_starts.cpu().numpy().astype(np.int64)
    slots = batch.slots.cpu().numpy()
    if starts[0] != 0 or starts[-1] > batch.num_query_tokens:
        raise ValueError(
            f"query_starts go from {starts[0]} to {starts[-1]}; they must begin at 0 and end at "
            f"{batch.num_query_tokens} at most"
        )
    written = slots[(slots >= 0) & (slots < cache.num_slots)]
    if np.unique(written).size < written.size:
        raise ValueError("two query tokens have one slot")
    queries, room = np.diff(starts), tables.shape[1] * block_size
    first_seen = np.zeros_like(lengths) if window is None else lengths - queries + 1 - window
    begins = np.arange(tables.shape[1]) * block_size
    used = (begins < lengths[:, None]) & (begins + block_size > first_seen[:, None])
    strange = used & ((tables < 0) | (tables >= cache.num_blocks))
    for is_wrong, what in (
        (queries < 0, "query_starts that fall"),
        (
            queries > batch.max_query_length,
            f"more query tokens than max_query_length, {batch.max_query_length}",
        ),
        (lengths < 0, "a negative length"),
        (
            lengths > batch.max_kv_length,
            f"more tokens than max_kv_length, {batch.max_kv_length}",
        ),
        (lengths > room, f"more tokens than its block table has room for, {room}"),
        ((queries > lengths) & (lengths > 0), "more query tokens than it has tokens"),
        (strange.any(axis=1), f"a block that is none of the cache's {cache.num_blocks}"),
    ):
        if is_wrong.any():
            raise ValueError(f"sequence {int(is_wrong.argmax())} has {what}")
