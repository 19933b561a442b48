// Numbers of 16 and 8 bits by the names of the kernels' hopper.cuh; rounded to the nearest, of two to
// the even one.
#pragma once
#include "cuda_names.hpp"

DEVICE float exp2_of(float x) { return exp2f(x); }
DEVICE float log2_of(float x) { return log2f(x); }

DEVICE u32 bf16_of(float x) {
    u32 bits = __float_as_uint(x);
    return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

DEVICE float f16_to_float(u32 half) {
    float size = __uint_as_float((half & 0x7fff) << 13) * 0x1p112f;  // exponents are counted from others
    if ((half & 0x7c00) == 0x7c00) size = half & 0x3ff ? NAN : INFINITY;
    return half & 0x8000 ? -size : size;
}

DEVICE u32 f16_of(float x) {
    u32 sign = __float_as_uint(x) >> 16 & 0x8000, bits = __float_as_uint(fabsf(x));
    if (x != x) return 0x7fff;
    if (fabsf(x) >= 65520) return sign | 0x7c00;
    // subnormal: 0.5 has as many binary places in a float
    if (fabsf(x) < 0x1p-14f) return sign | (__float_as_uint(fabsf(x) + 0.5f) - __float_as_uint(0.5f));
    return sign | (((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10));
}

DEVICE u32 f16_of_one_e4m3(u32 bits) {
    if ((bits & 127) == 127) return 0x7fff;
    float size = __uint_as_float((bits & 127) << 20) * 0x1p120f;
    return f16_of(bits & 128 ? -size : size);
}

DEVICE u32 f16_of_e4m3(u32 pair) { return f16_of_one_e4m3(pair & 255) | f16_of_one_e4m3(pair >> 8 & 255) << 16; }

DEVICE u32 f16_of_upper_e4m3(u32 pair) { return f16_of_e4m3(pair >> 16); }

DEVICE u32 e4m3_of(float x) {
    float size = fminf(fabsf(x), 448);
    u32 sign = __float_as_uint(x) >> 24 & 128, bits = __float_as_uint(size);
    if (x != x) return 127;
    // subnormal: 2^14 has as many binary places in a float
    if (size < 0x1p-6f) return sign | (__float_as_uint(size + 0x1p14f) - __float_as_uint(0x1p14f));
    return sign | (((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3));
}

DEVICE u32 pack_e4m3(float first, float second, float third, float fourth) {
    return e4m3_of(first) | e4m3_of(second) << 8 | e4m3_of(third) << 16 | e4m3_of(fourth) << 24;
}

DEVICE u32 pack_bf16(float low, float high) { return bf16_of(low) | bf16_of(high) << 16; }
DEVICE u32 pack_f16(float low, float high) { return f16_of(low) | f16_of(high) << 16; }
DEVICE float bf16_low(u32 pair) { return __uint_as_float(pair << 16); }
DEVICE float bf16_high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
DEVICE float f16_low(u32 pair) { return f16_to_float(pair & 0xffff); }
DEVICE float f16_high(u32 pair) { return f16_to_float(pair >> 16); }

DEVICE u32 select_bytes(u32 a, u32 b, u32 selector) {
    u64 both = (u64)b << 32 | a;
    u32 found = 0;
    for (int i = 0; i < 4; ++i) found |= (u32)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return found;
}
