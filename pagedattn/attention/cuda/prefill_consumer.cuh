// A consumer: a warpgroup of 64 rows, which multiplies and keeps the softmax.
#pragma once
#include "prefill_products.cuh"
#include "prefill_query.cuh"

DEVICE u32 pack_weights_of(float low, float high) {
    return HALF_PRODUCTS ? pack_f16(low, high) : pack_bf16(low, high);
}

struct Consumer : Rows {
    const Shared &shared;
    Place key, value;
    float scores[SCORES];
    float outputs[OUTPUTS];
    u32 weights[SCORES / (FP8_PRODUCTS ? 4 : 2)];
    float peak[2];   // of each row: the largest score, before or after scaling as `scale` says
    float total[2];  // this thread's part of the sum of weights
    float slope[2];  // ALiBi, of scores before scaling, or after it if SCALED_EARLY
    bool by_turns;   // whether other warpgroups have rows of the item too
    int next_group;  // whose turn comes after this one's

    // Weights are times 2 to this: of e4m3, whose numbers go up to 448, less are so small that they vanish.
    static constexpr float WEIGHT_BITS = FP8_PRODUCTS ? 8.0f : 0.0f;

    // Whether scores are brought to their units before the softmax looks for the largest of them. Else a cap
    // is left to where weights are made, and ALiBi's slopes are divided by the scale.
    static constexpr bool SCALED_EARLY = (SOFT_CAP && ALIBI) || (FP8 && (SOFT_CAP || ALIBI));
    static constexpr bool CAPPED_LATE = SOFT_CAP && !ALIBI;
    // Whether warpgroups multiply in an order, which is to bring the softmax of one beside the products of
    // another.
    static constexpr bool TURNS = HEAD_SIZE <= 80 || (HEAD_SIZE <= 192 && ALIBI);

    DEVICE float full_scale(int row) const { return FP8 ? row_scale[row] : p.scale_log2; }
    DEVICE float scale(int row) const { return SCALED_EARLY || CAPPED_LATE ? 1.0f : full_scale(row); }

