// Decode and short queries: the KV of all sequences divided evenly over the whole GPU.
// What it does and why is told in decode.py; here is how. A program's tiles are numbered from 0 on, in
// the order in which they are asked for: a tile's number is its `round`, and it lies in stage
// `round % STAGES`.
//
// Macros: HEAD_SIZE; GROUP of query heads a KV head; KV_BYTES an element of K and V (2, or 1 for e4m3);
// BF16 of query and output (else float16); COLUMNS of the score tile (queries times heads of a group,
// padded to 8, 16 or 32); BLOCK_SIZE and TILE in tokens, powers of two; LINES, if a tensor map counts
// lines of 128 bytes; STAGES and WARPS, STAGES a multiple of WARPS; PRODUCERS, warps that bring tiles;
// SHARED_BYTES of a program; PROGRAMS on a multiprocessor; CLUSTER of programs that add up in each
// other's shared memory, or 1; WHOLE, if rows of several lengths are not cut where that takes less time, by
// CUT_TOKENS and ALIGNED_TOKENS, which a program reads while rows are cut anywhere, or begin with a range
// each; NEVER_CUTS, if they are not whatever it takes; ALIGNED, if each of few rows of several lengths may
// begin with a range; OUT_F32 for an output in float32;
// AMONG_LONGER, to pass over sequences of more than `max_query_length` queries, which are others'; CAUSAL,
// else queries see all keys; the switches WINDOW, SOFT_CAP, ALIBI, SINKS and LSE; TRACE, which need not be
// there, see trace.cuh.

#include "decode_finish.cuh"

// Arrivals that free a stage: if threads fill stages, each lane that has read one frees it; if the TMA does, one lane
// does for its warp.
constexpr int FREED_BY = GATHER ? 32 : 1;

// Free a stage, which this warp has read.
DEVICE void free_stage(Shared &shared, int stage, int lane) {
    if (FREED_BY == 1) __syncwarp();
    if (lane < FREED_BY) barrier_arrive(shared_address(&shared.empty[stage]));
}

// Work of a consumer's warp: fold its tiles of each segment, write what the program has of a row, and
// merge at the range's end. The first tile of the range is number `round`.
DEVICE void consume(const Parameters &p, Shared &shared, const Batch &batch, Segment segment,
                    int range_end, int round, int program, int warp, int lane) {
    int parity = 0, cuts = 0;
    int counter = 0, count = 0;  // where the parts of this lane's cut are counted, and to what number
    Finish finish{p, shared, warp * 32 + lane};
    Row row;
    row.look_ahead(p, segment);
    if (FETCHES_EARLY) row.fetch(p, segment, lane);
    while (true) {
        if (!FETCHES_EARLY) row.fetch(p, segment, lane);
        // while the queries are on their way, all that would hold up the segment's end
        bool goes_on = segment.goes_on(range_end);
        Few few = {};
        if (!segment.is_whole() && !(CLUSTER > 1 && batch.is_clustered)) {
            Cut cut = Cut::of(batch, segment, program);
            if (cut.total <= Finish::most_swapped(row.next_queries * GROUP)) {
                few = {cut.own, cut.total};
            } else {
                cut.first_query = row.next_first;
                cut.columns = row.next_queries * GROUP;
                if (lane == 0) shared.cuts[warp][cuts] = cut;
                if (lane == cuts) {
                    counter = cut.place_of(cut.from);
                    count = cut.count;
                }
                ++cuts;
            }
        }
        row.start(p, segment, lane);
        Segment next = segment;
        if (FETCHES_EARLY && goes_on) {
            next.next(p, range_end);
            row.look_ahead(p, next);
        }
        int tiles = segment.end - segment.begin, tile = segment.first_tile();
        // the first of the segment's rounds that is this warp's
        for (int i = (warp - round % WARPS + WARPS) % WARPS; i < tiles; i += WARPS) {
            int stage = (round + i) % STAGES;
            barrier_wait(shared_address(&shared.full[stage]), (round + i) / STAGES & 1);
            if (i == 0) mark(Moment::FIRST_THERE);
            if (i + WARPS >= tiles) mark(Moment::LAST_THERE);
            u32 key = shared_address(shared.tiles[stage][0]), value = shared_address(shared.tiles[stage][1]);
            int token = (tile + i) * TILE;
            bool masked = token + TILE > row.least_end;
#if WINDOW
            masked = masked || token < row.kv_length - p.window;
#endif
            if (masked)
                row.fold<true>(p, key, value, token, lane);
            else
                row.fold<false>(p, key, value, token, lane);
            free_stage(shared, stage, lane);
        }
        mark(Moment::LAST_FOLDED);
        round += tiles;
        // tiles that are there wait, and fewer are on their way: the next queries are read beside
        // what follows, and merging is left to the range's end
        if (FETCHES_EARLY && goes_on) row.fetch(p, next, lane);
        finish.run(batch, row, segment, program, 2 * program + (segment.begin == segment.row_begin), few, parity);
        parity ^= 1;
        if (!goes_on) break;
        if (FETCHES_EARLY) {
            segment = next;
        } else {
            segment.next(p, range_end);
            row.look_ahead(p, segment);
        }
    }
    finish.merge_rows(counter, count);
}

