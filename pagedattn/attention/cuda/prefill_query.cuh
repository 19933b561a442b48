// A warp's rows of a tile of queries, and what is made of them over e4m3.
#pragma once
#include "prefill_work.cuh"

DEVICE float query_low(u32 pair) { return BF16 ? bf16_low(pair) : f16_low(pair); }
DEVICE float query_high(u32 pair) { return BF16 ? bf16_high(pair) : f16_high(pair); }

// Bytes of a swizzled row's 16-byte chunk, in a tile whose pieces of 64 columns lie apart.
DEVICE u32 chunk_of_row(int row, int chunk) {
    return chunk / 8 * (ROWS * 128) + row * 128 + ((chunk % 8) ^ (row % 8)) * 16;
}

struct Rows {
    const Parameters &p;
    int lane;
    int warp_row;  // first of the warp's 16 rows of the tile
    float row_scale[2];  // over e4m3: what `scale_log2`, the keys' scale and the query's unit make
    u32 query_steps[QUERY_STEPS > 0 ? QUERY_STEPS : 1][4];

    // Where a share's result for a query and head lies among those of all shares.
    DEVICE i64 place_of_share(const Item &item, int token, int head) const {
        i64 row = (i64)item.split * p.num_tokens + item.first_token + token;
        return row * (p.num_kv_heads * GROUP) + head;
    }

    // Over e4m3: make float16 of queries in bfloat16, or e4m3 of all, in place, each divided by a power of
    // two so that it fits, and take those that are kept in registers. Two lanes have a row. `group` is the
    // warpgroup.
    DEVICE void prepare(const Item &item, u32 tile, int group) {
        row_scale[0] = row_scale[1] =
            p.key_scale ? p.scale_log2 * __ldg(p.key_scale + item.kv_head()) : p.scale_log2;
        if (BF16 || FP8_PRODUCTS) {
            constexpr int OWN = HEAD_SIZE / 16;  // every other chunk
            constexpr int MORE = FP8_PRODUCTS ? 7 : 0;  // of a row of e4m3 the largest is from 128 to 256
            int row = warp_row + lane / 2;
            float largest = 0.0f;
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                u32 pairs[4];
                load_shared(pairs, tile + chunk_of_row(row, 2 * i + lane % 2));
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    largest = fmaxf(largest, fmaxf(fabsf(query_low(pairs[j])), fabsf(query_high(pairs[j]))));
            }
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 1));
            // The power of two at or below the largest, kept where its inverse is a number, and scores
            // times it none too small for a float32: those of a row of zeros are zeros.
            u32 exponent = min(max(__float_as_uint(largest) >> 23, 64u), 252u);
            float inverse = __uint_as_float((254 + MORE - exponent) << 23);
            float unit = __uint_as_float((exponent - MORE) << 23);
            if (FP8_PRODUCTS) {
                round_row(tile, row, inverse);
            } else {
#pragma unroll
                for (int i = 0; i < OWN; ++i) {
                    u32 pairs[4], at = tile + chunk_of_row(row, 2 * i + lane % 2);
                    load_shared(pairs, at);
#pragma unroll
                    for (int j = 0; j < 4; ++j)
                        pairs[j] = pack_f16(bf16_low(pairs[j]) * inverse, bf16_high(pairs[j]) * inverse);
                    store_shared(at, pairs);
                }
            }
#pragma unroll
            for (int i = 0; i < 2; ++i)
                row_scale[i] *= __shfl_sync(0xffffffff, unit, lane / 4 * 2 + 16 * i);
            fence_for_tma();  // products read it, and then the TMA writes over it
            if (QUERY_STEPS < STEPS)
                named_barrier(1 + group, 128);
            else
                __syncwarp();
        }
#pragma unroll
        for (int step = 0; step < QUERY_STEPS; ++step)
            load_matrices(query_steps[step],
                          tile + chunk_of_row(warp_row + lane % 16, 2 * step + lane / 16));
    }

    // Write a row times `inverse` as e4m3 over itself, zeros behind its end. A lane has every other 16
    // bytes of what comes out, and writes when the other one has read too.
    DEVICE void round_row(u32 tile, int row, float inverse) {
        u32 rounded[STEPS][4] = {};
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            int chunk = 2 * step + lane % 2;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if ((2 * chunk + half) * 8 >= HEAD_SIZE) break;
                u32 pairs[4];
                load_shared(pairs, tile + chunk_of_row(row, 2 * chunk + half));
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    rounded[step][2 * half + i] =
                        pack_e4m3(query_low(pairs[2 * i]) * inverse, query_high(pairs[2 * i]) * inverse,
                                  query_low(pairs[2 * i + 1]) * inverse, query_high(pairs[2 * i + 1]) * inverse);
            }
        }
        __syncwarp();
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
            store_shared(tile + chunk_of_row(row, 2 * step + lane % 2), rounded[step]);
    }
};
