"""Prefill, chunks and mixed batches on Hopper: warp-specialised, K and V through the page table.

Schedule. A *work item* is a tile of 128 rows of one KV head, or 192 of many queries in heads of 64:
consecutive query tokens times the query heads that share the head, or times a part of these heads
where a tile of all would have rows to spare. It works through tiles of 128 keys, or 64 where
windows or prompts are short, and over heads of more than 128 (`Cut`). A program, one a
multiprocessor, draws its next item from a counter in memory: sequences whose first tile sees more
keys before others, and of each its last tile, which sees the most, before its first. It draws when
most of an item's keys are on their way, so that who is done first gets what is left. Which sequence
has which number each program finds out once: of up to 32, none passed over, in the registers of a
warp, of up to 192 in shared memory. Of more, it searches for each item: tiles are numbered so that
sequence s begins at tile `query_starts[s] // tokens_a_tile + s`, and the last go first; or, where
long and short queries are mixed, tiles from both ends of the batch by turns, so that some
multiprocessors wait for memory while others multiply. Lengths and tables are on their way to the L2
before the launch before is over. Nothing is planned on the host, and a captured graph follows new
lengths. Parts of shared blocks (`causal=False`, an output in float32) are few and cut for about an
item a program: there tiles are counted one by one, so that the first numbers drawn all have an
item.

Where items are few and keys many, keys are shared out: a sequence that sees more tiles of keys than
a share is to have has as many shares of each tile of its queries as that takes. Then an item is a
share, whose result is written in float32 with its log-sum-exp, and another launch merges a
sequence's shares in order; who has one share writes as ever. So shares take about as long as each
other, and a batch's short sequences, or its prompts, are not merged for the sake of the long ones.

In a program one warp draws items and loads queries, one loads K and one V: the tensor memory
accelerator brings the tokens of a block with one instruction, already laid out for the matrix
units, so a small block costs an instruction and no more. Warpgroups of 64 rows each multiply, two
of them, or three over heads of 64, whose softmax takes as long as their products, unless items are
few: the scores of one tile of keys are computed while the outputs of the tile before are, and the
softmax of one warpgroup runs beside the products of another; where it takes long, warpgroups
multiply in an order, so that it does. Weights pass from one product to the next in registers. Only
tiles on the diagonal, or at a window's edge, are masked. ALiBi is one operation a score, and a soft
cap three or five more, without the unit that takes exponentials (soft_cap.py).

Over an fp8 cache two warpgroups multiply, in float16, and one more widens: the accelerator brings
bytes as they lie in memory, the third warpgroup turns them into float16, which holds each of them
exactly, and writes that where the matrix units read it. So there is a ring more, of one tile of K
and one of V, two over heads of 64, which is free again as soon as it has been read. Queries in
bfloat16 become float16 in shared memory, each row divided by a power of two; that, and the scale of
K, go into the scale of the row's scores, and the scale of V into its sum of weights. Up to 80
columns of a query stay in registers, none of heads of 256.

With `fp8_products` queries and weights are rounded to e4m3 instead, K is multiplied as it comes,
and the third warpgroup turns V around, into columns of the head by tokens.

Operations: 4 * head_size a query head and visible key, and one exponential. Limit: the matrix
units, beside which the softmax takes its time, and then the board's power; over fp8 shared memory
too, which is written and read once more for widening, so that this takes longer.
Bytes: an item reads its KV tiles from the L2, one byte for 128 operations of a full tile, over fp8
for 256; whole sections of KV heads are worked on together, so that the memory is read about once.
Shares write and read 8 * (head_size + 1) bytes a query and head each, of who has more than one.

Source: FlashAttention-3 (Shah et al. 2024) for the overlap within a warpgroup, and for the order of
warpgroups; its reading of a page table by threads is replaced by the accelerator's.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

from pagedattn.attention.cuda.launching import (
    LOG2_E,
    launch,
    macros_of_trace,
    marks_of,
    set_scale,
    table_lines_of,
)
from pagedattn.attention.cuda.module import (
    TensorMap,
    load_kernel,
    maps_of,
    num_multiprocessors,
)
from pagedattn.attention.cuda.prefill_choice import MOST_SHARES, divided, way_of
from pagedattn.attention.cuda.prefill_config import (
    Cut,
    group_of,
    macros_of,
    section_heads,
    shared_bytes_of,
    usual_cut,
)
from pagedattn.attention.cuda.prefill_estimate import Work, most_keys_of, share_tiles_of
from pagedattn.attention.cuda.prefill_map import map_of, map_of_queries
from pagedattn.attention.cuda.prefill_merge import MergeLaunch
from pagedattn.attention.cuda.soft_cap import ALL_TERMS, FEW_TERMS, LARGEST_CAP
from pagedattn.attention.known_lengths import short_and_long
from pagedattn.attention.triton.decode import rows_of_one_tile
from pagedattn.kv_cache import FP8

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pagedattn.attention.call import AttentionCall

HEAD_SIZES = (64, 80, 96, 128, 192, 256)
LEAST_SCALE = 1e-20  # that ALiBi's slopes are divided by


class _Parameters(ctypes.Structure):
    """`Parameters` of prefill.cu; its size is a multiple of the tensor maps' alignment."""

    _fields_ = (
        ("query", TensorMap),
        ("key", TensorMap),
        ("value", TensorMap),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "out", "lse", "tables", "kv_lengths", "query_starts", "alibi_slopes", "sinks",
                "share_out", "share_lse", "tickets",
            )
        ),
        *(
            (name, ctypes.c_int64)
            for name in ("out_token_stride", "out_head_stride", "table_stride")
        ),
        *((name, ctypes.c_float) for name in ("scale_log2", "cap_log2")),
        ("few_terms", ctypes.c_float * (2 + len(FEW_TERMS.coefficients))),
        ("all_terms", ctypes.c_float * (2 + len(ALL_TERMS.coefficients))),
        *(
            (name, ctypes.c_int32)
            for name in (
                "window", "num_sequences", "num_kv_heads", "num_tiles", "section_heads",
                "octets_of_a_block", "from_both_ends", "num_tokens", "splits", "share_tiles",
                "most_keys", "short_queries", "table_lines",
            )
        ),
        *((name, ctypes.c_void_p) for name in ("key_scale", "value_scale")),
        ("end", ctypes.c_char * 20),
    )  # fmt: skip


