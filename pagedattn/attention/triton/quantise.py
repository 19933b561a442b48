"""Rounding to 8-bit floats inside a kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from pagedattn.kv_cache import LayerCache


@triton.jit
def e4m3_bits(values, HARDWARE: tl.constexpr):
    """Round float32 to fp8 e4m3, to the nearest and of two the even; beyond ±448 to ±448.

    NaN stays NaN. A value is sign, 4 bits of exponent (bias 7) and 3 of mantissa; below 2⁻⁶ they
    are the multiples of 2⁻⁹ (Micikevicius et al. 2022, table 1).

    Args:
        values: float32, any shape.
        HARDWARE: whether to use the GPU's instruction, which rounds float32 in one step from
            compute capability 9 on. Else integer operations do it: Triton goes by way of float16
            before that, and its interpreter rounds otherwise.

    Returns:
        uint8 of the same shape.

    """
    clamped = tl.clamp(values, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    if HARDWARE:
        code = clamped.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = clamped.to(tl.uint32, bitcast=True)
        size = bits & 0x7FFFFFFF
        # half of what the lower 20 bits of mantissa count, less one bit if the rest is even; the
        # exponent's bias falls from 127 to 7
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
        # added to 2¹⁴, whose last bit counts 2⁻⁹, a small number is rounded to a multiple of that
        small = (tl.abs(clamped) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
        rounded = tl.where(size < 0x3C800000, small, normal)  # 2⁻⁶
        rounded = tl.where(size > 0x7F800000, 0x7F, rounded)  # NaN
        code = (((bits >> 24) & 0x80) | rounded).to(tl.uint8)
    return code


@triton.jit
def to_cache(values, scale_ptr, heads, mask, dtype: tl.constexpr, HARDWARE: tl.constexpr):
    """Round what is written to the cache's dtype; fp8, told by uint8, in units of a head's scale.

    Args:
        values: what is written.
        scale_ptr: float32 [num_kv_heads], or None for 1; used for fp8 alone.
        heads: the head of each of the values, in a shape that is broadcast to theirs.
        mask: which of the heads there are.
        dtype: of the cache.
        HARDWARE: see `e4m3_bits`.

    """
    if dtype == tl.uint8:
        wide = values.to(tl.float32)
        if scale_ptr is not None:
            wide = tl.div_rn(wide, tl.load(scale_ptr + heads, mask=mask, other=1.0))
        rounded = e4m3_bits(wide, HARDWARE)
    else:
        rounded = values.to(dtype)
    return rounded


def cache_views(cache: LayerCache) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """K and V as kernels write them, and what they take as `HARDWARE`.

    Returns:
        K and V in their dtype, or the bytes of fp8; whether the GPU rounds float32 to fp8.

    """
    if cache.key.dtype != torch.float8_e4m3fn:
        return cache.key, cache.value, False
    on_gpu = cache.key.is_cuda
    hardware = on_gpu and torch.cuda.get_device_capability(cache.key.device) >= (9, 0)
    return cache.key.view(torch.uint8), cache.value.view(torch.uint8), hardware
