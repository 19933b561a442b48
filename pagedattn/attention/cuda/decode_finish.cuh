// A row's end: what the warps have is added up, and what the programs have of a row that is cut.
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

DEVICE void store_out(const Parameters &p, i64 token, int head, int at, const float (&x)[4]) {
    Out *to = p.out + token * p.out_token_stride + head * p.out_head_stride + at;
#if OUT_F32
    *(float4 *)to = make_float4(x[0], x[1], x[2], x[3]);
#else
    u32 low = BF16 ? pack_bf16(x[0], x[1]) : pack_f16(x[0], x[1]);
    u32 high = BF16 ? pack_bf16(x[2], x[3]) : pack_f16(x[2], x[3]);
    ((u32 *)to)[0] = low;
    ((u32 *)to)[1] = high;
#endif
}

// What several parts have of four elements of a column.
struct Sum {
    float peak, total, of[4];
};

struct Finish {
    const Parameters &p;
    Shared &shared;
    const Batch &batch;
    int program, thread;

    static constexpr int THREADS = WARPS * 32;
    static constexpr int PER_COLUMN = HEAD_SIZE / 4;

    // Call `work` with each column and place in it that are this thread's.
    template <class Work>
    DEVICE void for_each(int columns, Work work) {
        for (int item = thread; item < columns * PER_COLUMN; item += THREADS)
            work(item / PER_COLUMN, item % PER_COLUMN * 4);
    }

    DEVICE void write_part(int part, int column, int at, const Sum &sum) {
        i64 place = (i64)part * COLUMNS + column;
        *(float4 *)(p.part + place * HEAD_SIZE + at) =
            make_float4(sum.of[0], sum.of[1], sum.of[2], sum.of[3]);
        // every warp has its own place for it: who reads a column's elements wrote them before
        p.part_weight[place * WARPS + thread / 32] = make_float2(sum.peak, sum.total);
    }

    DEVICE void write_result(const Segment &segment, int first_query, int column, int at, Sum sum) {
        int head = segment.head * GROUP + column % GROUP;
        i64 token = first_query + column / GROUP;
        float factor = add_sink(p, head, sum.peak, sum.total);
        factor = sum.total > 0 ? factor / sum.total : 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) sum.of[i] *= factor;
        store_out(p, token, head, at, sum.of);
#if LSE
        if (at == 0) p.lse[token * p.num_query_heads + head] = lse_of(sum.peak, sum.total);
#endif
    }

    // Whether this warp is the last of `count` programs' to come to a place; then it sees what they
    // wrote before. Leaves a zero.
    DEVICE bool is_last(int place, int count) {
        int *counter = p.arrived + place * WARPS + thread / 32, last = 0;
        __syncwarp();
        if (thread % 32 == 0) {
            last = add_in_order(counter, 1) == count - 1;
            if (last) *counter = 0;
        }
        return __shfl_sync(~0u, last, 0);
    }

    // Add up `count` parts of a row, every `step`-th range's from range `from` on, which lie
    // `offset` places from their own; `first` is where the row begins. No load is behind a branch, so
    // that all are on their way at once: where there are fewer, the last is loaded again.
    DEVICE Sum add_parts(int offset, int from, int step, int count, int first, int column, int at) {
        float2 weight[FAN_IN];
        float4 x[FAN_IN];
        int first_place = (offset + part_of(from, first)) * COLUMNS + column;
        int next_place = (offset + part_of(from + step, first)) * COLUMNS + column;
        int stride = 2 * step * p.parallel_heads * COLUMNS;
#pragma unroll
        for (int i = 0; i < FAN_IN; ++i) {
            // they lie evenly, but for the row's first
            int j = min(i, count - 1), place = j == 0 ? first_place : next_place + (j - 1) * stride;
            weight[i] = __ldcg(p.part_weight + place * WARPS + thread / 32);
            x[i] = __ldcg((const float4 *)(p.part + place * HEAD_SIZE + at));
        }
#pragma unroll
        for (int i = 1; i < FAN_IN; ++i)
            if (i >= count) weight[i] = make_float2(MINUS_INFINITY, 0);
        Sum sum = {MINUS_INFINITY, 0, {}};
#pragma unroll
        for (int i = 0; i < FAN_IN; ++i) sum.peak = fmaxf(sum.peak, weight[i].x);
        float shift = sum.peak == MINUS_INFINITY ? 0 : sum.peak;
#pragma unroll
        for (int i = 0; i < FAN_IN; ++i) {
            float gain = exp2_of(weight[i].x - shift);
            sum.total += weight[i].y * gain;
            sum.of[0] += x[i].x * gain;
            sum.of[1] += x[i].y * gain;
            sum.of[2] += x[i].z * gain;
            sum.of[3] += x[i].w * gain;
        }
        return sum;
    }

    // Place of what a range has of a row that begins in range `first`: a program has two, one for a
    // row that began before and one for a row that goes on.
    DEVICE int part_of(int range, int first) const {
        int neighbour = (range - batch.range_of_program(program)) * p.parallel_heads;
        return 2 * (program + neighbour) + (range == first);
    }

    // Merge the parts of a row that is cut, in order; who comes last does it (the stream-K fix-up,
    // Osama et al. 2023, §4), each warp for its own elements. Many are merged by bundles first.
    DEVICE void merge(const Segment &segment, int first_query, int columns) {
        int range = batch.range_of_program(program);
        int first = batch.range_of(segment.row_begin), last = batch.range_of(segment.row_end() - 1);
        int bundles = (last - first) / FAN_IN + 1;
        int from = first + (range - first) / FAN_IN * FAN_IN, count = min(FAN_IN, last + 1 - from);
        int offset = 0, step = 1;
        if (!is_last(part_of(from, first), count)) return;
        mark(Moment::LAST_TO_COME);
        if (bundles > 1) {
            offset = 2 * p.num_programs;
            for_each(columns, [&](int column, int at) {
                write_part(offset + part_of(from, first), column, at,
                           add_parts(0, from, 1, count, first, column, at));
            });
            if (!is_last(offset + part_of(first, first), bundles)) return;
            from = first;
            step = FAN_IN;
            count = bundles;
        }
        for_each(columns, [&](int column, int at) {
            write_result(segment, first_query, column, at,
                         add_parts(offset, from, step, count, first, column, at));
        });
        mark(Moment::MERGED);
    }

    // Add up what the warps have of a segment, and write it: the result, or a part of it.
    DEVICE void run(Row &row, const Segment &segment, int parity) {
        int warp = thread / 32, lane = thread % 32;
#pragma unroll
        for (int tile = 0; tile < COLUMN_TILES; ++tile)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float total = row.total[tile][i];
#pragma unroll
                for (int step = 4; step < 32; step *= 2) total += __shfl_xor_sync(~0u, total, step);
                if (lane < 4) {
                    int column = tile * 8 + lane * 2 + i;
                    shared.peaks[parity][warp][column] = row.peak[tile][i];
                    shared.totals[parity][warp][column] = total;
                }
            }
        bool whole = segment.begin == segment.row_begin && segment.end == segment.row_end();
        int part = 2 * program + (segment.begin == segment.row_begin);
        int columns = row.queries * GROUP;