def not_taken(call: AttentionCall) -> str | None:
    """Say in a phrase why the kernel cannot take a call, or None if it can."""
    cache, query = call.cache, call.query
    block_size, cut = cache.block_size, usual_cut(call)
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"queries of {query.dtype}"
    if cache.dtype not in (query.dtype, FP8):
        return f"a cache of {cache.dtype}"
    if cache.head_size not in HEAD_SIZES:
        return f"head_size {cache.head_size}"
    # smaller tiles divide these blocks too, or are divided by them
    if block_size % 8 or (cut.kv_tile % block_size and block_size % cut.kv_tile):
        return f"block_size {block_size}"
    if cut.head_parts > 1 and not call.causal:
        return f"{group_of(call)} query heads a KV head, where queries see all keys"
    if cache.dtype == FP8 and not call.causal and rows_of_one_tile(call) is not None:
        # parts of shared blocks: the decode kernel comes first, and what it does not take, as heads
        # of 80, is read by all programs together in Triton's
        return f"short queries that see all keys over {cache.dtype}"
    if call.soft_cap is not None and call.soft_cap > LARGEST_CAP:
        return f"a soft cap of {call.soft_cap:g}"
    if not call.scale > 0:
        return f"scale {call.scale}"
    if call.alibi_slopes is not None and call.scale < LEAST_SCALE:
        return f"ALiBi at a scale of {call.scale}"
    block_stride, head_stride, token_stride, _ = cache.key.stride()
    if block_stride % (8 * token_stride):
        return "a cache whose blocks are no multiple of 8 tokens apart"
    places = (cache.key.data_ptr(), cache.value.data_ptr(), query.data_ptr(), call.out.data_ptr())
    strides = (*query.stride()[:2], *call.out.stride()[:2])
    of_cache = (stride * cache.dtype.itemsize for stride in (head_stride, token_stride))
    if any(place % 16 for place in (*places, *of_cache)) or any(stride % 8 for stride in strides):
        return "queries, outputs or a cache that do not lie at multiples of 16 bytes"
    return None