    DEVICE void start_item(const Item &item) {
#pragma unroll
        for (int i = 0; i < OUTPUTS; ++i) outputs[i] = 0.0f;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            peak[i] = MINUS_INFINITY;
            total[i] = 0.0f;
            int row = warp_row + lane / 4 + 8 * i;
            slope[i] = ALIBI && item.has_row(row) ? p.alibi_slopes[item.query_head(row)] * LOG2_E /
                                                        (SCALED_EARLY ? 1.0f : p.scale_log2)
                                                  : 0.0f;
        }
        int group = warp_row / 64, groups = min(WARPGROUPS, (item.num_tokens * TILE_HEADS + 63) / 64);
        by_turns = TURNS && groups > 1;
        next_group = group + 1 == groups ? 0 : group + 1;
    }

    // Let a stage be filled anew: this warp has read it.
    DEVICE void release(u32 empty) {
        if (lane == 0) barrier_arrive(empty);
    }

    DEVICE void issue_scores(u64 query) {
        u64 keys = descriptor(shared.key(key.stage), 16, OCTET_STRIDE);
        products_begin();
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            int half = step / 4, inside = step % 4 * 32;
            if (step < QUERY_STEPS)
                multiply_scores(scores, query_steps[step],
                                keys + (half * HALF_STRIDE + inside) / 16, step > 0);
            else
                multiply_scores(scores, query + (half * ROWS * 128 + inside) / 16,
                                keys + (half * HALF_STRIDE + inside) / 16, step > 0);
        }
        products_end();
    }

    DEVICE void issue_outputs() {
        // a step is 16 tokens, or 32 that a row has side by side; 64 columns are a piece or 64 rows
        constexpr int STEP = FP8_PRODUCTS ? 32 : 2 * OCTET_STRIDE, HALF = FP8_PRODUCTS ? 8 * PIECE : HALF_STRIDE;
        u64 values = FP8_PRODUCTS ? descriptor(shared.value(value.stage), 16, PIECE)
                                  : descriptor(shared.value(value.stage), HALF_STRIDE, OCTET_STRIDE);
        products_begin();
#pragma unroll
        for (int step = 0; step < KV_TILE / (FP8_PRODUCTS ? 32 : 16); ++step) {
            u64 rows = values + step * STEP / 16;
#pragma unroll
            for (int half = 0; half < HALVES;) {
                if (HALVES % 2 == 0) {
                    multiply_values_128(outputs + half * 32, weights + 4 * step, rows + half * HALF / 16);
                    half += 2;
                } else {
                    multiply_values_64(outputs + half * 32, weights + 4 * step, rows + half * HALF / 16);
                    half += 1;
                }
            }
        }
        products_end();
    }

    // cap tanh(x) = cap - 2 cap / (exp(2 x) + 1)
    DEVICE float capped(float score) const {
        if (!SCALED_EARLY) score *= p.scale_log2;
        return p.cap_log2 - __fdividef(2.0f * p.cap_log2, exp2_of(score) + 1.0f);
    }

    // Scores to weights; earlier sums must be multiplied by `decay`. `own` is each row's own key,
    // counted from this thread's first column.
    template <bool MASKED>
    DEVICE void softmax(const int (&own)[2], float (&decay)[2]) {
        // ALiBi of this thread's first column in each row, which is added to the largest score alone
        float of_first[2] = {ALIBI ? -slope[0] * own[0] : 0.0f, ALIBI ? -slope[1] * own[1] : 0.0f};
        if (SCALED_EARLY || ALIBI) {
#pragma unroll
            for (int i = 0; i < SCORES; ++i) {
                int column = i / 4 * 8 + i % 2, row = i % 4 / 2;
                if (SCALED_EARLY) scores[i] *= full_scale(row);
                if (SOFT_CAP && ALIBI) scores[i] = capped(scores[i]);
                if (ALIBI) scores[i] += slope[row] * column;
            }
        }
        if (MASKED) {
#pragma unroll
            for (int i = 0; i < SCORES; ++i) {
                int column = i / 4 * 8 + i % 2, row = i % 4 / 2;
                bool hidden = column > own[row] || (WINDOW && column <= own[row] - p.window);
                if (hidden) scores[i] = MINUS_INFINITY;
            }
        }
        float shift[2];
        bool by_few = true, by_all = true;  // terms, see soft_cap.py
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float even = scores[2 * row], odd = scores[2 * row + 1];
#pragma unroll
            for (int i = 4; i < SCORES; i += 4) {
                even = fmaxf(even, scores[i + 2 * row]);
                odd = fmaxf(odd, scores[i + 2 * row + 1]);
            }
            float highest = fmaxf(even, odd);
            if (ALIBI) highest += of_first[row];
            highest = fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, 2));
            if (CAPPED_LATE) {  // a cap keeps the order
                by_few = by_few && highest <= p.few_terms.largest;
                by_all = by_all && highest <= p.all_terms.largest;
                if (!MASKED || highest > MINUS_INFINITY) highest = capped(highest);
            }
            highest = fmaxf(highest, peak[row]);
            if (CAPPED_LATE) {
                by_few = by_few && highest >= p.few_terms.least_peak;
                by_all = by_all && highest >= p.all_terms.least_peak;
            }
            // -inf - -inf is NaN: a row without keys so far is shifted by 0 instead
            shift[row] = MASKED && highest == MINUS_INFINITY ? 0.0f : highest * scale(row);
            decay[row] = exp2_of(peak[row] * scale(row) - shift[row]);
            if (ALIBI) shift[row] -= of_first[row] * scale(row);
            shift[row] -= WEIGHT_BITS;
            peak[row] = highest;
        }
        if (!CAPPED_LATE) {
            weigh(shift, decay, [&](float score, int row) { return score * scale(row); });
        } else if (__all_sync(0xffffffff, by_few)) {
            weigh(shift, decay, [&](float score, int) { return p.few_terms.of(score); });
        } else if (__all_sync(0xffffffff, by_all)) {
            weigh(shift, decay, [&](float score, int) { return p.all_terms.of(score); });
        } else {
            weigh(shift, decay, [&](float score, int) {
                return MASKED && score == MINUS_INFINITY ? score : capped(score);
            });
        }
    }

    // Make weights of scores, which `finished` brings to units of log2, and add them up.
    template <class Finished>
    DEVICE void weigh(const float (&shift)[2], const float (&decay)[2], Finished finished) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float even = 0.0f, odd = 0.0f;
