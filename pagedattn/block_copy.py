"""Copying blocks of all layers in one launch on a GPU. Needs Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from numpy.typing import NDArray

_WORDS = 2048  # a program's: 64 bytes a thread, in flight together
_NUM_WARPS = 4


@triton.jit(
    do_not_specialize=["pairs_stride", "num_source_blocks", "num_destination_blocks"],
)
def _block_copy_kernel(
    source_ptr,
    destination_ptr,
    pairs_ptr,
    pairs_stride,
    num_source_blocks,
    num_destination_blocks,
    source_layer_stride,
    source_block_stride,
    destination_layer_stride,
    destination_block_stride,
    NUM_WORDS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Copy a piece of one block of one layer. Grid: [num_pairs * pieces a block, num_layers].

    A piece is 8 KiB, and all of it is on its way at once; pieces of a block follow each other, so
    that what runs at one time reads and writes long stretches.

    Bytes: 2 * num_pairs * num_layers * bytes of a layer's block. Limit: the copy bandwidth.
    """
    PIECES: tl.constexpr = (NUM_WORDS + WORDS - 1) // WORDS
    pair = tl.program_id(0) // PIECES
    layer = tl.program_id(1).to(tl.int64)
    source = tl.load(pairs_ptr + pair).to(tl.int64)
    destination = tl.load(pairs_ptr + pairs_stride + pair).to(tl.int64)
    inside = (source >= 0) & (source < num_source_blocks)
    inside &= (destination >= 0) & (destination < num_destination_blocks)
    if inside:
        words = tl.program_id(0) % PIECES * WORDS + tl.arange(0, WORDS)
        mask = words < NUM_WORDS
        read = source_ptr + layer * source_layer_stride + source * source_block_stride
        written = (
            destination_ptr
            + layer * destination_layer_stride
            + destination * destination_block_stride
        )
        tl.store(written + words, tl.load(read + words, mask=mask), mask=mask)


def launch_block_copy(source: torch.Tensor, destination: torch.Tensor, pairs: torch.Tensor) -> None:
    """Copy blocks of all layers in one launch; changes `destination`.

    May be captured in a CUDA graph: the pairs are read when it runs. Blocks are read and written
    in no order, so none may be both.

    Args:
        source: [num_layers, num_blocks, 2, num_kv_heads, block_size, head_size], a block of a
            layer contiguous.
        destination: the same but for the number of blocks; may be `source`.
        pairs: int32 or int64 [2, num_pairs], on the same device, contiguous in the last
            dimension: blocks of `source`, and blocks of `destination` below them. A pair that
            names a block outside its tensor, as -1, is skipped.

    """
    num_pairs = pairs.shape[1]
    if num_pairs == 0:
        return
    row_bytes = source.shape[-1] * source.itemsize
    word = torch.int32 if row_bytes % 4 == 0 else torch.int8
    source, destination = source.view(word), destination.view(word)
    num_words = source[0, 0].numel()
    words = min(_WORDS, triton.next_power_of_2(num_words))
    _block_copy_kernel[(num_pairs * triton.cdiv(num_words, words), source.shape[0])](
        source,
        destination,
        pairs,
        pairs.stride(0),
        source.shape[1],
        destination.shape[1],
        source.stride(0),
        source.stride(1),
        destination.stride(0),
        destination.stride(1),
        NUM_WORDS=num_words,
        WORDS=words,
        num_warps=_NUM_WARPS,
    )


def pairs_on(
    device: torch.device, sources: NDArray[np.integer], destinations: NDArray[np.integer]
) -> torch.Tensor:
    """Bring pairs of blocks to a GPU; the host does not wait for the work that is running there.

    Returns:
        int32 [2, num_pairs].

    """
    host = torch.empty((2, sources.size), dtype=torch.int32, pin_memory=device.type == "cuda")
    np.stack([sources, destinations], out=host.numpy(), casting="same_kind")
    return host.to(device, non_blocking=True)