#pragma unroll
        for (int tile = 0; tile < COLUMN_TILES; ++tile) {
            named_barrier(1, THREADS);
            if (tile * 8 < columns) share(row, parity, tile, warp, lane);
            named_barrier(1, THREADS);
            // the thread's elements, as `for_each` has them
            int begin = tile * 8 * PER_COLUMN, end = min(columns, tile * 8 + 8) * PER_COLUMN;
            mark(Moment::SUMS_THERE);
            for (int item = begin + (thread - begin % THREADS + THREADS) % THREADS; item < end;
                 item += THREADS) {
                int column = item / PER_COLUMN, at = item % PER_COLUMN * 4;
                Sum sum = add_warps(parity, column, at);
                if (whole)
                    write_result(segment, row.first_query, column, at, sum);
                else
                    write_part(part, column, at, sum);
            }
        }
        mark(Moment::WRITTEN);
        if (!whole) merge(segment, row.first_query, columns);
    }

    // Put a warp's sums of eight columns, in units of the highest peak, into shared memory.
    DEVICE void share(Row &row, int parity, int tile, int warp, int lane) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int in_tile = lane % 4 * 2 + i;
            float highest = MINUS_INFINITY;
#pragma unroll
            for (int w = 0; w < WARPS; ++w)
                highest = fmaxf(highest, shared.peaks[parity][w][tile * 8 + in_tile]);
            float own = row.peak[tile][i];
            float factor = own == MINUS_INFINITY ? 0 : exp2_of(own - highest) * row.value_scale;
            float *to = shared.sums[warp][in_tile];
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS_OF_16; ++chunk)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    int at = chunk * 16 + (FP8 ? lane / 4 * 2 + half : lane / 4 + half * 8);
                    to[at] = row.sum[chunk][tile][half * 2 + i] * factor;
                }
        }
    }

    DEVICE Sum add_warps(int parity, int column, int at) {
        Sum sum = {MINUS_INFINITY, 0, {}};
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum.peak = fmaxf(sum.peak, shared.peaks[parity][w][column]);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            float own = shared.peaks[parity][w][column];
            if (own != MINUS_INFINITY) sum.total += shared.totals[parity][w][column] * exp2_of(own - sum.peak);
            float4 x = *(const float4 *)&shared.sums[w][column % 8][at];
            sum.of[0] += x.x, sum.of[1] += x.y, sum.of[2] += x.z, sum.of[3] += x.w;
        }
        return sum;
    }
};
