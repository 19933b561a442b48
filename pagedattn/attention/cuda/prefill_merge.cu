// What shares of keys gave, merged: see prefill_merge.py.
//
// Macros: HEAD_SIZE, KV_TILE, BF16 (an output of bfloat16, else of float16), OUT_F32 (of float32), and the switches
// SINKS and LSE.

#include "warps.cuh"
#include "prefill_shares.cuh"

struct Parameters {
    const float *share_out;  // [splits, num_tokens, num_heads, HEAD_SIZE]
    const float *share_lse;  // [splits, num_tokens, num_heads], natural
    void *out;
    float *lse;
    const int *kv_lengths;
    const int *query_starts;
    const float *sinks;
    i64 out_token_stride;
    i64 out_head_stride;
    int num_tokens;
    int num_heads;
    int num_sequences;
    int splits;
    int share_tiles;
    int most_keys;
    int short_queries;  // sequences of as many at most are left alone, if it is not 0
};

static_assert(MOST_SHARES == 2 * 32, "a lane has the weights of two");

constexpr int WARPS = 4;  // of a program
constexpr int CHUNKS = HEAD_SIZE / 4;              // of a row, 16 bytes each
constexpr int LANES = CHUNKS <= 16 ? 16 : 32;      // that have a share of a row; a warp reads `SIDES` at once
constexpr int SIDES = 32 / LANES;
constexpr int OWN = (CHUNKS + LANES - 1) / LANES;  // a lane's chunks
constexpr int BATCH = 8 / OWN;                     // a lane's shares that are on their way at once

DEVICE float largest_of(float x) {
#pragma unroll
    for (int bits = 16; bits; bits /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, bits));
    return x;
}

DEVICE float sum_of(float x) {
#pragma unroll
    for (int bits = 16; bits; bits /= 2) x += __shfl_xor_sync(0xffffffff, x, bits);
    return x;
}

// Count the query tokens of sequences whose keys were shared out: `ends[s]` are those of the sequences up to and with
// s. By a warp.
DEVICE void count_tokens(const Parameters &p, int *ends, int lane) {
    int before = 0;
#pragma unroll 4
    for (int base = 0; base < p.num_sequences; base += 32) {
        int sequence = base + lane, tokens = 0;
        if (sequence < p.num_sequences) {
            tokens = p.query_starts[sequence + 1] - p.query_starts[sequence];
            if (tokens <= p.short_queries || shares_of(p, p.kv_lengths[sequence]) == 1) tokens = 0;
        }
        int end = before + sum_up_to(tokens, lane);
        before = __shfl_sync(0xffffffff, end, 31);
        if (sequence < p.num_sequences) ends[sequence] = end;
    }
}