#pragma unroll
            for (int i = 2 * row; i < SCORES; i += 4) {
                scores[i] = exp2_of(finished(scores[i], row) - shift[row]);
                scores[i + 1] = exp2_of(finished(scores[i + 1], row) - shift[row]);
                even += scores[i];
                odd += scores[i + 1];
            }
            total[row] = total[row] * decay[row] + (even + odd);
        }
    }

    DEVICE void pack_weights() {
#if FP8_PRODUCTS
        // of a step of 32 tokens: the first 16 of the row and of the one 8 below, then the others
#pragma unroll
        for (int i = 0; i < SCORES / 4; ++i) {
            const float *s = scores + i / 4 * 16 + i / 2 % 2 * 8 + i % 2 * 2;
            weights[i] = pack_e4m3(s[0], s[1], s[4], s[5]);
        }
#else
#pragma unroll
        for (int i = 0; i < SCORES / 2; ++i)
            weights[i] = pack_weights_of(scores[2 * i], scores[2 * i + 1]);
#endif
    }

    // The item's first scores and weights.
    DEVICE void first(u64 query, const int (&own)[2]) {
        float decay[2];
        barrier_wait(shared.key_full(key.stage), key.parity);
        mark(Moment::FIRST_THERE);
        pin(scores);
        issue_scores(query);
        wait_for_products<0>();
        pin(scores);
        release(shared.key_empty(key.stage));
        key.next<STAGES>();
        softmax<true>(own, decay);
        pack_weights();
    }

    // The next tile's scores beside the last tile's outputs, then the next tile's weights.
    template <bool MASKED>
    DEVICE void next(u64 query, const int (&own)[2]) {
        float decay[2];
        barrier_wait(shared.key_full(key.stage), key.parity);
        pin(scores);
        pin(outputs);
        if (by_turns) named_barrier(FIRST_TURN + warp_row / 64, 2 * 128);
        issue_scores(query);
        barrier_wait(shared.value_full(value.stage), value.parity);
        issue_outputs();
        if (by_turns) named_barrier_arrive(FIRST_TURN + next_group, 2 * 128);
        wait_for_products<1>();
        pin(scores);
        release(shared.key_empty(key.stage));
        key.next<STAGES>();
        softmax<MASKED>(own, decay);
        wait_for_products<0>();
        pin(outputs);
        release(shared.value_empty(value.stage));
        value.next<STAGES>();
        pack_weights();
#pragma unroll
        for (int i = 0; i < OUTPUTS; ++i) outputs[i] *= decay[i % 4 / 2];
    }

    // The last tile's outputs.
    DEVICE void last() {
        barrier_wait(shared.value_full(value.stage), value.parity);
        mark(Moment::LAST_THERE);
        pin(outputs);
        issue_outputs();
        wait_for_products<0>();
        pin(outputs);
        mark(Moment::LAST_FOLDED);
        release(shared.value_empty(value.stage));
        value.next<STAGES>();
    }

    // Read nothing of an item whose rows are all the other warpgroup's. No product keeps the warp
    // together: a lane that came only when the next phase has ended too would wait for ever.
    DEVICE void pass(const Item &item) {
        for (int tile = item.tile_begin; tile < item.tile_end; ++tile) {
            barrier_wait(shared.key_full(key.stage), key.parity);
            __syncwarp();
            release(shared.key_empty(key.stage));
            key.next<STAGES>();
            barrier_wait(shared.value_full(value.stage), value.parity);
            __syncwarp();
            release(shared.value_empty(value.stage));
            value.next<STAGES>();
        }
    }

    DEVICE void attend(const Item &item, u64 query) {
        int row = warp_row + lane / 4;
        // each row's own key, counted from this thread's first column of tile 0
        int position[2] = {item.first_position + (CAUSAL ? row / TILE_HEADS : 0) - lane % 4 * 2,
                           item.first_position + (CAUSAL ? (row + 8) / TILE_HEADS : 0) - lane % 4 * 2};
        int own[2];
        auto go_to = [&](int tile) {
            own[0] = position[0] - tile * KV_TILE;
            own[1] = position[1] - tile * KV_TILE;
        };
        int tile = item.tile_end - 1;
        go_to(tile);
        first(query, own);
        int whole = max(item.first_position + 1, 0) / KV_TILE;  // tiles before it need no mask
        for (--tile; tile >= max(whole, item.tile_begin); --tile) {
            go_to(tile);
            next<true>(query, own);
        }
        int stop = item.tile_begin;
        if (WINDOW)  // the last row's window begins in the tile before `stop`
            stop = max(max(item.first_position + TILE_TOKENS - p.window + KV_TILE - 1, 0) / KV_TILE,
                       stop);
        for (; tile >= stop; --tile) {
            if (ALIBI) go_to(tile);
            next<false>(query, own);
        }
        if (WINDOW) {
            for (; tile >= item.tile_begin; --tile) {
                go_to(tile);
                next<true>(query, own);
            }
        }
        last();
    }

    // Divide by the sums of weights, to which a sink adds once all shares are merged; write the log-sum-exp.
    DEVICE void finish(const Item &item) {
        float value_scale = FP8 && p.value_scale ? __ldg(p.value_scale + item.kv_head()) : 1.0f;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float sum = total[i];
            sum += __shfl_xor_sync(0xffffffff, sum, 1);
            sum += __shfl_xor_sync(0xffffffff, sum, 2);
            int row = warp_row + lane / 4 + 8 * i;
            int token = row / TILE_HEADS, head = item.query_head(row);
            bool has_query = item.has_row(row);
            float highest = peak[i] * scale(i) - WEIGHT_BITS, factor = 1.0f;  // of what `sum` is of
            if (SINKS && has_query && item.shares == 1) {
                float sink = p.sinks[head] * LOG2_E;
                float top = fmaxf(highest, sink);
                factor = exp2_of(highest - top);
                sum = sum * factor + exp2_of(sink - top);
                highest = top;
            }
            float inverse = sum > 0.0f ? factor / sum : 0.0f;
            if (FP8) inverse *= value_scale;
#pragma unroll
            for (int j = 2 * i; j < OUTPUTS; j += 4) {
                outputs[j] *= inverse;
                outputs[j + 1] *= inverse;
            }
            if ((LSE || SPLIT) && lane % 4 == 0 && has_query) {
                float lse = sum > 0.0f ? (highest + log2_of(sum)) * LN_2 : MINUS_INFINITY;
                if (item.shares > 1)
                    p.share_lse[place_of_share(item, token, head)] = lse;
                else if (LSE)
                    p.lse[(i64)(item.first_token + token) * (p.num_kv_heads * GROUP) + head] = lse;
            }
        }
    }
};
