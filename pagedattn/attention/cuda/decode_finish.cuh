// A row's end: what the warps have is added up, and what the programs have of a row that is cut.
#pragma once
#include "decode_result.cuh"

struct Finish {
    const Parameters &p;
    Shared &shared;
    int thread;

    static constexpr int THREADS = WARPS * 32;
    static constexpr int PER_COLUMN = HEAD_SIZE / 4;

    // How many parts a row has at most that are swapped, if it has so many columns. Two trips to the L2 take less
    // than counting does: two steps for one item a thread, or one for each of two.
    DEVICE static int most_swapped(int columns) {
        int items = columns * PER_COLUMN;
        return COLUMN_TILES > 1 || items > 2 * THREADS ? 0 : items > THREADS ? 2 : 4;
    }

    DEVICE void write_part(int part, int column, int at, const Sum &sum) {
        i64 place = (i64)part * COLUMNS + column;
        *(float4 *)(p.part + place * HEAD_SIZE + at) =
            make_float4(sum.of[0], sum.of[1], sum.of[2], sum.of[3]);
        // every warp has its own place for it: who reads a column's elements wrote them before
        p.part_weight[place * WARPS + thread / 32] = make_float2(sum.peak, sum.total);
    }

    template <int COUNT>
    DEVICE void write_result(int kv_head, int first_query, int column, int at, SumOf<COUNT> sum) {
        int head = kv_head * GROUP + column % GROUP;
        i64 token = first_query + column / GROUP;
        float factor = add_sink(p, head, sum.peak, sum.total);
        factor = sum.total > 0 ? factor / sum.total : 0;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) sum.of[i] *= factor;
        store_out(p, token, head, at, sum.of);
#if LSE
        if (at == 0) p.lse[token * p.num_query_heads + head] = lse_of(sum.peak, sum.total);
#endif
    }

    // What is put for another program where there are zeros, and whether it is there: a peak is never +0 then.
    DEVICE static float4 word_of(const SumOf<2> &sum) {
        return make_float4(sum.of[0], sum.of[1], __float_as_uint(sum.peak) ? sum.peak : -0.f, sum.total);
    }

    DEVICE static bool is_there(const float4 &word) { return __float_as_uint(word.z); }

    // Of a row that few programs have, add up parts by twos, and these sums by twos: put what one has in the
    // other's place, at the program of the right one's first part. If the other's is there already, it comes back,
    // and who gets it goes on with both. Each two elements go by themselves: of some one program may be the
    // last, of others another.
    DEVICE void swap(int program, const Few &few, int kv_head, int first_query, int item, const Sum &sum) {
        SumOf<2> own[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) own[i] = {sum.peak, sum.total, {sum.of[2 * i], sum.of[2 * i + 1]}};
        bool is_last[2] = {true, true};
        int part = few.own;
#pragma unroll 1
        for (int width = 1; width < few.total; width *= 2) {
            bool is_right = part & width;
            int right = is_right ? part : part + width;
            if (right >= few.total) continue;  // a left one alone
            int at = program + (right - few.own) * p.parallel_heads;
            float4 *place = p.swapped + ((i64)at * (COLUMNS * PER_COLUMN) + item) * 2;
            float4 theirs[2];
#pragma unroll
            for (int i = 0; i < 2; ++i)
                if (is_last[i]) theirs[i] = exchange(place + i, word_of(own[i]));
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                is_last[i] = is_last[i] && is_there(theirs[i]);
                if (!is_last[i]) continue;
                clear(place + i);
                SumOf<2> other = {theirs[i].z, theirs[i].w, {theirs[i].x, theirs[i].y}};
                // the left one first: the sum is the same bits whoever makes it
                own[i] = sum_of_two(is_right ? other : own[i], is_right ? own[i] : other);
            }
            if (!is_last[0] && !is_last[1]) return;
            if (is_right) part -= width;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i)
            if (is_last[i]) write_result(kv_head, first_query, item / PER_COLUMN, item % PER_COLUMN * 4 + 2 * i, own[i]);
    }

    DEVICE static SumOf<2> sum_of_two(const SumOf<2> &a, const SumOf<2> &b) {
        float peak = fmaxf(a.peak, b.peak), shift = peak == MINUS_INFINITY ? 0 : peak;
        float of_a = exp2_of(a.peak - shift), of_b = exp2_of(b.peak - shift);
        return {peak, fmaf(b.total, of_b, a.total * of_a),
                {fmaf(b.of[0], of_b, a.of[0] * of_a), fmaf(b.of[1], of_b, a.of[1] * of_a)}};
    }

    // Whether this lane's warp is the last of `count` programs' to come to a place; then the warp sees
    // what they wrote before. Leaves a zero. What the warp wrote has to be known to the lane.
    DEVICE bool is_last(int place, int count) {
        int *counter = p.arrived + place * WARPS + thread / 32;
        bool last = add_in_order(counter, 1) == count - 1;
        if (last) *counter = 0;
        return last;
    }

    // Add up `count` parts of a row, every `step`-th from part `from` on, which lie `offset` places
    // from their own. Call `work` with each column and place in it that are this thread's, and the sum.
    // Few parts are added up for two places at a time, so that as many loads are on their way.
    template <class Work>
    DEVICE void add_parts(const Cut &cut, int offset, int from, int step, int count, Work work) {
        if (COLUMNS * PER_COLUMN > THREADS && count <= FAN_IN / 2)
            add_parts_of<2>(cut, offset, from, step, count, work);
        else
            add_parts_of<1>(cut, offset, from, step, count, work);
    }

    // No load is behind a branch, so that all are on their way at once: where there are fewer parts,
    // the first is loaded again, and where there are fewer places, the thread's first.
    template <int PLACES, class Work>
    DEVICE void add_parts_of(const Cut &cut, int offset, int from, int step, int count, Work work) {
        constexpr int MOST = FAN_IN / PLACES;
        constexpr int PART = COLUMNS * HEAD_SIZE, WEIGHTS = COLUMNS * WARPS;
        int first_part = offset + cut.place_of(from), next_part = offset + cut.place_of(from + step);
        u32 stride = step * cut.apart, items = cut.columns * PER_COLUMN;
        for (u32 item = thread; item < items; item += PLACES * THREADS) {
            float2 weight[PLACES][MOST];
            float4 parts[PLACES][MOST];
#pragma unroll
            for (int k = 0; k < PLACES; ++k) {
                u32 own = item + k * THREADS < items ? item + k * THREADS : item;
                // they lie evenly, but for the row's first
                const float *x = p.part + own * 4;
                const float *x_first = x + (i64)first_part * PART, *x_next = x + (i64)next_part * PART;
                const float2 *w = p.part_weight + own / PER_COLUMN * WARPS + thread / 32;
                const float2 *w_first = w + first_part * WEIGHTS, *w_next = w + next_part * WEIGHTS;
#pragma unroll
                for (int i = 0; i < MOST; ++i) {
                    bool is_next = i > 0 && i < count;
                    weight[k][i] = __ldcg(is_next ? w_next + (i - 1) * (stride * WEIGHTS) : w_first);
                    parts[k][i] = __ldcg((const float4 *)(is_next ? x_next + (i - 1) * (stride * PART) : x_first));
                }
            }
#pragma unroll
            for (int k = 0; k < PLACES; ++k) {
                u32 own = item + k * THREADS;
                if (own < items) work(own / PER_COLUMN, own % PER_COLUMN * 4, sum_of(weight[k], parts[k], count));
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

    // Merge this warp's `Cut`s, two at most, of which a lane each has the counter and how many parts are
    // counted; who comes last to a row does it (the stream-K fix-up, Osama et al. 2023, §4), each warp for
    // its own elements.
    DEVICE void merge_rows(int counter, int count) {
        __syncwarp();
        const Cut *rows = shared.cuts[thread / 32];
        bool last = false;
        if (count) last = is_last(counter, count);  // both at once
        u32 lasts = __ballot_sync(~0u, last);
        __syncwarp();  // what lanes 0 and 1 know is known to all
#pragma unroll 1
        for (int i = 0; i < 2; ++i)  // once in the code, which has to be fetched
            if (lasts >> i & 1) merge(rows[i]);
    }

    // Merge a row's parts in order. Many are merged by bundles first.
    DEVICE void merge(Cut cut) {
        mark(Moment::LAST_TO_COME);
        int bundles = (cut.total - 1) / FAN_IN + 1;
        int offset = 0, from = cut.from, step = 1, count = cut.count;
        bool all = bundles == 1;
#pragma unroll 1
        while (true) {
            add_parts(cut, offset, from, step, count, [&](int column, int at, const Sum &sum) {
                if (all)
                    write_result(cut.head, cut.first_query, column, at, sum);
                else
                    write_part(2 * p.num_programs + cut.place_of(from), column, at, sum);
            });
            if (all) break;
            offset = 2 * p.num_programs;
            __syncwarp();
            // bundles are counted where the second part lies, with which none begins
            bool last = thread % 32 == 0 && is_last(cut.place_of(1), bundles);
            last = __shfl_sync(~0u, last, 0);
            __syncwarp();
            if (!last) return;
            from = 0;
            step = FAN_IN;
            count = bundles;
            all = true;
        }
        mark(Moment::MERGED);
    }

    // The programs of a cluster add up an item of a row, four elements of a column, by turns of some, which
    // are the 32 bytes of an output that lie in a sector. At most each has so many:
    DEVICE static int items_each(int items) {
        return (items / ITEMS_A_TURN + CLUSTER - 1) / CLUSTER * ITEMS_A_TURN;
    }

    // Its `place`-th one.
    DEVICE static int item_of(int rank, int place) {
        return (place / ITEMS_A_TURN * CLUSTER + rank) * ITEMS_A_TURN + place % ITEMS_A_TURN;
    }

    // What the cluster sends this program of a row, its own among it.
    DEVICE static u32 bytes_sent(int columns) {
        int turns = columns * PER_COLUMN / ITEMS_A_TURN, rank = blockIdx.x % CLUSTER;
        int own = (turns - rank + CLUSTER - 1) / CLUSTER * ITEMS_A_TURN;
        return own * CLUSTER * (sizeof(float4) + sizeof(float2));
    }

    DEVICE void send(int item, int items, const Sum &sum) {
        int turn = item / ITEMS_A_TURN, to = turn % CLUSTER;
        int slot = blockIdx.x % CLUSTER * items_each(items) + turn / CLUSTER * ITEMS_A_TURN + item % ITEMS_A_TURN;
        u32 there = shared_address(&shared.sent_there);
        float4 part = make_float4(sum.of[0], sum.of[1], sum.of[2], sum.of[3]);
        send_to_program(shared_address(&shared.sent[slot]), to, part, there);
        send_to_program(shared_address(&shared.sent_weight[slot]), to, make_float2(sum.peak, sum.total), there);
    }

    // What the cluster has of an item, by `place` among the program's own.
    DEVICE Sum add_sent(int place, int each) {
        float2 weight[CLUSTER];
        float4 parts[CLUSTER];
#pragma unroll
        for (int rank = 0; rank < CLUSTER; ++rank) {
            weight[rank] = shared.sent_weight[rank * each + place];
            parts[rank] = shared.sent[rank * each + place];
        }
        return sum_of(weight, parts, CLUSTER);
    }

    // Add up a row of which each program of the cluster has a part, and has sent it.
    DEVICE void merge_cluster(const Batch &batch, int head, int first_query, int columns) {
        barrier_wait_for_cluster(shared_address(&shared.sent_there));
        mark(Moment::LAST_TO_COME);
        int items = columns * PER_COLUMN, each = items_each(items), rank = blockIdx.x % CLUSTER;
        if (batch.parts > CLUSTER) {
            for (int i = thread; i < 2 * each && item_of(rank, i / 2) < items; i += THREADS)
                merge_clusters(batch, head, first_query, item_of(rank, i / 2), i % 2, add_sent(i / 2, each));
        } else {
            for (int place = thread; place < each; place += THREADS) {
                int item = item_of(rank, place);
                if (item >= items) break;
                write_result(head, first_query, item / PER_COLUMN, item % PER_COLUMN * 4, add_sent(place, each));
            }
        }
        mark(Moment::MERGED);
    }

    // Of a row that several clusters share, the last one adds up what all have of half an item: it looks for
    // what the others leave, which begin before it, until all is there.
    DEVICE void merge_clusters(const Batch &batch, int head, int first_query, int item, int half, const Sum &of_item) {
        SumOf<2> own = {of_item.peak, of_item.total, {of_item.of[0], of_item.of[1]}};
        if (half) own.of[0] = of_item.of[2], own.of[1] = of_item.of[3];
        int clusters = batch.parts / CLUSTER, cluster = blockIdx.x / CLUSTER;
        int before = cluster / batch.parallel_heads % clusters;  // of the row
        i64 step = (i64)batch.parallel_heads * (COLUMNS * PER_COLUMN) * 2;
        float4 *place = p.swapped + ((i64)cluster * (COLUMNS * PER_COLUMN) + item) * 2 + half;
        if (before < clusters - 1) {
            leave(place, word_of(own));
            return;
        }
        float4 *first = place - before * step, theirs[FAN_IN - 1];
        bool all;
        do {
            all = true;
#pragma unroll
            for (int i = 0; i < FAN_IN - 1; ++i) theirs[i] = look(first + (i < before ? i : 0) * step);  // all at once
#pragma unroll
            for (int i = 0; i < FAN_IN - 1; ++i) all = all && is_there(theirs[i]);
        } while (!all);
        SumOf<2> sum = {own.peak, 0, {}};
#pragma unroll
        for (int i = 0; i < FAN_IN - 1; ++i) sum.peak = fmaxf(sum.peak, theirs[i].z);  // one of them twice
        float shift = sum.peak == MINUS_INFINITY ? 0 : sum.peak;
        auto add = [&](float peak, float total, float x, float y) {
            float gain = exp2_of(peak - shift);
            sum.total += total * gain;
            sum.of[0] += x * gain;
            sum.of[1] += y * gain;
        };
#pragma unroll
        for (int i = 0; i < FAN_IN - 1; ++i) {
            if (i >= before) continue;
            add(theirs[i].z, theirs[i].w, theirs[i].x, theirs[i].y);
            clear(first + i * step);
        }
        add(own.peak, own.total, own.of[0], own.of[1]);
        write_result(head, first_query, item / PER_COLUMN, item % PER_COLUMN * 4 + 2 * half, sum);
    }

    // Add up what the warps have of a segment, and write it: the result, or a part of it, to `place`; or
    // have the cluster add it up, or swap it if the row's parts are `few`.
    DEVICE void run(const Batch &batch, Row &row, const Segment &segment, int program, int place, const Few &few, int parity) {
        int warp = thread / 32, lane = thread % 32;
        if (CLUSTER > 1 && batch.is_clustered) {
            cluster_wait();  // all of it have begun
            if (thread == 0) barrier_arrive_expect(shared_address(&shared.sent_there), bytes_sent(row.queries * GROUP));
        }
        bool whole = segment.is_whole();
        int columns = row.queries * GROUP;
#pragma unroll
        for (int tile = 0; tile < COLUMN_TILES; ++tile) {
            int buffer = SUM_BUFFERS == 1 ? 0 : COLUMN_TILES == 1 ? parity : tile % 2;
            if (SUM_BUFFERS == 1) named_barrier(1, THREADS);  // what was there has been read
            if (tile * 8 < columns) share(row, parity, buffer, tile, warp, lane);
            named_barrier(1, THREADS);
            mark(Moment::SUMS_THERE);
            // the thread's elements, as `add_parts` has them
            int begin = tile * 8 * PER_COLUMN, end = min(columns, tile * 8 + 8) * PER_COLUMN;
            for (int item = begin + (thread - begin % THREADS + THREADS) % THREADS; item < end;
                 item += THREADS) {
                int column = item / PER_COLUMN, at = item % PER_COLUMN * 4;
                Sum sum = add_warps(parity, buffer, column, at, row.value_scale);
                if (CLUSTER > 1 && batch.is_clustered)
                    send(item, columns * PER_COLUMN, sum);
                else if (whole)
                    write_result(segment.head, row.first_query, column, at, sum);
                else if (COLUMN_TILES == 1 && few.total)
                    swap(program, few, segment.head, row.first_query, item, sum);
                else
                    write_part(place, column, at, sum);
            }
        }
        mark(Moment::WRITTEN);
        if (CLUSTER > 1 && batch.is_clustered) {
            __syncwarp();
            merge_cluster(batch, segment.head, row.first_query, columns);
        }
    }

    // Put a warp's sums of eight columns, in units of its own peak, into shared memory, with peaks and totals.
    DEVICE void share(const Row &row, int parity, int buffer, int tile, int warp, int lane) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int in_tile = lane % 4 * 2 + i;
            float *to = shared.sums[buffer][warp][in_tile];
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS_OF_16; ++chunk)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    int at = chunk * 16 + (FP8 ? lane / 4 * 2 + half : lane / 4 + half * 8);
                    to[at] = row.sum[chunk][tile][half * 2 + i];
                }
            float total = row.total[tile][i];
#pragma unroll
            for (int step = 4; step < 32; step *= 2) total += __shfl_xor_sync(~0u, total, step);
            if (lane < 4) {
                shared.peaks[parity][warp][tile * 8 + in_tile] = row.peak[tile][i];
                shared.totals[parity][warp][tile * 8 + in_tile] = total;
            }
        }
    }

    // What the warps have of four elements of a column, values times `scale`.
    DEVICE Sum add_warps(int parity, int buffer, int column, int at, float scale) {
        Sum sum = {MINUS_INFINITY, 0, {}};
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum.peak = fmaxf(sum.peak, shared.peaks[parity][w][column]);
        float shift = sum.peak == MINUS_INFINITY ? 0 : sum.peak;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            float factor = exp2_of(shared.peaks[parity][w][column] - shift);
            sum.total += shared.totals[parity][w][column] * factor;
            float4 x = *(const float4 *)&shared.sums[buffer][w][column % 8][at];
            factor *= scale;
            sum.of[0] += x.x * factor, sum.of[1] += x.y * factor;
            sum.of[2] += x.z * factor, sum.of[3] += x.w * factor;
        }
        return sum;
    }
};
