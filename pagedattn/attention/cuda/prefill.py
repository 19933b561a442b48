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

Where items are few and keys many, each tile's keys are shared out: an item is a share, whose result
is written in float32 with its log-sum-exp, and another launch merges the shares in order.

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
Shares write and read 8 * (head_size + 1) bytes a query and head each.

Source: FlashAttention-3 (Shah et al. 2024) for the overlap within a warpgroup, and for the order of
warpgroups; its reading of a page table by threads is replaced by the accelerator's.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
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
from pagedattn.attention.cuda.prefill_choice import cut_of, divided, splits_of
from pagedattn.attention.cuda.prefill_config import (
    Cut,
    group_of,
    macros_of,
    section_heads,
    shared_bytes_of,
    usual_cut,
)
from pagedattn.attention.cuda.prefill_map import map_of, map_of_queries
from pagedattn.attention.cuda.soft_cap import ALL_TERMS, FEW_TERMS, LARGEST_CAP
from pagedattn.attention.triton.decode import rows_of_one_tile
from pagedattn.attention.triton.parts import merge_shares
from pagedattn.kv_cache import FP8

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pagedattn.attention.call import AttentionCall
    from pagedattn.attention.mixture import Mixture

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
                "tickets",
            )
        ),
        *(
            (name, ctypes.c_int64)
            for name in ("out_token_stride", "out_head_stride", "table_stride", "out_split_stride")
        ),
        *((name, ctypes.c_float) for name in ("scale_log2", "cap_log2")),
        ("few_terms", ctypes.c_float * (2 + len(FEW_TERMS.coefficients))),
        ("all_terms", ctypes.c_float * (2 + len(ALL_TERMS.coefficients))),
        *(
            (name, ctypes.c_int32)
            for name in (
                "window", "num_sequences", "num_kv_heads", "num_tiles", "section_heads",
                "octets_of_a_block", "from_both_ends", "splits", "short_queries", "table_lines",
            )
        ),
        *((name, ctypes.c_void_p) for name in ("key_scale", "value_scale")),
        ("end", ctypes.c_char * 48),
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
        splits: shares of each tile's keys; None chooses.
        cut: how large tiles are, one of `prefill_choice` for such heads, three warpgroups only over
            a cache of 16 bits, and no part of the group's heads empty, or more than its rows; None
            chooses.
        mixture: of the batch; then its short queries are passed over, of which nothing is written.
            The launch before must be the decode kernel's over them, with nothing between: programs
            begin as that one's end, unless keys are shared out or the batch has no tickets.
        trace: note when warps come to named moments, see `marks`.

    """

    def __init__(
        self,
        call: AttentionCall,
        *,
        fp8_products: bool = False,
        splits: int | None = None,
        cut: Cut | None = None,
        mixture: Mixture | None = None,
        trace: bool = False,
    ) -> None:
        num_programs = num_multiprocessors(call.query.device)
        self._mixture = mixture
        self._splits = splits_of(call, num_programs, mixture) if splits is None else splits
        if cut is None and (fp8_products or self._splits > 1):
            # what these take is known of the usual tiles alone
            usual = usual_cut(call)
            cut, _ = divided(call, num_programs, mixture, usual, splits=self._splits)
        elif cut is None:
            cut = cut_of(call, num_programs, mixture)
        self._cut = cut
        if self._splits > 1:
            call, _, _ = _shares_of(call, self._splits)
        query, cache = call.query, call.cache
        group = group_of(call)
        self._threads = (cut.warpgroups + 1 + (cache.dtype == FP8)) * 128
        self._tokens_a_tile = cut.tokens(group)
        of_queries = (self._tokens_a_tile, cut.heads(group), group)
        self._query_maps = maps_of(map_of_queries, of_queries, query)
        self._maps = maps_of(map_of, (cut.kv_tile, fp8_products), cache.key)
        parameters = self._parameters(call)
        self._num_programs = min(
            num_programs,
            parameters.num_tiles * cache.num_kv_heads * cut.head_parts * self._splits,
        )
        macros = macros_of(
            call,
            cut,
            fp8_products=fp8_products,
            is_split=self._splits > 1,
            # memory for shares may be what the launch before still uses, and tickets that are made
            # are another launch between
            is_beside=mixture is not None and self._splits == 1 and call.batch.has_tickets,
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
        if self._splits == 1:
            self._launch(call)
        else:
            shares, out, lse = _shares_of(call, self._splits)
            self._launch(shares)
            merge_shares(call, out, lse, self._short_queries)

    @property
    def _short_queries(self) -> int:
        return 0 if self._mixture is None else self._mixture.most_short_queries

    def _launch(self, call: AttentionCall) -> None:
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
        """Shares of each tile's keys."""
        return self._splits

    def marks(self) -> NDArray[np.int64]:
        """Return what the last launch noted, if `trace`; see `launching.marks_of`."""
        return marks_of(self._kernel)

    def _parameters(self, call: AttentionCall) -> _Parameters:
        """Make the kernel's parameters without addresses."""
        cache, batch, num_tokens = call.cache, call.batch, call.query.shape[0]
        mixture = self._mixture
        parameters = _Parameters()
        parameters.short_queries = self._short_queries
        parameters.out_token_stride, parameters.out_head_stride = call.out.stride()[:2]
        parameters.out_split_stride, parameters.splits = call.out.numel(), self._splits
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
        longest = batch.expected_kv_length if mixture is None else mixture.longest_long_kv
        head_bytes = token_bytes * max(1, longest)
        parameters.section_heads = section_heads(cache.num_kv_heads, head_bytes)
        # few of the longest query: chunks, which the matrix units limit, among decodes, which the
        # memory does, if they are not sorted; a part of shared blocks is neither
        parameters.from_both_ends = (
            call.causal
            and mixture is None
            and 2 * num_tokens < batch.num_sequences * batch.max_query_length
        )
        parameters.octets_of_a_block = cache.key.stride(0) // (8 * cache.key.stride(2))
        return parameters


def _shares_of(
    call: AttentionCall, splits: int
) -> tuple[AttentionCall, torch.Tensor, torch.Tensor]:
    """Return a call that writes the first share's results, and those of all shares.

    Returns:
        The call, float32 [splits, num_query_tokens, num_query_heads, head_size], and float32
        [splits, num_query_tokens, num_query_heads], the log-sum-exp.

    """
    sizes, device = (splits, *call.out.shape), call.out.device
    out = torch.empty(sizes, dtype=torch.float32, device=device)
    lse = torch.empty(sizes[:-1], dtype=torch.float32, device=device)
    return replace(call, out=out[0], lse=lse[0], sinks=None), out, lse
