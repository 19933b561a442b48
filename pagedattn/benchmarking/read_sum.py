"""Reading as fast as a GPU can, for the read bandwidth. Needs Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    import torch

PIECE = 4096  # elements that a program adds at a time: 64 bytes a thread, in flight together
_NUM_WARPS = 8


@triton.jit
def _sum_kernel(source_ptr, out_ptr, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """Add up a stretch of `PIECES` pieces that follow each other. Grid: [stretches].

    Programs are many and short, and a multiprocessor has several, so that some read while others
    begin and end.

    Bytes: 4 * the source's elements. Limit: the read bandwidth, which this is to show.
    """
    stretch = tl.program_id(0).to(tl.int64)
    elements = tl.arange(0, PIECE)
    total = tl.zeros((PIECE,), tl.float32)
    for piece in range(PIECES):
        total += tl.load(source_ptr + (stretch * PIECES + piece) * PIECE + elements)
    tl.store(out_ptr + stretch, tl.sum(total))


def sum_stretches(source: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Add up stretches of elements that follow each other, as many as there are in `out`.

    Args:
        source: float32 [stretches * a multiple of `PIECE`].
        out: float32 [stretches]; written.

    Returns:
        `out`.

    """
    pieces, rest = divmod(source.numel(), len(out) * PIECE)
    assert rest == 0 < pieces, "all is to be read"
    _sum_kernel[(len(out),)](source, out, PIECE, pieces, num_warps=_NUM_WARPS)
    return out
