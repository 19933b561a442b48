"""How the decode kernel describes K and V to the TMA."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pagedattn.attention.cuda.decode_fits import fit_for
from pagedattn.attention.cuda.module import tensor_map

if TYPE_CHECKING:
    import torch

    from pagedattn.attention.cuda.module import TensorMap

LINE_BYTES = 128  # that the L2 keeps together


def comes_by_lines(part: torch.Tensor) -> bool:
    """Return whether boxes are lines of 128 bytes, whatever a token's bytes.

    A row that no swizzle spans would be asked for in pieces of lines: so rows of 160 bytes, of
    16-bit heads of 80, and of 96, of fp8 heads of 96. Where tokens of a block follow each other in
    memory, as they do in shared memory, a box is as well described as so many lines.

    Args:
        part: K or V, [num_blocks, num_kv_heads, block_size, head_size].

    """
    _, _, block_size, head_size = part.shape
    row_bytes = head_size * part.element_size()
    follow = part.stride()[2:] == (head_size, 1)
    return row_bytes % 64 != 0 and follow and block_size * row_bytes % LINE_BYTES == 0


def map_of(part: torch.Tensor, tile: int) -> TensorMap:
    """Describe K or V so that one instruction moves one head's tokens of a block.

    Dimensions: a span of a row, tokens of a block, spans of a row, heads, blocks. A span is what
    the swizzle covers, or a whole row without one; see decode_shape.cuh. Or a line, lines of a
    block, one, heads, blocks: see `comes_by_lines`.

    Args:
        part: K or V, [num_blocks, num_kv_heads, block_size, head_size].
        tile: tokens, a power of two.

    Raises:
        CudaError: the driver refuses.

    """
    num_blocks, num_kv_heads, block_size, head_size = part.shape
    size = part.element_size()
    row_bytes = head_size * size
    block_stride, head_stride, token_stride = (stride * size for stride in part.stride()[:3])
    fetched_bytes = fit_for(part.device).fetched_bytes
    if comes_by_lines(part):
        lines, box_lines = (
            tokens * row_bytes // LINE_BYTES for tokens in (block_size, min(block_size, tile))
        )
        return tensor_map(
            part.data_ptr(),
            size,
            (LINE_BYTES // size, lines, 1, num_kv_heads, num_blocks),
            (LINE_BYTES, LINE_BYTES, head_stride, block_stride),
            (LINE_BYTES // size, box_lines, 1, 1, 1),
            16,
            fetched_bytes,
        )
    span = next(span for span in (128, 64, row_bytes) if row_bytes % span == 0)
    return tensor_map(
        part.data_ptr(),
        size,
        (span // size, block_size, row_bytes // span, num_kv_heads, num_blocks),
        (token_stride, span, head_stride, block_stride),
        (span // size, min(block_size, tile), row_bytes // span, 1, 1),
        span if span % 64 == 0 else 16,
        fetched_bytes,
    )