// The first sequence whose end is behind a token.
DEVICE int sequence_of(const int *ends, int num_sequences, int token) {
    int low = 0, high = num_sequences - 1;
    while (low < high) {
        int middle = (low + high) / 2;
        if (ends[middle] > token)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

struct Row {
    const Parameters &p;
    int shares;
    i64 place;  // of token and head
    int lane;

    float acc[OWN][4] = {};

    DEVICE i64 place_of(int share) const { return (i64)share * p.num_tokens * p.num_heads + place; }
    DEVICE int chunk(int i) const { return lane % LANES + i * LANES; }

    DEVICE void load(int first, float4 (&parts)[BATCH][OWN]) const {
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            int share = first + i * SIDES + lane / LANES;
#pragma unroll
            for (int j = 0; j < OWN; ++j) {
                parts[i][j] = make_float4(0, 0, 0, 0);
                if (share < shares && chunk(j) < CHUNKS)
                    parts[i][j] = *(const float4 *)(p.share_out + place_of(share) * HEAD_SIZE + chunk(j) * 4);
            }
        }
    }

    // By the whole warp: a lane has the weights of shares `lane` and `lane + 32`.
    DEVICE void add(int first, const float4 (&parts)[BATCH][OWN], const float (&weights)[2]) {
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            int share = first + i * SIDES + lane / LANES;
            float low = __shfl_sync(0xffffffff, weights[0], share % 32);
            float high = __shfl_sync(0xffffffff, weights[1], share % 32);
            float weight = share < 32 ? low : high;
#pragma unroll
            for (int j = 0; j < OWN; ++j) {
                acc[j][0] += weight * parts[i][j].x;
                acc[j][1] += weight * parts[i][j].y;
                acc[j][2] += weight * parts[i][j].z;
                acc[j][3] += weight * parts[i][j].w;
            }
        }
    }

    DEVICE void merge(i64 token, int head) {
        float4 parts[BATCH][OWN];
        load(0, parts);
        float weights[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int share = lane + 32 * i;
            weights[i] = share < shares ? p.share_lse[place_of(share)] * LOG2_E : MINUS_INFINITY;
        }
        float peak = largest_of(fmaxf(weights[0], weights[1])), sink = MINUS_INFINITY;
        if (SINKS) {
            sink = p.sinks[head] * LOG2_E;
            peak = fmaxf(peak, sink);
        }
        float shift = peak == MINUS_INFINITY ? 0.0f : peak;
        weights[0] = exp2_of(weights[0] - shift);
        weights[1] = exp2_of(weights[1] - shift);
        float total = sum_of(weights[0] + weights[1]);
        if (SINKS) total += exp2_of(sink - shift);
        for (int first = 0; first < shares; first += BATCH * SIDES) {
            if (first) load(first, parts);
            add(first, parts, weights);
        }
        float inverse = total > 0.0f ? 1.0f / total : 0.0f;
#pragma unroll
        for (int j = 0; j < OWN; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (SIDES == 2) acc[j][i] += __shfl_xor_sync(0xffffffff, acc[j][i], LANES);
                acc[j][i] *= inverse;
            }
        if (lane < LANES) write(token, head);
        if (LSE && lane == 0)
            p.lse[place] = total > 0.0f ? (shift + log2_of(total)) * LN_2 : MINUS_INFINITY;
    }

    DEVICE void write(i64 token, int head) const {
        i64 begin = token * p.out_token_stride + head * p.out_head_stride;
#pragma unroll
        for (int j = 0; j < OWN; ++j) {
            const float *x = acc[j];
            i64 at = begin + chunk(j) * 4;
            if (chunk(j) >= CHUNKS) break;
            if (OUT_F32) {
                *(float4 *)((float *)p.out + at) = make_float4(x[0], x[1], x[2], x[3]);
                continue;
            }
            u32 low = BF16 ? pack_bf16(x[0], x[1]) : pack_f16(x[0], x[1]);
            u32 high = BF16 ? pack_bf16(x[2], x[3]) : pack_f16(x[2], x[3]);
            *(u64 *)((u16 *)p.out + at) = (u64)high << 32 | low;
        }
    }
};

// `ends` are in shared memory, of which a program has 4 bytes a sequence.
extern "C" __global__ void __launch_bounds__(WARPS * 32) merge_kernel(const __grid_constant__ Parameters p) {
    DYNAMIC_SHARED(memory, 16);
    int *ends = (int *)memory;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    allow_the_next_launch();
    // The launch before has waited for what wrote lengths and starts.
    if (warp == 0) count_tokens(p, ends, lane);
    __syncthreads();
    wait_for_the_launch_before();
    int num_rows = ends[p.num_sequences - 1] * p.num_heads;
    for (int index = blockIdx.x * WARPS + warp; index < num_rows; index += gridDim.x * WARPS) {
        int rank = index / p.num_heads, head = index % p.num_heads;
        int sequence = sequence_of(ends, p.num_sequences, rank);
        i64 token = p.query_starts[sequence + 1] - (ends[sequence] - rank);
        Row row{p, shares_of(p, p.kv_lengths[sequence]), token * p.num_heads + head, lane};
        row.merge(token, head);
    }
}
