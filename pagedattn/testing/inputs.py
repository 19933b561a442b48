"""Random inputs for paged attention, with everything that must not be read poisoned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch

from pagedattn.attention.batch import AttentionBatch
from pagedattn.attention.call import AttentionCall
from pagedattn.kv_cache import FP8, KVCache, LayerCache, quantised
from pagedattn.page_table import PageTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pagedattn.workloads import AttentionShape


class AttentionOptions(TypedDict):
    """Keyword arguments of `pagedattn.attention.attention` that a case decides."""

    window: int | None
    soft_cap: float | None
    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    causal: bool


@dataclass(frozen=True)
class AttentionInputs:
    """A batch over a filled cache.

    Attributes:
        query: [num_query_tokens, num_query_heads, head_size].
        key: [num_query_tokens, num_kv_heads, head_size], K for `write_kv`. The cache is filled
            with other random K and V already.
        value: the same for V.
        cache: one layer; slots that no query sees hold NaN.
        batch: page table and lengths; padding entries, and those of blocks that have left the
            window, name a block full of NaN.
        window: see `pagedattn.attention.attention`, as for the others.
        soft_cap: the same.
        alibi_slopes: the same.
        sinks: the same.
        causal: the same.

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
    causal: bool = True

    @property
    def options(self) -> AttentionOptions:
        """The keyword arguments of `pagedattn.attention.attention` that this case asks for."""
        return {
            "window": self.window,
            "soft_cap": self.soft_cap,
            "alibi_slopes": self.alibi_slopes,
            "sinks": self.sinks,
            "causal": self.causal,
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
    window: int | None = None,
    soft_cap: float | None = None,
    alibi: bool = False,
    sinks: bool = False,
) -> AttentionInputs:
    """Make one batch of a shape; see `make_rotation`."""
    return make_rotation(
        shape,
        1,
        device=device,
        seed=seed,
        shuffled=shuffled,
        extra_columns=extra_columns,
        window=window,
        soft_cap=soft_cap,
        alibi=alibi,
        sinks=sinks,
    )[0]