class PrefillLaunch:
    """A launch of the kernel for calls of one signature; `not_taken` must be None.

    Args:
        call: one of them.
        fp8_products: over an fp8 cache, round queries and weights to fp8 and multiply that.
        splits: shares of the longest sequence's keys, and so of others as many as are needed for
            none to be longer; None chooses, or is 1 if there is a `cut`.
        cut: how large tiles are, one of `prefill_estimate` for such heads, three warpgroups only
            over a cache of 16 bits, and no part of the group's heads empty, or more than its rows;
            None chooses.
        long_only: pass over short queries, of which the batch knows: nothing is written of them.
            The launch before must be the decode kernel's over them, with nothing between: programs
            begin as that one's end, unless keys are shared out or the batch has no tickets.
        trace: note when warps come to named moments, see `marks`.

    Raises:
        ValueError: `long_only` of a batch that is not mixed, or more shares than `MOST_SHARES`, or
            any of what is not `causal`.

    """

    def __init__(
        self,
        call: AttentionCall,
        *,
        fp8_products: bool = False,
        splits: int | None = None,
        cut: Cut | None = None,
        long_only: bool = False,
        trace: bool = False,
    ) -> None:
        num_programs = num_multiprocessors(call.query.device)
        self._long, self._short_queries = None, 0
        if long_only:
            short, self._long = short_and_long(call.batch.known_lengths)
            self._short_queries = short.most_queries
        if cut is None:
            work = Work.of(call, num_programs, long_only=long_only)
            if splits is None:
                way = way_of(work, is_usual=fp8_products)
            else:
                way = divided(work, work.usual, splits)
            splits, cut = way.splits, way.cut
        self._splits = splits = splits or 1
        if splits > MOST_SHARES:
            raise ValueError(
                f"keys are shared out {splits} times; it must be {MOST_SHARES} at most"
            )
        if splits > 1 and not call.causal:
            raise ValueError(f"keys that all queries see are shared out {splits} times")
        self._cut = cut
        query, cache = call.query, call.cache
        group = group_of(call)
        self._threads = (cut.warpgroups + 1 + (cache.dtype == FP8)) * 128
        self._tokens_a_tile = cut.tokens(group)
        of_queries = (self._tokens_a_tile, cut.heads(group), group)
        self._query_maps = maps_of(map_of_queries, of_queries, query)
        self._maps = maps_of(map_of, (cut.kv_tile, fp8_products), cache.key)
        self._merge: MergeLaunch | None = None
        parameters = self._parameters(call)
        if splits > 1:
            self._share_out(
                parameters, call, share_tiles_of(call, cut, splits, long_only=long_only)
            )
        self._num_programs = min(
            num_programs,
            parameters.num_tiles * cache.num_kv_heads * cut.head_parts * splits,
        )
        macros = macros_of(
            call,
            cut,
            fp8_products=fp8_products,
            is_split=splits > 1,
            # memory for shares may be what the launch before still uses, and tickets that are made
            # are another launch between
            is_beside=long_only and splits == 1 and call.batch.has_tickets,
        )
        if trace:
            macros += macros_of_trace(self._num_programs)
        self._kernel = load_kernel("prefill.cu", "prefill_kernel", macros, query.device.index)
        self._shared_bytes = shared_bytes_of(call, cut, fp8_products=fp8_products)
        self._fixed = bytes(parameters)

    def __call__(self, call: AttentionCall) -> None:
        """Launch on the current stream, with room for what shares of the keys give.

        That is 4 * (head_size + 1) bytes for each share, query token and query head.

        Args:
            call: of the signature; `out`, and `lse` if given, are written.

        """
        if self._merge is None:
            self._launch(call)
            return
        sizes, device = (self._splits, *call.out.shape), call.out.device
        out = torch.empty(sizes, dtype=torch.float32, device=device)
        lse = torch.empty(sizes[:-1], dtype=torch.float32, device=device)
        self._launch(call, out, lse)
        self._merge(call, out, lse)

    def _launch(
        self,
        call: AttentionCall,
        share_out: torch.Tensor | None = None,
        share_lse: torch.Tensor | None = None,
    ) -> None:
        cache, batch = call.cache, call.batch
        parameters = _Parameters.from_buffer_copy(self._fixed)
        parameters.query = self._query_maps.of(call.query)
        parameters.key, parameters.value = self._maps.of(cache.key), self._maps.of(cache.value)
        launch(
            self._kernel,
            (self._num_programs, self._threads, self._shared_bytes),
            parameters,
            (
                ("out", call.out),
                ("lse", call.lse),
                ("share_out", share_out),
                ("share_lse", share_lse),
                ("tables", batch.block_tables),
                ("kv_lengths", batch.kv_lengths),
                ("query_starts", batch.query_starts),
                ("alibi_slopes", call.alibi_slopes),
                ("sinks", call.sinks),
                ("tickets", batch.tickets()),
                ("key_scale", cache.key_scale),
                ("value_scale", cache.value_scale),
            ),
        )

    @property
    def cut(self) -> Cut:
        """How large tiles are."""
        return self._cut

    @property
    def splits(self) -> int:
        """Shares of the longest sequence's keys."""
        return self._splits

    def marks(self) -> NDArray[np.int64]:
        """Return what the last launch noted, if `trace`; see `launching.marks_of`."""
        return marks_of(self._kernel)

    def _share_out(self, parameters: _Parameters, call: AttentionCall, share_tiles: int) -> None:
        """Set how keys are shared out, and make what merges the shares."""
        most_keys = most_keys_of(call, self._cut)
        parameters.num_tokens, parameters.splits = call.query.shape[0], self._splits
        parameters.share_tiles, parameters.most_keys = share_tiles, most_keys
        self._merge = MergeLaunch(
            call,
            splits=self._splits,
            share_tiles=share_tiles,
            kv_tile=self._cut.kv_tile,
            most_keys=most_keys,
            short_queries=self._short_queries,
        )

    def _parameters(self, call: AttentionCall) -> _Parameters:
        """Make the kernel's parameters without addresses, keys not shared out."""
        cache, batch, num_tokens = call.cache, call.batch, call.query.shape[0]
        parameters = _Parameters()
        parameters.short_queries = self._short_queries
        parameters.out_token_stride, parameters.out_head_stride = call.out.stride()[:2]
        parameters.table_stride = batch.block_tables.stride(0)
        parameters.table_lines = table_lines_of(call)
        set_scale(parameters, call)
        if call.soft_cap is not None:
            # over fp8, whose rows have a scale each, scores are brought to tanh's argument before
            unit = call.soft_cap / (2 * LOG2_E) if cache.dtype == FP8 else call.scale
            parameters.few_terms[:] = FEW_TERMS.terms(call.soft_cap, unit)
            parameters.all_terms[:] = ALL_TERMS.terms(call.soft_cap, unit)
        parameters.window = call.window or 0
        parameters.num_sequences = batch.num_sequences
        parameters.num_kv_heads = cache.num_kv_heads
        parameters.num_tiles = num_tokens // self._tokens_a_tile + batch.num_sequences
        token_bytes = 2 * cache.head_size * cache.dtype.itemsize
        longest = batch.expected_kv_length
        if self._long is not None:
            longest = round(longest * self._long.most_kv)
        head_bytes = token_bytes * max(1, longest)
        parameters.section_heads = section_heads(cache.num_kv_heads, head_bytes)
        # few of the longest query: chunks, which the matrix units limit, among decodes, which the
        # memory does, if they are not sorted; a part of shared blocks is neither
        parameters.from_both_ends = (
            call.causal
            and self._long is None
            and 2 * num_tokens < batch.num_sequences * batch.max_query_length
        )
        parameters.octets_of_a_block = cache.key.stride(0) // (8 * cache.key.stride(2))
        return parameters
