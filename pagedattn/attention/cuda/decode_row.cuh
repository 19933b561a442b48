// The consumers' arithmetic: each warp has every WARPS-th tile, and its own softmax until a row's end.
#pragma once
#include "decode_producer.cuh"

DEVICE u32 pack(float low, float high) {
    return HALF_PRODUCTS ? pack_f16(low, high) : pack_bf16(low, high);
}

DEVICE void multiply(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    if (HALF_PRODUCTS)
        multiply_f16(c, a, b);
    else
        multiply_bf16(c, a, b);
}

// Whether registers hold a row's queries beside the sums of the row before.
constexpr bool FETCHES_EARLY = CHUNKS_OF_16 * COLUMN_TILES < 32;

// A lane's part of a row's state. Scores are [tokens, columns], the result [head_size, columns];
// of both a lane has the columns 8 * tile + 2 * (lane % 4) + {0, 1}.
struct Row {
    u32 query[CHUNKS_OF_16][COLUMN_TILES][2];
    float sum[CHUNKS_OF_16][COLUMN_TILES][4];
    float peak[COLUMN_TILES][2], total[COLUMN_TILES][2];  // `total` of this lane's tokens alone
    float scale[COLUMN_TILES][2];
    int seen_end[COLUMN_TILES][2];  // tokens from here on are not seen
#if ALIBI
    float slope[COLUMN_TILES][2];
#endif
    // `least_end`: the least of all queries' `seen_end`
    int least_end, kv_length, lowest, first_query, queries;
    int next_first, next_queries;  // of the row that comes next, then of the one that is fetched
    float value_scale;

    // Find out where the next row's queries are.
    DEVICE void look_ahead(const Parameters &p, const Segment &segment) {
        next_first = p.query_starts[segment.sequence];
        next_queries = p.query_starts[segment.sequence + 1] - next_first;
    }

