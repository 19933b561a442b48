"""Decode and short queries on Hopper: the KV of all sequences divided evenly over the GPU.

Schedule. A *row* is one sequence and one KV head; its work is the sequence's tiles of KV that some
query sees. All sequences' tiles, laid end to end, are cut into equal ranges (Stream-K, Osama et al.
2023, applied to attention), so a ragged batch takes about as long as an even one of as many. Each
range goes to as many neighbouring programs as there are KV heads, which read the same blocks at the
same time. Where that would leave many programs without work, fewer heads are read side by side, and
such groups are laid end to end. A program finds its range from the lengths by itself: nothing is
planned on the host, and a captured graph follows new lengths.

Two neighbouring multiprocessors (a TPC) share a path to the L2, which brings less than twice what
one of them can take. So where there is not work for all programs, one of each two has some first.
Few rows are cut for fewer programs than there are, if that spares a step of merging and does not
make reading longer by as much.

If all sequences have equally many tiles, the first of these that fits is done instead:

- Each row goes to a cluster of 2 to 8 programs, which run at the same time and reach each other's
  shared memory, if the host knew of the one length, or there is but one sequence, and estimates
  that this takes less time: see `decode_division.clusters_of`. If not all clusters would run at
  once on the device, there are none.
- Ranges end where rows do, if the host estimates that merging parts would take longer, by rates
  that were fitted to batches on an H100 and on an H200: see `decode_division.WholeRows` and
  `decode_fits`, as for the clusters' rates. Where rows do not come out even, as few programs as can
  have all, or the first have one row more, or, over 16-bit heads of 64, half of the programs have
  all, each with its path to the L2 for itself. What these take longer grows with the size of a row.
  So the host tells up to which size rows stay whole, and the lengths of now decide.
- Where rows are fewer than programs, each is cut by itself into as many ranges, if at most one
  program in 16 is left without work: then none has the end of a row and the beginning of another,
  which would be two rows to merge.

If they have not, none is cut where that takes less time: the program of the longest row reads on
when all would have ended, but nothing is merged. What cutting takes was fitted to batches on an
H200, see `decode_config.Cutting`, and the lengths of now decide. If there are no more rows than
multiprocessors, each has one; if there are, rows are cut as soon as one has more than 1024 tokens
or 512 KiB, as fitted to batches on an H100, and else a range has those that begin in it, each of
which counts for some tiles more, as ending it takes time too. Tiles are large where rows are
expected to stay whole, and small enough for all warps of all programs where they are not.

If rows of several lengths are cut and are few, each row begins with a range, and the end of its
last one is left empty, so that no program has two rows to end and to merge: where at least three
are cut, and ranges are not much larger for it. Ranges are larger too, and fewer, where the longest
row's parts are then merged at once. See `decode_calls.aligns`.

Two programs share a multiprocessor where rows are many, short, or in the L2, so that one reads
while the other ends a row: see `decode_config.programs_for`.

Where the host made the batch of sequences that all have as many tokens as it allows, a program asks
for its first tiles before it has read a length, and does not wait for that and for finding out what
is whose. The lengths decide all the same: if they are others by now, what comes is thrown away.

In a program one warp does nothing but have the tensor memory accelerator (TMA) bring blocks through
the page table into shared memory, up to 128 KiB ahead a multiprocessor, and on into the next rows:
192 over heads of 64 where one program has it, on an H200 over those of 80 too; on an H100, 64 over
16-bit heads of 128, in blocks of 16 or more, where some pairs of multiprocessors have work for both
and the others for one. A block's K of one head is one instruction and one contiguous piece of
memory. One lane asks for a whole tile, K and V of a block by turns. Blocks of one token would be
too many instructions: four warps copy them by threads, or two where two programs share a
multiprocessor and registers do not suffice for more.

Four warps take the tiles by turns. Scores are K times Q transposed, tokens by queries, since a
product's first factor has 16 rows and its second 8 columns: a group of 4 heads fills half of the
columns, where it would fill a quarter of the rows. The softmax weights become the second product's
factor by transposing 8 x 8 matrices in registers. Each warp keeps a softmax of its own until the
row's end; there each puts its sums in shared memory, eight columns at a time and in units of its
own highest score, and after one barrier all four add up. Twice as many have room, so that none
waits for another to have read what was before, but for large heads and two programs, which have a
second barrier. Tiles wait meanwhile, so the next row's queries are read ahead where registers hold
them, and merging is left to the range's end. Which rows are to be merged is kept in shared memory:
registers are few where queries are many.

A row that lies within one range is written to the output at once. Of one that is cut, each program
leaves a part in a workspace. Of the warps that have the same elements in all of them, the last to
come adds these up, in the order of the ranges, so that results do not change from run to run. Of
many parts, bundles are added up first. That is three trips to the L2 one after the other: to have
the part there, to count, and to load. The programs of a cluster spare them: each adds up as large a
share of the row's elements, and the others send theirs into its shared memory, with a barrier there
that counts the bytes. Where a row has several clusters, they leave what they have, each two
elements and their weight as a word of 16 bytes, in memory that was zero, and the last cluster looks
for the words until they are there: one trip. Blocks begin in the order of their numbers, though
CUDA does not promise it, so whom it waits for has begun.

Rows of two to four parts, as ragged batches have, are not counted but swapped by twos: each thread
exchanges its elements for what lies in a place for the two, which is zero. Who gets the other's
part back was the second, adds both up, the left one first, and goes on with the sum; the first is
done. That is one trip for two parts, two for four. Where a thread would swap more than once at a
step, only rows of two parts are swapped, and none where scores have more than 8 columns.

Over e4m3, K and V become float16 in registers, which holds them exactly, and bfloat16 queries are
divided by a power of two each, so that float16 holds them.

Bytes: K and V once (2 * kv_length * head_size * itemsize a row), plus at most two parts a program,
and one of each bundle, written and read (8 * columns * head_size bytes each; 24 where zeros are put
back). Limit: the read bandwidth; where few programs have work, what a multiprocessor can take by
its path to the L2.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from pagedattn.attention.cuda.decode_calls import config_for, divide, kind_of, longest_row
from pagedattn.attention.cuda.decode_config import WARPS, DecodeConfig, macros_of
from pagedattn.attention.cuda.decode_division import WholeRows, heads_in_parallel
from pagedattn.attention.cuda.decode_map import comes_by_lines, map_of
from pagedattn.attention.cuda.launching import (
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

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pagedattn.attention.call import AttentionCall


class _Parameters(ctypes.Structure):
    """`Parameters` of decode.cu; its size is a multiple of the tensor maps' alignment."""

    _fields_ = (
        ("key", TensorMap),
        ("value", TensorMap),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("query", "out", "lse", "part", "part_weight", "arrived", "swapped"),
                *("tables", "kv_lengths", "query_starts", "key_memory", "value_memory"),
                *("key_scale", "value_scale", "alibi_slopes", "sinks"),
            )
        ),
        *(
            (name, ctypes.c_int64)
            for name in (
                *("query_token_stride", "query_head_stride"),
                *("out_token_stride", "out_head_stride", "table_stride"),
                *("block_stride", "kv_head_stride", "token_stride"),
            )
        ),
        ("scale_log2", ctypes.c_float),
        ("cap_log2", ctypes.c_float),
        *(
            (name, ctypes.c_int)
            for name in (
                *("num_sequences", "num_query_heads", "num_kv_heads"),
                *("window", "num_programs", "parallel_heads", "groups", "ranges", "all_ranges"),
                *("table_lines", "query_lines"),
                *("max_kv_length", "max_query_length", "is_full"),
                *("whole_rows", "whole_more", "whole_tiles"),
            )
        ),
        ("_padding", ctypes.c_char * 52),
    )