// Zeros for the queries of sequences without tokens.
DEVICE void write_nothing(const Parameters &p, int program, int thread, int threads) {
    for (int sequence = program; sequence < p.num_sequences; sequence += p.num_programs) {
        if (p.kv_lengths[sequence] > 0 || is_passed_over(p, sequence)) continue;
        for (int token = p.query_starts[sequence]; token < p.query_starts[sequence + 1]; ++token)
            for (int item = thread; item < p.num_query_heads * (HEAD_SIZE / 4); item += threads) {
                int head = item / (HEAD_SIZE / 4), at = item % (HEAD_SIZE / 4) * 4;
                float zeros[4] = {};
                store_out(p, token, head, at, zeros);
#if LSE
                if (at == 0) {
                    float peak = MINUS_INFINITY, total = 0;
                    add_sink(p, head, peak, total);
                    p.lse[(i64)token * p.num_query_heads + head] = lse_of(peak, total);
                }
#endif
            }
    }
}

// Have what is small on its way to the L2 before it is known who needs what of it, a line of 128 bytes a thread.
DEVICE void prefetch(const Parameters &p, int program) {
    int line = prefetch_batch(p, program * blockDim.x + threadIdx.x);
    if (0 <= line && line < p.query_lines) prefetch_l2(p.query + (i64)line * 64);
}

// Free a stage of what a wrong guess brings; by the warp whose it is, which then waits for the next
// phase of its barrier.
DEVICE void throw_away(Shared &shared, int stage, int lane) {
    barrier_wait(shared_address(&shared.full[stage]), 0);
    free_stage(shared, stage, lane);
}

// Which program a block is. Blocks that follow each other are put on the two multiprocessors of a TPC,
// which share a path to the L2 that brings less than twice what one of them can take. Where there is not
// work for all, the first programs have it: of each two blocks one is in the first half of the programs.
// Where a multiprocessor has two programs, each half of the grid is numbered so.
DEVICE int spread(int block) {
    int all = gridDim.x / PROGRAMS, before = block < all ? 0 : all, place = block - before;
    return before + place / 2 + place % 2 * ((all + 1) / 2);
}

// Which program a block is of clusters of `CLUSTER` blocks. A cluster's programs have ranges that follow each
// other, of one KV head.
DEVICE int program_of_cluster(const Parameters &p, int block) {
    int cluster = block / CLUSTER, before = cluster / p.parallel_heads;
    return (before * CLUSTER + block % CLUSTER) * p.parallel_heads + cluster - before * p.parallel_heads;
}

// Grid: [num_programs]; WARPS + PRODUCERS warps.
extern "C" __global__ void __launch_bounds__((WARPS + PRODUCERS) * 32, PROGRAMS)
    decode_kernel(const __grid_constant__ Parameters p) {
    DYNAMIC_SHARED(raw, 16);
    Shared &shared = *(Shared *)(raw + (1024 - shared_address(raw) % 1024) % 1024);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int program = CLUSTER > 1 ? program_of_cluster(p, blockIdx.x) : spread(blockIdx.x);
    if (threadIdx.x == 0) {
        prefetch_tensor_map(&p.key);
        prefetch_tensor_map(&p.value);
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(shared_address(&shared.full[stage]), GATHER ? PRODUCERS * 32 : 1);
            barrier_init(shared_address(&shared.empty[stage]), FREED_BY);
        }
        barrier_init(shared_address(&shared.sent_there), 1);
        barrier_init_fence();
    }
    __syncwarp();
    if (CLUSTER > 1) cluster_arrive();  // with barriers that others may send to
    prefetch(p, program);
    __syncthreads();
    Guess guess(p, program);
    Producer producer(p, shared, max(0, warp - WARPS), lane);
    if (warp == 0) producer.expect(guess);
    wait_for_the_launch_before();
    mark(Moment::STARTED);
    allow_the_next_launch();
    // another warp than the producer, which goes on to what is true at once
    if (warp == 0 && guess.count) producer.bring(guess);
    if (warp == WARPS && guess.count) producer.read_ahead(guess);
    Batch batch = Batch::read(p, lane);
    int range = batch.range_of_program(program);
    int begin = batch.begin(range), end = batch.begin(range + 1);
    if (begin < end) {
        Segment segment(p, batch, program, begin, end);
        if (segment.is_in(p, end)) {
            mark(Moment::LENGTHS_KNOWN);
            bool holds = guess.holds(segment);
            if (!holds && warp < guess.count) throw_away(shared, warp, lane);
            int round = holds ? 0 : guess.count;
            if (warp >= WARPS)
                producer.run(segment, end, round, holds ? guess.count : 0);
            else
                consume(p, shared, batch, segment, end, round, program, warp, lane);
        }  // else rows stay whole, and nothing was guessed
    } else if (warp < guess.count)
        throw_away(shared, warp, lane);
    // who brings tiles is done first
    if (warp >= WARPS) write_nothing(p, program, threadIdx.x - WARPS * 32, PRODUCERS * 32);
    mark(Moment::ENDED);
}
