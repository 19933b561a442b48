// The wideners: a warpgroup that turns tiles of e4m3, as the TMA brings them, into float16, which holds
// e4m3 exactly, where the products read them. A tile's rows lie one after the other in the one place
// and in swizzled pieces in the other. 8 bytes become a chunk of 16: neither reads nor writes, of which
// 8 lanes have one row's, meet in a bank, but for heads of 80 and 96 some writes by twos.
#pragma once
#include "prefill_work.cuh"

constexpr int WIDENERS = 32 * PREPARER_WARPS;
constexpr int CHUNKS = HEAD_SIZE / 8;                   // of a row
constexpr int OWN_CHUNKS = KV_TILE * CHUNKS / WIDENERS;  // a thread's: every WIDENERS-th
// After so many of them a thread is in the same place among the chunks of 8 rows.
constexpr int PERIOD = CHUNKS % 5 == 0 ? 5 : CHUNKS % 3 == 0 ? 3 : CHUNKS == 32 ? 2 : 1;
constexpr int PERIOD_OCTETS = WIDENERS * PERIOD / (8 * CHUNKS);
static_assert(PERIOD_OCTETS * 8 * CHUNKS == WIDENERS * PERIOD, "whole octets of rows");
static_assert(OWN_CHUNKS * WIDENERS == KV_TILE * CHUNKS && OWN_CHUNKS % PERIOD == 0, "equal parts");

// Where a chunk of a tile lies, numbered through row by row.
DEVICE u32 place_of_chunk(int number) {
    int row = number / CHUNKS, chunk = number % CHUNKS;
    return row / 8 * OCTET_STRIDE + chunk / 8 * HALF_STRIDE + row % 8 * 128 +
           ((chunk % 8) ^ (row % 8)) * 16;
}

struct Preparer {
    const Shared &shared;
    int thread;
    u32 places[PERIOD];  // of the first chunks

    DEVICE Preparer(const Shared &shared, int thread) : shared(shared), thread(thread) {
#pragma unroll
        for (int i = 0; i < PERIOD; ++i) places[i] = place_of_chunk(thread + i * WIDENERS);
    }

    DEVICE void prepare_key(u32 count) { widen<false>(count); }

    template <bool MASKED>
    DEVICE void prepare_value(u32 count, int begin, int end) {
        widen<true, MASKED>(count, begin, end);
    }

    // Widen K or V of tile number `count`, over all items. Of V, rows before `begin` and from `end` on
    // become zeros: a weight of 0 times a NaN would be NaN.
    template <bool OF_VALUES, bool MASKED = false>
    DEVICE void widen(u32 count, int begin = 0, int end = KV_TILE) {
        u32 stored[OWN_CHUNKS][2];
        int from = count % STORED_STAGES, to = count % STAGES;
        barrier_wait(shared.stored_full(OF_VALUES, from), count / STORED_STAGES % 2);
        u32 source = shared.stored(OF_VALUES, from) + thread * 8;
#pragma unroll
        for (int i = 0; i < OWN_CHUNKS; ++i) load_shared(stored[i], source + i * WIDENERS * 8);
        __syncwarp();
        if (thread % 32 == 0) barrier_arrive(shared.stored_empty(OF_VALUES, from));
        barrier_wait(OF_VALUES ? shared.value_empty(to) : shared.key_empty(to), count / STAGES % 2 ^ 1);
        u32 target = OF_VALUES ? shared.value(to) : shared.key(to);
        int own = thread;
        forget(own);  // else rows, which few tiles need, would be kept in registers
#pragma unroll
        for (int i = 0; i < OWN_CHUNKS; ++i) {
            u32 low = stored[i][0], high = stored[i][1];
            u32 wide[4] = {f16_of_e4m3(low), f16_of_upper_e4m3(low), f16_of_e4m3(high), f16_of_upper_e4m3(high)};
            if (MASKED) {
                int row = (own + i * WIDENERS) / CHUNKS;
                if (row < begin || row >= end) wide[0] = wide[1] = wide[2] = wide[3] = 0;
            }
            store_shared(target + places[i % PERIOD] + i / PERIOD * PERIOD_OCTETS * OCTET_STRIDE, wide);
        }
        fence_for_tma();
        __syncwarp();
        if (thread % 32 == 0)
            barrier_arrive(OF_VALUES ? shared.value_full(to) : shared.key_full(to));
    }
};
