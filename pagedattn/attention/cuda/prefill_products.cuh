// Matrix products of a warpgroup: 64 rows; a thread has of each row r = lane / 4 and r + 8 of
// its warp's 16 the columns 8 j + 2 (lane % 4) + {0, 1}, four numbers for each j
#pragma once
#include "hopper.cuh"

#define REGISTERS_32                                                                               \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,"  \
    "%25,%26,%27,%28,%29,%30,%31}"
#define REGISTERS_64                                                                               \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,"  \
    "%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
    "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"
#define SUMS_4(d, i) "+f"((d)[i]), "+f"((d)[i + 1]), "+f"((d)[i + 2]), "+f"((d)[i + 3])
#define SUMS_16(d, i) SUMS_4(d, i), SUMS_4(d, i + 4), SUMS_4(d, i + 8), SUMS_4(d, i + 12)
#define SUMS_32(d) SUMS_16(d, 0), SUMS_16(d, 16)
#define SUMS_64(d) SUMS_32(d), SUMS_16(d, 32), SUMS_16(d, 48)
#if BF16 && !FP8
#define TYPES "f32.bf16.bf16"
#else
#define TYPES "f32.f16.f16"
#endif
// a product's depth and types, and for 16 bits which factors are transposed
#if FP8_PRODUCTS
#define KIND "k32.f32.e4m3.e4m3 "
#define NEITHER ""
#define NOT_THE_SECOND ""
#define THE_SECOND ""
#else
#define KIND "k16." TYPES " "
#define NEITHER ", 0, 0"
#define NOT_THE_SECOND ", 0"
#define THE_SECOND ", 1"
#endif

DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
DEVICE void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keep the compiler from moving uses of sums across a wait for them.
template <int COUNT>
DEVICE void pin(float (&sums)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// Where a factor lies in shared memory, swizzled by 128 bytes, and the bytes between its pieces.
DEVICE u64 descriptor(u32 address, u32 leading_stride, u32 stride) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)(leading_stride >> 4) << 16 |
           (u64)(stride >> 4) << 32 | 1ull << 62;
}

// d [64, KV_TILE] = (add ? d : 0) + a [64, 16] b [KV_TILE, 16] transposed; 32 of e4m3
DEVICE void multiply_scores(float (&d)[64], u64 a, u64 b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128" KIND REGISTERS_64
                 ", %64, %65, p, 1, 1" NEITHER ";}\n"
                 : SUMS_64(d)
                 : "l"(a), "l"(b), "r"(add));
}

DEVICE void multiply_scores(float (&d)[32], u64 a, u64 b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64" KIND REGISTERS_32
                 ", %32, %33, p, 1, 1" NEITHER ";}\n"
                 : SUMS_32(d)
                 : "l"(a), "l"(b), "r"(add));
}

// The same with a in registers.
DEVICE void multiply_scores(float (&d)[64], const u32 (&a)[4], u64 b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128" KIND REGISTERS_64
                 ", {%64, %65, %66, %67}, %68, p, 1, 1" NOT_THE_SECOND ";}\n"
                 : SUMS_64(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

DEVICE void multiply_scores(float (&d)[32], const u32 (&a)[4], u64 b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64" KIND REGISTERS_32
                 ", {%32, %33, %34, %35}, %36, p, 1, 1" NOT_THE_SECOND ";}\n"
                 : SUMS_32(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

// d [64, 128 or 64] += a [64, 16], in registers, b [16, 128 or 64]; of e4m3 a [64, 32], and b transposed
DEVICE void multiply_values_128(float *d, const u32 *a, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128" KIND REGISTERS_64
                 ", {%64, %65, %66, %67}, %68, 1, 1, 1" THE_SECOND ";\n"
                 : SUMS_64(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

DEVICE void multiply_values_64(float *d, const u32 *a, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64" KIND REGISTERS_32
                 ", {%32, %33, %34, %35}, %36, 1, 1, 1" THE_SECOND ";\n"
                 : SUMS_32(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
