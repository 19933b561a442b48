// The transposers: a warpgroup that turns tiles of V of e4m3 around. A product of e4m3 sums over what lies
// together in both factors, so V has to come as [columns of the head, tokens]. Of 32 tokens a row has those
// that a lane's weights are of side by side, in the order in which it has them: token 2 l + {0, 1} of
// the first 8, of the second, third and fourth 8 are bytes 4 l + {0, 1}, 4 l + {2, 3}, and so on from 16 on.
//
// 8 x 8 pairs of bytes, 8 tokens by 16 columns, are turned around as 16-bit numbers by loading them;
// what is left is to part the bytes of a pair, which are a token's in two columns.
#pragma once
#include "prefill_work.cuh"

constexpr int COLUMN_CHUNKS = HALVES * 4;  // of 16 columns
constexpr int OWN_UNITS = KV_TILE / 32 * COLUMN_CHUNKS / PREPARER_WARPS;  // a warp's: 32 tokens by 16 columns
static_assert(OWN_UNITS * PREPARER_WARPS == KV_TILE / 32 * COLUMN_CHUNKS, "equal parts");

struct Preparer {
    const Shared &shared;
    int warp, lane;

    DEVICE Preparer(const Shared &shared, int thread) : shared(shared), warp(thread / 32), lane(thread % 32) {}

    DEVICE void prepare_key(u32) {}

    // Turn tile number `count` around, over all items. Tokens before `begin` and from `end` on become
    // zeros: a weight of 0 times a NaN would be NaN.
    template <bool MASKED>
    DEVICE void prepare_value(u32 count, int begin, int end) {
        int from = count % STORED_STAGES, to = count % STAGES;
        barrier_wait(shared.stored_full(true, from), count / STORED_STAGES % 2);
        barrier_wait(shared.value_empty(to), count / STAGES % 2 ^ 1);
#pragma unroll
        for (int i = 0; i < OWN_UNITS; ++i) {
            int unit = i * PREPARER_WARPS + warp, group = unit / COLUMN_CHUNKS, chunk = unit % COLUMN_CHUNKS;
            u32 pairs[4];  // of each 8 tokens
            load_matrices_transposed(pairs, shared.stored(true, from) + chunk / 8 * HALF_STRIDE +
                                                (group * 32 + lane) * 128 + ((chunk % 8) ^ (lane % 8)) * 16);
            if (MASKED) {
#pragma unroll
                for (int eight = 0; eight < 4; ++eight) {
                    int token = group * 32 + eight * 8 + lane % 4 * 2;
                    if (token < begin || token >= end) pairs[eight] &= 0xffff0000u;
                    if (token + 1 < begin || token + 1 >= end) pairs[eight] &= 0xffffu;
                }
            }
            // matrices of 8 columns, even and odd ones, by 16 tokens; a lane has the address of a row
            int column = chunk * 16 + lane % 8 * 2 + lane / 16, tokens = group * 2 + lane / 8 % 2;
            store_matrices(shared.value(to) + column * 128 + (tokens ^ (column % 8)) * 16,
                           {select_bytes(pairs[0], pairs[1], 0x6420), select_bytes(pairs[2], pairs[3], 0x6420),
                            select_bytes(pairs[0], pairs[1], 0x7531), select_bytes(pairs[2], pairs[3], 0x7531)});
        }
        fence_for_tma();
        __syncwarp();
        if (lane == 0) {
            barrier_arrive(shared.stored_empty(true, from));
            barrier_arrive(shared.value_full(to));
        }
    }
};
