// CUDA's own names, as far as the kernels use them.
#pragma once
#include <algorithm>
#include <cmath>

#include "scheduler.hpp"
#include "shared_memory.hpp"

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#define DEVICE inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

struct Dimension {
    u32 x;
};
#define threadIdx (Dimension{(u32)machine::current->thread})
#define blockIdx (Dimension{(u32)machine::current->program->index})
#define blockDim (Dimension{(u32)machine::here->num_threads})
#define gridDim (Dimension{(u32)machine::here->num_programs})

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using std::max;
using std::min;

inline u32 __float_as_uint(float x) {
    u32 bits;
    memcpy(&bits, &x, 4);
    return bits;
}

inline float __uint_as_float(u32 bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

inline int __ffs(u32 x) { return __builtin_ffs((int)x); }
inline int __popc(u32 x) { return __builtin_popcount(x); }
inline u32 __umulhi(u32 x, u32 y) { return (u32)((u64)x * y >> 32); }
inline float __fdividef(float x, float y) { return x / y; }

template <class T>
T __ldg(const T *from) {
    return *from;
}

template <class T>
T __ldcg(const T *from) {
    return *from;
}

template <class T>
T atomicAdd(T *to, T x) {
    machine::hesitate();
    return std::exchange(*to, *to + x);
}
inline u32 atomicAdd(u32 *to, int x) { return atomicAdd(to, (u32)x); }

// ---- what a block and a warp do together

inline void __syncthreads() { machine::gather(0, 0); }

inline void require_all(u32 mask) {
    if (mask != ~0u) machine::fail("asks for some of its warp's lanes, which is not emulated");
}

inline void __syncwarp(u32 mask = ~0u) {
    require_all(mask);
    machine::warp_barrier("__syncwarp");
}

// Give each lane what the lane `from(lane, argument)` has.
template <class T, class From>
T exchange(const char *name, u32 mask, T value, int argument, From from) {
    require_all(mask);
    struct Own {
        T value, found;
        int argument;
    } own{value, value, argument};
    machine::together(name, own, [&](Own **lanes) {
        for (int lane = 0; lane < machine::WARP; ++lane)
            lanes[lane]->found = lanes[from(lane, lanes[lane]->argument)]->value;
    });
    return own.found;
}

template <class T>
T __shfl_sync(u32 mask, T value, int lane) {
    return exchange("__shfl_sync", mask, value, lane, [](int, int wanted) { return wanted & (machine::WARP - 1); });
}

template <class T>
T __shfl_xor_sync(u32 mask, T value, int bits) {
    return exchange("__shfl_xor_sync", mask, value, bits, [](int lane, int bits) { return lane ^ bits; });
}

template <class T>
T __shfl_up_sync(u32 mask, T value, int step) {
    return exchange("__shfl_up_sync", mask, value, step,
                    [](int lane, int step) { return lane < step ? lane : lane - step; });
}

inline u32 __ballot_sync(u32 mask, bool value) {
    require_all(mask);
    u32 own = value;
    machine::together("__ballot_sync", own, [](u32 **lanes) {
        u32 found = 0;
        for (int lane = 0; lane < machine::WARP; ++lane) found |= *lanes[lane] << lane;
        for (int lane = 0; lane < machine::WARP; ++lane) *lanes[lane] = found;
    });
    return own;
}

inline bool __all_sync(u32 mask, bool value) { return __ballot_sync(mask, value) == ~0u; }

// Give all lanes what `join` makes of the lanes' values one after the other.
template <class Join>
int reduce(const char *name, u32 mask, int value, Join join) {
    require_all(mask);
    machine::together(name, value, [&](int **lanes) {
        int found = *lanes[0];
        for (int lane = 1; lane < machine::WARP; ++lane) found = join(found, *lanes[lane]);
        for (int lane = 0; lane < machine::WARP; ++lane) *lanes[lane] = found;
    });
    return value;
}

inline int __reduce_add_sync(u32 mask, int value) {
    return reduce("__reduce_add_sync", mask, value, [](int x, int y) { return x + y; });
}

inline int __reduce_max_sync(u32 mask, int value) {
    return reduce("__reduce_max_sync", mask, value, [](int x, int y) { return x > y ? x : y; });
}
