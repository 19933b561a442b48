"""The second half of prefill where keys are shared out: what the shares gave, merged.

Schedule. A warp merges a query and head: 16 or 32 of its lanes have 16 bytes each of a share's
result, and 8 shares at a time are on their way. Sequences with one share have been written by the
prefill kernel itself: programs count, while that one still runs, the query tokens of the others,
and go through these alone. Shares are added up in one order, whoever comes first.

Bytes: 4 * (head_size + 1) of each share, and the output. Limit: the L2, where shares have just been
written, and how soon a launch begins.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

from pagedattn.attention.cuda.launching import launch
from pagedattn.attention.cuda.module import load_kernel

if TYPE_CHECKING:
    from pagedattn.attention.call import AttentionCall

WARPS = 4  # as in prefill_merge.cu
MOST_PROGRAMS = 16 * 132
"""That run at once, of few sequences; where there are more rows, each merges several."""


class _Parameters(ctypes.Structure):
    """`Parameters` of prefill_merge.cu."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "share_out", "share_lse", "out", "lse", "kv_lengths", "query_starts", "sinks",
            )
        ),
        *((name, ctypes.c_int64) for name in ("out_token_stride", "out_head_stride")),
        *(
            (name, ctypes.c_int32)
            for name in (
                "num_tokens", "num_heads", "num_sequences", "splits", "share_tiles", "most_keys",
                "short_queries",
            )
        ),
    )  # fmt: skip


class MergeLaunch:
    """A launch of the kernel for calls of one signature, after the prefill kernel's.

    Args:
        call: one of them.
        splits: the most shares of a sequence.
        share_tiles: tiles of keys that a share has at most, if that makes no more of them.
        kv_tile: tokens of a tile of keys.
        most_keys: that a tile of queries sees.
        short_queries: sequences of as many at most are left alone, if it is not 0.

    """

    def __init__(
        self,
        call: AttentionCall,
        *,
        splits: int,
        share_tiles: int,
        kv_tile: int,
        most_keys: int,
        short_queries: int,
    ) -> None:
        num_tokens, num_heads, head_size = call.out.shape
        num_sequences = call.batch.num_sequences
        self._sizes = (
            max(1, min(MOST_PROGRAMS, -(-num_tokens * num_heads // WARPS))),
            WARPS * 32,
            4 * num_sequences,
        )
        macros = (
            ("HEAD_SIZE", head_size),
            ("KV_TILE", kv_tile),
            ("BF16", int(call.out.dtype == torch.bfloat16)),
            ("OUT_F32", int(call.out.dtype == torch.float32)),
            ("SINKS", int(call.sinks is not None)),
            ("LSE", int(call.lse is not None)),
        )
        device = call.out.device.index
        self._kernel = load_kernel("prefill_merge.cu", "merge_kernel", macros, device)
        out_token_stride, out_head_stride = call.out.stride()[:2]
        self._fixed = bytes(
            _Parameters(
                out_token_stride=out_token_stride,
                out_head_stride=out_head_stride,
                num_tokens=num_tokens,
                num_heads=num_heads,
                num_sequences=num_sequences,
                splits=splits,
                share_tiles=share_tiles,
                most_keys=most_keys,
                short_queries=short_queries,
            )
        )

    def __call__(
        self, call: AttentionCall, share_out: torch.Tensor, share_lse: torch.Tensor
    ) -> None:
        """Launch on the current stream.

        Args:
            call: of the signature; `out`, and `lse` if given, are written, where sequences have
                more than one share.
            share_out: float32 [splits, num_query_tokens, num_query_heads, head_size], contiguous.
            share_lse: float32 [splits, num_query_tokens, num_query_heads], contiguous.

        """
        launch(
            self._kernel,
            self._sizes,
            _Parameters.from_buffer_copy(self._fixed),
            (
                ("share_out", share_out),
                ("share_lse", share_lse),
                ("out", call.out),
                ("lse", call.lse),
                ("kv_lengths", call.batch.kv_lengths),
                ("query_starts", call.batch.query_starts),
                ("sinks", call.sinks),
            ),
        )