    // Have the next row's queries on their way, while this one's sums are still needed.
    DEVICE void fetch(const Parameters &p, const Segment &segment, int lane) {
#pragma unroll
        for (int tile = 0; tile < COLUMN_TILES; ++tile) {
            // as a factor the query has column lane / 4
            int column = tile * 8 + lane / 4;
            int step = column / GROUP;
            const u16 *row = p.query + (next_first + step) * p.query_token_stride +
                             (segment.head * GROUP + column % GROUP) * p.query_head_stride;
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS_OF_16; ++chunk) {
                // over e4m3 a lane has four elements that lie together, as it has of K
                int at = chunk * 16 + lane % 4 * (FP8 ? 4 : 2);
                bool real = step < next_queries;
                query[chunk][tile][0] = real ? *(const u32 *)(row + at) : 0;
                query[chunk][tile][1] = real ? *(const u32 *)(row + at + (FP8 ? 2 : 8)) : 0;
            }
        }
    }

    // Begin with the row whose queries were fetched.
    DEVICE void start(const Parameters &p, const Segment &segment, int lane) {
        kv_length = segment.tiles.kv_length;
        lowest = segment.tiles.lowest;
        first_query = next_first;
        queries = next_queries;
        value_scale = FP8 && p.value_scale ? p.value_scale[segment.head] : 1;
        least_end = CAUSAL ? kv_length - queries + 1 : kv_length;
        float scale_of_head = p.scale_log2;
        if (FP8 && p.key_scale) scale_of_head *= p.key_scale[segment.head];
#pragma unroll
        for (int tile = 0; tile < COLUMN_TILES; ++tile) {
            float unit = FP8 && BF16 ? halve_query(tile) : 1;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                int own = tile * 8 + lane % 4 * 2 + i;
                seen_end[tile][i] = least_end + (CAUSAL ? own / GROUP : 0);
                scale[tile][i] = scale_of_head;
                if (FP8 && BF16) scale[tile][i] *= __shfl_sync(~0u, unit, (lane % 4 * 2 + i) * 4);
                peak[tile][i] = MINUS_INFINITY;
                total[tile][i] = 0;
#if ALIBI
                int head = segment.head * GROUP + own % GROUP;
                slope[tile][i] = own < GROUP * queries ? p.alibi_slopes[head] * LOG2_E : 0;
#endif
            }
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS_OF_16; ++chunk)
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[chunk][tile][i] = 0;
        }
    }

    // Make a bfloat16 query float16: divided by a power of two, which is returned, so that it fits.
    DEVICE float halve_query(int tile) {
        float largest = 0;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS_OF_16; ++chunk)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                u32 pair = query[chunk][tile][i];
                largest = fmaxf(largest, fmaxf(fabsf(bf16_low(pair)), fabsf(bf16_high(pair))));
            }
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
        // the power of two at or below the largest, kept where its inverse is a number
        u32 exponent = min(max(__float_as_uint(largest) >> 23, 2u), 252u);
        float inverse = __uint_as_float((254 - exponent) << 23);
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS_OF_16; ++chunk)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                u32 pair = query[chunk][tile][i];
                query[chunk][tile][i] = pack_f16(bf16_low(pair) * inverse, bf16_high(pair) * inverse);
            }
        return __uint_as_float(exponent << 23);
    }

    template <bool MASKED>
    DEVICE void fold(const Parameters &p, u32 key, u32 value, int first_token, int lane) {
        float scores[TILE_ROWS][COLUMN_TILES][4] = {};
        multiply_key(scores, key, lane);
        u32 weights[TILE_ROWS][COLUMN_TILES][2];
#pragma unroll
        for (int tile = 0; tile < COLUMN_TILES; ++tile) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float highest = peak[tile][i];
#pragma unroll
                for (int row = 0; row < TILE_ROWS; ++row)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        int token = first_token + row * 16 + half * 8 + lane / 4;
                        float &score = scores[row][tile][half * 2 + i];
                        score = finished(p, score, token, tile, i);
                        if (MASKED && !seen(p, token, tile, i)) score = MINUS_INFINITY;
                        highest = fmaxf(highest, score);
                    }
#pragma unroll
                for (int step = 4; step < 32; step *= 2)
                    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, step));
                // -inf - -inf is NaN: a column without keys so far is shifted by 0 instead
                float shift = MASKED && highest == MINUS_INFINITY ? 0 : highest;
                float decay = exp2_of(peak[tile][i] - shift);
                peak[tile][i] = highest;
                float added = 0;
#pragma unroll
                for (int row = 0; row < TILE_ROWS; ++row)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        float &score = scores[row][tile][half * 2 + i];
                        score = exp2_of(score - shift);
                        added += score;
                    }
                total[tile][i] = total[tile][i] * decay + added;
#pragma unroll
                for (int chunk = 0; chunk < CHUNKS_OF_16; ++chunk) {
                    sum[chunk][tile][i] *= decay;
                    sum[chunk][tile][2 + i] *= decay;
                }
            }
