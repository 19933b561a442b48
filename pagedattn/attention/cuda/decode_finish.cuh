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

// A row that is cut, of which this program has a part; `count` is 0 where there is none.
struct Cut {
    int head, first_query, columns;
    int first, last;  // range in which the row begins, and in which it ends
    int from, count;  // of the bundle that this program's part is in: first range, and parts
};

struct Finish {
    const Parameters &p;
    Shared &shared;
    const Batch &batch;
    int program, thread;

    static constexpr int THREADS = WARPS * 32;
    static constexpr int PER_COLUMN = HEAD_SIZE / 4;

    DEVICE void write_part(int part, int column, int at, const Sum &sum) {
        i64 place = (i64)part * COLUMNS + column;
        *(float4 *)(p.part + place * HEAD_SIZE + at) =
            make_float4(sum.of[0], sum.of[1], sum.of[2], sum.of[3]);
        // every warp has its own place for it: who reads a column's elements wrote them before
        p.part_weight[place * WARPS + thread / 32] = make_float2(sum.peak, sum.total);
    }

    DEVICE void write_result(int kv_head, int first_query, int column, int at, Sum sum) {
        int head = kv_head * GROUP + column % GROUP;
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

    // Whether this lane's warp is the last of `count` programs' to come to a place; then the warp sees
    // what they wrote before. Leaves a zero. What the warp wrote has to be known to the lane.
    DEVICE bool is_last(int place, int count) {
        int *counter = p.arrived + place * WARPS + thread / 32;
        bool last = add_in_order(counter, 1) == count - 1;
        if (last) *counter = 0;
        return last;
    }

    // Add up `count` parts of a row, every `step`-th range's from range `from` on, which lie
    // `offset` places from their own; `first` is where the row begins. Call `work` with each column
    // and place in it that are this thread's, and the sum. Few parts are added up for two places at
    // a time, so that as many loads are on their way.
    template <class Work>
    DEVICE void add_parts(int columns, int offset, int from, int step, int count, int first, Work work) {
        if (COLUMNS * PER_COLUMN > THREADS && count <= FAN_IN / 2)
            add_parts_of<2>(columns, offset, from, step, count, first, work);
        else
            add_parts_of<1>(columns, offset, from, step, count, first, work);
    }

    // No load is behind a branch, so that all are on their way at once: where there are fewer parts,
    // the first is loaded again, and where there are fewer places, the thread's first.
    template <int PLACES, class Work>
    DEVICE void add_parts_of(int columns, int offset, int from, int step, int count, int first, Work work) {
        constexpr int MOST = FAN_IN / PLACES;
        constexpr int PART = COLUMNS * HEAD_SIZE;
        int first_part = offset + part_of(from, first), next_part = offset + part_of(from + step, first);
        u32 stride = 2 * step * p.parallel_heads, items = columns * PER_COLUMN;
        for (u32 item = thread; item < items; item += PLACES * THREADS) {
            float2 weight[PLACES][MOST];
            float4 x[PLACES][MOST];
#pragma unroll
            for (int k = 0; k < PLACES; ++k) {
                u32 own = item + k * THREADS < items ? item + k * THREADS : item;
                // they lie evenly, but for the row's first
                const float *x_first = p.part + (i64)first_part * PART + own * 4;
                const float *x_next = p.part + (i64)next_part * PART + own * 4;
                const float2 *w = p.part_weight + own / PER_COLUMN * WARPS + thread / 32;
                const float2 *w_first = w + first_part * (COLUMNS * WARPS), *w_next = w + next_part * (COLUMNS * WARPS);
#pragma unroll
                for (int i = 0; i < MOST; ++i) {
                    bool is_next = i > 0 && i < count;
                    weight[k][i] = __ldcg(is_next ? w_next + (i - 1) * (stride * COLUMNS * WARPS) : w_first);
                    x[k][i] = __ldcg((const float4 *)(is_next ? x_next + (i - 1) * (stride * PART) : x_first));
                }
            }
#pragma unroll
            for (int k = 0; k < PLACES; ++k) {
                u32 own = item + k * THREADS;
                if (own < items) work(own / PER_COLUMN, own % PER_COLUMN * 4, sum_of(weight[k], x[k], count));
            }
        }
    }

    template <int MOST>
    DEVICE static Sum sum_of(float2 (&weight)[MOST], const float4 (&x)[MOST], int count) {
#pragma unroll
        for (int i = 1; i < MOST; ++i)
            if (i >= count) weight[i] = make_float2(MINUS_INFINITY, 0);
        Sum sum = {MINUS_INFINITY, 0, {}};
#pragma unroll
        for (int i = 0; i < MOST; ++i) sum.peak = fmaxf(sum.peak, weight[i].x);
        float shift = sum.peak == MINUS_INFINITY ? 0 : sum.peak;
#pragma unroll
        for (int i = 0; i < MOST; ++i) {
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

    // What the program has of the row that is fetched.
    DEVICE Cut cut_of(const Row &row, const Segment &segment) const {
        int range = batch.range_of_program(program);
        int first = batch.range_of(segment.row_begin), last = batch.range_of(segment.row_end() - 1);
        int from = first + (range - first) / FAN_IN * FAN_IN;
        return {segment.head, row.next_first, row.next_queries * GROUP, first, last, from, min(FAN_IN, last + 1 - from)};
    }

    // Merge the rows that are cut, at most one that began before and one that goes on; who comes last
    // to a row does it (the stream-K fix-up, Osama et al. 2023, §4), each warp for its own elements.
    DEVICE void merge(const Cut &before, const Cut &cut) {
        __syncwarp();
        int lane = thread % 32;
        bool last = false;
        if (lane < 2) {  // both at once
            int count = lane ? cut.count : before.count;
            int place = lane ? part_of(cut.from, cut.first) : part_of(before.from, before.first);
            if (count) last = is_last(place, count);
        }
        u32 lasts = __ballot_sync(~0u, last);
        __syncwarp();  // what lanes 0 and 1 know is known to all
#pragma unroll 1
        for (int i = 0; i < 2; ++i)  // once in the code, which has to be fetched
            if (lasts >> i & 1) {
                Cut row = before;
                if (i) row = cut;
                merge(row);
            }
    }

    // Merge a row's parts in order. Many are merged by bundles first.
    DEVICE void merge(const Cut &cut) {
        mark(Moment::LAST_TO_COME);
        int bundles = (cut.last - cut.first) / FAN_IN + 1;
        int offset = 0, from = cut.from, step = 1, count = cut.count;
        bool all = bundles == 1;
#pragma unroll 1
        while (true) {
            add_parts(cut.columns, offset, from, step, count, cut.first, [&](int column, int at, const Sum &sum) {
                if (all)
                    write_result(cut.head, cut.first_query, column, at, sum);
                else
                    write_part(2 * p.num_programs + part_of(from, cut.first), column, at, sum);
            });
            if (all) break;
            offset = 2 * p.num_programs;
            __syncwarp();
            bool last = thread % 32 == 0 && is_last(offset + part_of(cut.first, cut.first), bundles);
            last = __shfl_sync(~0u, last, 0);
            __syncwarp();
            if (!last) return;
            from = cut.first;
            step = FAN_IN;
            count = bundles;
            all = true;
        }
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
        bool whole = segment.is_whole();
        int part = 2 * program + (segment.begin == segment.row_begin);
        int columns = row.queries * GROUP;
#pragma unroll
        for (int tile = 0; tile < COLUMN_TILES; ++tile) {
            named_barrier(1, THREADS);
            if (tile * 8 < columns) share(row, parity, tile, warp, lane);
            named_barrier(1, THREADS);
            // the thread's elements, as `add_parts` has them
            int begin = tile * 8 * PER_COLUMN, end = min(columns, tile * 8 + 8) * PER_COLUMN;
            mark(Moment::SUMS_THERE);
            for (int item = begin + (thread - begin % THREADS + THREADS) % THREADS; item < end;
                 item += THREADS) {
                int column = item / PER_COLUMN, at = item % PER_COLUMN * 4;
                Sum sum = add_warps(parity, column, at);
                if (whole)
                    write_result(segment.head, row.first_query, column, at, sum);
                else
                    write_part(part, column, at, sum);
            }
        }
        mark(Moment::WRITTEN);
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
