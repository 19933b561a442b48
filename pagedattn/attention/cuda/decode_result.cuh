// What parts of a row are added up to, and how it is written.
#pragma once
#include "decode_row.cuh"

// Put a column's sink into its softmax: change `peak` and `total`, return the factor of its sums.
DEVICE float add_sink(const Parameters &p, int head, float &peak, float &total) {
#if SINKS
    float sink = p.sinks[head] * LOG2_E, highest = fmaxf(peak, sink);
    float shift = highest == MINUS_INFINITY ? 0 : highest;  // neither keys nor a sink
    float factor = exp2_of(peak - shift);
    total = total * factor + exp2_of(sink - shift);
    peak = highest;
    return factor;
#else
    return 1;
#endif
}

DEVICE float lse_of(float peak, float total) {
    return total > 0 ? (peak + log2_of(total)) * LN_2 : MINUS_INFINITY;
}

template <int COUNT>
DEVICE void store_out(const Parameters &p, i64 token, int head, int at, const float (&x)[COUNT]) {
    Out *to = p.out + token * p.out_token_stride + head * p.out_head_stride + at;
#pragma unroll
    for (int i = 0; i < COUNT; i += 2)
#if OUT_F32
        ((float2 *)to)[i / 2] = make_float2(x[i], x[i + 1]);
#else
        ((u32 *)to)[i / 2] = BF16 ? pack_bf16(x[i], x[i + 1]) : pack_f16(x[i], x[i + 1]);
#endif
}

// What several parts have of some elements of a column.
template <int COUNT>
struct SumOf {
    float peak, total, of[COUNT];
};

using Sum = SumOf<4>;