def make_rotation(
    shape: AttentionShape,
    count: int,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    shuffled: bool = True,
    extra_columns: int = 0,
    window: int | None = None,
    soft_cap: float | None = None,
    alibi: bool = False,
    sinks: bool = False,
) -> list[AttentionInputs]:
    """Make `count` batches of a shape over disjoint blocks of one cache.

    Going through them in turn keeps the K and V cold if they are together larger than the L2.

    Args:
        shape: lengths, heads, sizes, dtypes, options. A shared prefix is that of one batch.
        count: batches.
        device: where everything goes.
        seed: of the random data and of the blocks' order.
        shuffled: blocks in random order over the whole pool; else in ascending order.
        extra_columns: columns of padding after the longest block table.
        window: keys that a query sees; what has left all windows is poisoned too, and no table
            names whole blocks of it. None is the shape's.
        soft_cap: bound of the scores; None is the shape's.
        alibi: with the slopes of Press et al. 2022 (section 3), 2^(-8 h / num_query_heads) for
            the h-th head; they are there too if the shape has them.
        sinks: with random sinks, a normal distribution of deviation 2, rounded to bfloat16, as some
            kernels take no others; as for `alibi`.

    Returns:
        The batches; they share one cache, standard normal where it is used and NaN elsewhere. An
        fp8 cache is filled by quantising such numbers; each head has its scale, none of them 1.

    """
    window = shape.window if window is None else window
    soft_cap = shape.soft_cap if soft_cap is None else soft_cap
    alibi, sinks = alibi or shape.alibi, sinks or shape.sinks
    lengths = np.array(shape.kv_lengths, dtype=np.int64)
    first_seen = np.zeros_like(lengths)
    if window is not None:
        first_seen = np.maximum(lengths - np.array(shape.query_lengths) - window + 1, 0)
    blocks_each = -(-lengths // shape.block_size)
    shared = shape.shared_prefix // shape.block_size
    columns = np.arange(int(blocks_each.max(initial=0)) + extra_columns)
    gone = columns < (first_seen // shape.block_size)[:, None]
    own = (columns < blocks_each[:, None]) & (columns >= shared) & ~gone
    per_batch = shared + int(own.sum())
    poison_block = per_batch * count
    rng = np.random.default_rng(seed)
    order = np.arange(poison_block, dtype=np.int32)
    if shuffled:
        rng.shuffle(order)

    generator = torch.Generator(device).manual_seed(seed)
    cache = _random_cache(shape, poison_block + 1, generator)
    cache.storage[:, poison_block] = torch.nan
    dtype: torch.dtype = getattr(torch, shape.dtype)

    def random(num_heads: int) -> torch.Tensor:
        sizes = (shape.num_query_tokens, num_heads, shape.head_size)
        return torch.empty(sizes, dtype=dtype, device=device).normal_(generator=generator)

    heads = torch.arange(1, shape.num_query_heads + 1, device=device)
    slopes = 2.0 ** (-8 * heads / shape.num_query_heads) if alibi else None
    drawn = 2 * torch.randn(shape.num_query_heads, generator=generator, device=device)
    drawn = drawn.bfloat16().float()

    share = None if window is None else False  # what is gone is one block for all of them
    rotation = []
    for part in order.reshape(count, per_batch):
        tables = np.full(own.shape, poison_block, dtype=np.int32)
        tables[:, :shared] = part[:shared]
        tables[own] = part[shared:]
        tables[gone] = poison_block
        page_table = PageTable(shape.block_size, tables, lengths)
        _poison_unused_slots(cache, page_table, first_seen, shared)
        rotation.append(
            AttentionInputs(
                query=random(shape.num_query_heads),
                key=random(shape.num_kv_heads),
                value=random(shape.num_kv_heads),
                cache=cache.layer(0),
                batch=AttentionBatch.of(page_table, shape.query_lengths, device, share=share),
                window=window,
                soft_cap=soft_cap,
                alibi_slopes=slopes,
                sinks=drawn if sinks else None,
            )
        )
    return rotation


def last_queries(
    inputs: AttentionInputs, sequences: NDArray[np.int64], most: int
) -> tuple[AttentionInputs, torch.Tensor]:
    """Return the last query tokens of some sequences as a batch of its own; waits for the GPU.

    What a kernel makes of a batch that is too large to be compared with float64 is compared so in
    a part of it.

    Args:
        inputs: the whole batch.
        sequences: int64, distinct; which.
        most: query tokens of each at most, one at least.

    Returns:
        The batch, over the same cache, and int64 [num_query_tokens], which of the whole batch's
        query tokens it has. Its `key` and `value` are those of these tokens.

    """
    ends = inputs.batch.query_starts.cpu().numpy().astype(np.int64)[1:]
    lengths = np.diff(ends, prepend=0)
    taken = np.minimum(lengths, most)[sequences]
    kept = [np.arange(end - count, end) for end, count in zip(ends[sequences], taken, strict=True)]
    rows = torch.from_numpy(np.concatenate(kept)).to(inputs.query.device)
    table = page_table_of(inputs.batch, inputs.cache.block_size)
    of_some = PageTable(
        table.block_size, table.block_tables[sequences], table.num_tokens[sequences]
    )
    batch = AttentionBatch.of(of_some, taken, inputs.query.device, share=False)
    query, key, value = (tensor[rows] for tensor in (inputs.query, inputs.key, inputs.value))
    return replace(inputs, query=query, key=key, value=value, batch=batch), rows


def page_table_of(batch: AttentionBatch, block_size: int) -> PageTable:
    """Return the page table that a batch was made from; waits for the GPU."""
    lengths = batch.kv_lengths.cpu().numpy().astype(np.int64)
    return PageTable(block_size, batch.block_tables.cpu().numpy(), lengths)


def _random_cache(shape: AttentionShape, num_blocks: int, generator: torch.Generator) -> KVCache:
    """Make a cache of one layer, standard normal everywhere."""
    name = "float8_e4m3fn" if shape.cache_dtype == "float8_e4m3" else shape.cache_dtype
    cache = KVCache(
        num_layers=1,
        num_blocks=num_blocks,
        block_size=shape.block_size,
        num_kv_heads=shape.num_kv_heads,
        head_size=shape.head_size,
        dtype=getattr(torch, name),
        device=generator.device,
    )
    if cache.scales is None:
        cache.storage.normal_(generator=generator)
        return cache
    # 5 deviations are at most 400, within e4m3's 448
    cache.scales.uniform_(0.0125, 0.0375, generator=generator)
    # in parts, as their float32 takes four times as much
    for first in range(0, num_blocks, 1024):
        blocks = cache.storage[0, first : first + 1024]
        for part, scale in zip(blocks.unbind(1), cache.scales[0], strict=True):
            numbers = torch.empty(part.shape, device=part.device).normal_(generator=generator)
            part.copy_(quantised(numbers.transpose(1, 2), scale, part.dtype).transpose(1, 2))
    return cache


def _poison_unused_slots(
    cache: KVCache, page_table: PageTable, first_seen: NDArray[np.int64], shared: int
) -> None:
    """Fill a batch's slots before each sequence's first seen and behind its last token with NaN.

    Changes `cache`. Of the first `shared` blocks, which all sequences have, what one of them sees
    is left; of the others, those from the first that is seen on must be distinct. Whole blocks
    before the first that is seen are left as they are.
    """
    bits = cache.storage
    if bits.dtype == FP8:  # has no masked fill; 0x7f is NaN
        bits = bits.view(torch.uint8)
    nan = 0x7F if bits.dtype == torch.uint8 else torch.nan
    held = page_table.num_blocks()
    rows = np.repeat(np.arange(page_table.num_sequences), held)
    columns = np.arange(rows.size) - np.repeat(np.cumsum(held) - held, held)
    is_left = columns >= first_seen[rows] // page_table.block_size
    rows, columns = rows[is_left], columns[is_left]
    positions = columns[:, None] * page_table.block_size + np.arange(page_table.block_size)
    seen_from = np.where(columns < shared, first_seen.min(), first_seen[rows])
    unused = (positions < seen_from[:, None]) | (positions >= page_table.num_tokens[rows, None])
    some = unused.any(axis=1)
    blocks = torch.from_numpy(page_table.block_tables[rows, columns][some].astype(np.int64))
    mask = torch.from_numpy(unused[some])[None, :, None, None, :, None].to(bits.device)
    blocks = blocks.to(bits.device)
    bits[:, blocks] = bits[:, blocks].masked_fill(mask, nan)