#pragma unroll
            for (int row = 0; row < TILE_ROWS; ++row)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    weights[row][tile][half] = transpose_matrix(
                        pack(scores[row][tile][half * 2], scores[row][tile][half * 2 + 1]));
        }
        multiply_value<MASKED>(weights, value, first_token, lane);
    }

    DEVICE float finished(const Parameters &p, float score, int token, int tile, int i) const {
        score *= scale[tile][i];
#if SOFT_CAP
        // tanh(x) = 1 - 2 / (1 + e^2x), and `score` is 2x in units of log2
        score = p.cap_log2 * (1 - 2 / (1 + exp2_of(score)));
#endif
#if ALIBI
        score += slope[tile][i] * (token - (seen_end[tile][i] - 1));
#endif
        return score;
    }

    DEVICE bool seen(const Parameters &p, int token, int tile, int i) const {
        bool is = token < seen_end[tile][i];
#if WINDOW
        is = is && token >= seen_end[tile][i] - p.window;
#endif
        return is;
    }

    // A product waits for the one before that adds to the same scores: of few scores, two are added up at a time.
    DEVICE void multiply_key(float (&scores)[TILE_ROWS][COLUMN_TILES][4], u32 key, int lane) const {
        constexpr bool BY_TURNS = TILE_ROWS * COLUMN_TILES == 1;
        float others[4] = {};
#pragma unroll
        for (int byte = 0; byte < ROW_BYTES; byte += 32)
#pragma unroll
            for (int row = 0; row < TILE_ROWS; ++row) {
                u32 got[4];
                load_matrices(got, place_in_tile(key, row * 16 + lane % 16, byte + lane / 16 * 16));
                if (FP8) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        u32 upper = got[half * 2], lower = got[half * 2 + 1];
                        u32 factor[4] = {f16_of_e4m3(upper), f16_of_e4m3(lower),
                                         f16_of_e4m3(upper >> 16), f16_of_e4m3(lower >> 16)};
#pragma unroll
                        for (int tile = 0; tile < COLUMN_TILES; ++tile)
                            multiply(BY_TURNS && half ? others : scores[row][tile], factor, query[byte / 16 + half][tile]);
                    }
                } else {
#pragma unroll
                    for (int tile = 0; tile < COLUMN_TILES; ++tile)
                        multiply(BY_TURNS && byte / 32 % 2 ? others : scores[row][tile], got, query[byte / 32][tile]);
                }
            }
        if (BY_TURNS)
#pragma unroll
            for (int i = 0; i < 4; ++i) scores[0][0][i] += others[i];
    }

    template <bool MASKED>
    DEVICE void multiply_value(const u32 (&weights)[TILE_ROWS][COLUMN_TILES][2], u32 value,
                               int first_token, int lane) {
#pragma unroll
        for (int row = 0; row < TILE_ROWS; ++row) {
            // whatever lies in slots without a seen token, NaN too, must stay out of the sums
            u32 real[2] = {~0u, ~0u};
            if (MASKED) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    int token = first_token + row * 16 + half * 8 + lane % 4 * 2;
                    real[half] = (token >= lowest && token < kv_length ? 0xffffu : 0) |
                                 (token + 1 >= lowest && token + 1 < kv_length ? 0xffff0000u : 0);
                }
            }
#pragma unroll
            for (int byte = 0; byte < ROW_BYTES; byte += 32) {
                u32 got[4];
                if (FP8) {
                    // of 16 bytes a lane gets two that lie together, for two tokens
                    load_matrices_transposed(
                        got, place_in_tile(value, row * 16 + lane % 16, byte + lane / 16 * 16));
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        u32 factor[4];
#pragma unroll
                        for (int tokens = 0; tokens < 2; ++tokens) {
                            u32 first = f16_of_e4m3(got[half * 2 + tokens]);
                            u32 second = f16_of_e4m3(got[half * 2 + tokens] >> 16);
                            factor[tokens * 2] = select_bytes(first, second, 0x5410) & real[tokens];
                            factor[tokens * 2 + 1] = select_bytes(first, second, 0x7632) & real[tokens];
                        }
#pragma unroll
                        for (int tile = 0; tile < COLUMN_TILES; ++tile)
                            multiply(sum[byte / 16 + half][tile], factor, weights[row][tile]);
                    }
                } else {
                    load_matrices_transposed(got, place_in_tile(value, row * 16 + lane / 16 * 8 + lane % 8,
                                                                byte + lane / 8 % 2 * 16));
                    if (MASKED) {
                        got[0] &= real[0];
                        got[1] &= real[0];
                        got[2] &= real[1];
                        got[3] &= real[1];
                    }
#pragma unroll
                    for (int tile = 0; tile < COLUMN_TILES; ++tile)
                        multiply(sum[byte / 32][tile], got, weights[row][tile]);
                }
            }
        }
    }
};