class DecodeLaunch:
    """A launch of decode for calls of one signature; `decode_calls.not_taken` must be None.

    Args:
        call: one of them.
        config: how to cut and compile; None chooses.
        among_longer: pass over sequences of more than the batch's `max_query_length` query tokens,
            of which nothing is written; else there must be none.
        trace: note when warps come to named moments, see `marks`.

    """

    def __init__(
        self,
        call: AttentionCall,
        config: DecodeConfig | None = None,
        *,
        among_longer: bool = False,
        trace: bool = False,
    ) -> None:
        flags = {"among_longer": among_longer, "trace": trace}
        cluster = config.cluster if config else None
        if among_longer:  # rows are not known to be of one length
            cluster = 1
        self._prepare(call, config, cluster, **flags)
        if not self._run_at_once():
            self._prepare(call, config, 1, **flags)
        self._maps = maps_of(map_of, self._config.tile, call.cache.key)
        self._fixed = bytes(self._parameters(call))

    def _prepare(
        self,
        call: AttentionCall,
        config: DecodeConfig | None,
        cluster: int | None,
        *,
        among_longer: bool,
        trace: bool,
    ) -> None:
        """Divide the work and load the kernel; `cluster` is programs of one, or None to choose."""
        query, cache, batch = call.query, call.cache, call.batch
        num_kv_heads, head_size = cache.num_kv_heads, cache.head_size
        kv_bytes = cache.key.element_size()
        group = query.shape[1] // num_kv_heads
        num_programs = num_multiprocessors(query.device)
        clusters_of_row = config.clusters_of_row if config else None
        self._heads, self._ranges, cluster = divide(call, num_programs, cluster, clusters_of_row)
        if config is None:
            config = config_for(call, num_programs, self._heads, self._ranges)
        if config.programs > 1:  # clusters are for few rows
            cluster = 1
        if cluster != config.cluster:
            config = replace(config, cluster=cluster)
        macros = macros_of(
            config,
            head_size=head_size,
            kv_bytes=kv_bytes,
            group=group,
            bf16=query.dtype == torch.bfloat16,
            block_size=cache.block_size,
            lines=comes_by_lines(cache.key),
            features=call.features,
            out_f32=call.out.dtype == torch.float32,
            among_longer=among_longer,
        )
        self._num_programs = num_programs * config.programs
        if config.programs > 1:  # rows are many, or short
            self._heads = heads_in_parallel(num_kv_heads, self._num_programs)
            self._ranges = self._num_programs // self._heads
        if config.cluster > 1:
            self._num_programs = self._ranges * self._heads
        self._whole = WholeRows.of(
            batch.num_sequences * num_kv_heads // self._heads,
            self._heads,
            self._ranges,
            self._num_programs,
            longest_row(call)[0],
            kind_of(call),
            programs=config.programs,
        )
        if config.whole is not None:
            self._whole = config.whole
        if trace:
            macros += macros_of_trace(self._num_programs)
        self._kernel = load_kernel("decode.cu", "decode_kernel", macros, query.device.index)
        self._threads = 32 * (WARPS + dict(macros)["PRODUCERS"])
        self._config = config
        places = 4 * self._num_programs * config.columns
        self._part_floats = places * (head_size + 2 * WARPS)
        self._weights_at = 4 * places * head_size
        swaps = config.columns == 8 or config.cluster > 1  # see `swapped` in decode_finish.cuh
        self._swapped_floats = swaps * 2 * self._num_programs * config.columns * head_size

    def _run_at_once(self) -> bool:
        """Whether no cluster begins only when others end."""
        config = self._config
        if config.cluster == 1:
            return True
        most = self._kernel.most_clusters(self._threads, config.shared_bytes, config.cluster)
        return most * config.cluster >= self._num_programs

    def __call__(self, call: AttentionCall) -> None:
        """Launch on the current stream, with a workspace of its own.

        Args:
            call: of the signature; `out`, and `lse` if given, are written.

        """
        cache, batch = call.cache, call.batch
        parameters = _Parameters.from_buffer_copy(self._fixed)
        parameters.key, parameters.value = self._maps.of(cache.key), self._maps.of(cache.value)
        part = torch.empty(self._part_floats, dtype=torch.float32, device=call.query.device)
        parameters.part_weight = part.data_ptr() + self._weights_at
        launch(
            self._kernel,
            (self._num_programs, self._threads, self._config.shared_bytes),
            parameters,
            (
                ("query", call.query),
                ("out", call.out),
                ("lse", call.lse),
                ("part", part),
                ("arrived", batch.counters(2 * self._num_programs * WARPS)),
                ("swapped", batch.zeros(self._swapped_floats) if self._swapped_floats else None),
                ("tables", batch.block_tables),
                ("kv_lengths", batch.kv_lengths),
                ("query_starts", batch.query_starts),
                ("key_memory", cache.key),
                ("value_memory", cache.value),
                ("key_scale", cache.key_scale),
                ("value_scale", cache.value_scale),
                ("alibi_slopes", call.alibi_slopes),
                ("sinks", call.sinks),
            ),
            self._config.cluster,
        )

    @property
    def config(self) -> DecodeConfig:
        """How the kernel is cut."""
        return self._config

    @property
    def num_ranges(self) -> int:
        """Ranges; each is worked on by a program for each head that is read side by side."""
        return self._ranges

    @property
    def whole(self) -> WholeRows:
        """Up to which size rows of one length are not cut, and how they are divided then."""
        return self._whole

    def marks(self) -> NDArray[np.int64]:
        """Return what the last launch noted, if `trace`; see `launching.marks_of`."""
        return marks_of(self._kernel)

    def _parameters(self, call: AttentionCall) -> _Parameters:
        """Make the kernel's parameters without addresses."""
        query, cache, batch = call.query, call.cache, call.batch
        parameters = _Parameters()
        parameters.query_token_stride, parameters.query_head_stride = query.stride()[:2]
        parameters.out_token_stride, parameters.out_head_stride = call.out.stride()[:2]
        parameters.table_stride = batch.block_tables.stride(0)
        set_scale(parameters, call)
        parameters.num_sequences = batch.num_sequences
        parameters.num_query_heads = query.shape[1]
        parameters.num_kv_heads = cache.num_kv_heads
        parameters.window = call.window or 0
        parameters.num_programs = self._num_programs
        (
            parameters.block_stride,
            parameters.kv_head_stride,
            parameters.token_stride,
        ) = (stride * cache.key.element_size() for stride in cache.key.stride()[:3])
        parameters.parallel_heads = self._heads
        parameters.groups = cache.num_kv_heads // self._heads
        parameters.ranges = self._ranges
        parameters.all_ranges = self._num_programs // self._heads
        width = batch.block_tables.shape[1]
        parameters.max_kv_length = min(batch.max_kv_length, width * cache.block_size)
        parameters.max_query_length = batch.max_query_length
        parameters.is_full = batch.is_full
        parameters.whole_rows, parameters.whole_more = self._whole.of_range, self._whole.more
        tile_bytes = 2 * self._config.tile * cache.head_size * cache.key.element_size()
        parameters.whole_tiles = min(self._whole.most_bytes // tile_bytes, (1 << 31) - 1)
        parameters.table_lines = table_lines_of(call)
        if query.is_contiguous():
            parameters.query_lines = query.numel() // 64
        return parameters
