"""Random inputs for paged attention, with everything that must not be read poisoned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch

from pagedattn.attention.batch import AttentionBatch
from pagedattn.attention.call import AttentionCall
from pagedattn.kv_cache import KVCache, LayerCache
from pagedattn.page_table import PageTable

if TYPE_CHECKING:
    from pagedattn.workloads import AttentionShape


class AttentionOptions(TypedDict):
    """Keyword arguments of `pagedattn.attention.attention` that a case decides."""

    window: int | None
    soft_cap: float | None
    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None


@dataclass(frozen=True)
class AttentionInputs:
    """A batch over a filled cache.

    Attributes:
        query: [num_query_tokens, num_query_heads, head_size].
        key: [num_query_tokens, num_kv_heads, head_size], K for `write_kv`. The cache is filled
            with other random K and V already.
        value: the same for V.
        cache: one layer; slots that no sequence uses hold NaN.
        batch: page table and lengths; padding entries name a block full of NaN.
        window: see `pagedattn.attention.attention`, as for the others.
        soft_cap: the same.
        alibi_slopes: the same.
        sinks: the same.

    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cache: LayerCache
    batch: AttentionBatch
    window: int | None = None
    soft_cap: float | None = None
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None

    @property
    def options(self) -> AttentionOptions:
        """The keyword arguments of `pagedattn.attention.attention` that this case asks for."""
        return {
            "window": self.window,
            "soft_cap": self.soft_cap,
            "alibi_slopes": self.alibi_slopes,
            "sinks": self.sinks,
        }

    def call(
        self,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> AttentionCall:
        """Make the call that an implementation receives.

        Args:
            out: where to write; None allocates.
            lse: float32 [num_query_tokens, num_query_heads], or None to do without.
            scale: factor of the scores; None is `1 / sqrt(head_size)`.

        """
        return AttentionCall(
            query=self.query,
            cache=self.cache,
            batch=self.batch,
            scale=self.cache.head_size**-0.5 if scale is None else scale,
            out=torch.empty_like(self.query) if out is None else out,
            lse=lse,
            **self.options,
        )


def make_inputs(
    shape: AttentionShape,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    shuffled: bool = True,
    extra_columns: int = 3,
) -> AttentionInputs:
    """Make one batch of a shape; see `make_rotation`."""
    return make_rotation(
        shape, 1, device=device, seed=seed, shuffled=shuffled, extra_columns=extra_columns
    )[0]


def make_rotation(
    shape: AttentionShape,
    count: int,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    shuffled: bool = True,
    extra_columns: int = 0,
) -> list[AttentionInputs]:
    """Make `count` batches of a shape over disjoint blocks of one cache.

    Going through them in turn keeps the K and V cold if they are together larger than the L2.

    Args:
        shape: lengths, heads, sizes, dtype.
        count: batches.
        device: where everything goes.
        seed: of the random data and of the blocks' order.
        shuffled: blocks in random order over the whole pool; else in ascending order.
        extra_columns: columns of padding after the longest block table.

    Returns:
        The batches; they share one cache, standard normal where it is used and NaN elsewhere.

    """
    dtype: torch.dtype = getattr(torch, shape.dtype)
    lengths = np.array(shape.kv_lengths, dtype=np.int64)
    blocks_each = -(-lengths // shape.block_size)
    per_batch = int(blocks_each.sum())
    poison_block = per_batch * count
    rng = np.random.default_rng(seed)
    order = np.arange(poison_block, dtype=np.int32)
    if shuffled:
        rng.shuffle(order)

    generator = torch.Generator(device).manual_seed(seed)
    cache = KVCache(
        num_layers=1,
        num_blocks=poison_block + 1,
        block_size=shape.block_size,
        num_kv_heads=shape.num_kv_heads,
        head_size=shape.head_size,
        dtype=dtype,
        device=device,
    )
    cache.storage.normal_(generator=generator)
    cache.storage[:, poison_block] = torch.nan

    def random(num_heads: int) -> torch.Tensor:
        sizes = (shape.num_query_tokens, num_heads, shape.head_size)
        return torch.empty(sizes, dtype=dtype, device=device).normal_(generator=generator)

    rotation = []
    width = int(blocks_each.max(initial=0)) + extra_columns
    used = np.arange(width) < blocks_each[:, None]
    for part in order.reshape(count, per_batch):
        tables = np.full(used.shape, poison_block, dtype=np.int32)
        tables[used] = part
        page_table = PageTable(shape.block_size, tables, lengths)
        _poison_unused_slots(cache, page_table)
        rotation.append(
            AttentionInputs(
                query=random(shape.num_query_heads),
                key=random(shape.num_kv_heads),
                value=random(shape.num_kv_heads),
                cache=cache.layer(0),
                batch=AttentionBatch.of(page_table, shape.query_lengths, device),
            )
        )
    return rotation


def _poison_unused_slots(cache: KVCache, page_table: PageTable) -> None:
    """Fill the slots behind each sequence's last token with NaN; changes `cache`."""
    partly = page_table.num_tokens % page_table.block_size > 0
    rows = np.flatnonzero(partly)
    offsets = torch.from_numpy(page_table.num_tokens[rows] % page_table.block_size)
    last = page_table.block_tables[rows, page_table.num_blocks()[rows] - 1]
    blocks = torch.from_numpy(last.astype(np.int64)).to(cache.storage.device)
    unused = torch.arange(page_table.block_size) >= offsets[:, None]
    mask = unused.to(cache.storage.device)[None, :, None, None, :, None]
    cache.storage[:, blocks] = cache.storage[:, blocks].masked_fill(mask, torch.nan)
