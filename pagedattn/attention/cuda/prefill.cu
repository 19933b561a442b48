// Prefill, chunks and mixed batches: see prefill.py for the schedule.
//
// Shared memory holds rings of query, K and V tiles, filled by the TMA with the 128-byte swizzle:
// pieces of 8 rows by 64 columns (1 KiB) are what the matrix units read. K is read with its
// columns innermost along the product's depth ("K-major"), V with them along its width
// ("MN-major"), so that neither is transposed. Of a cache of e4m3 the TMA fills other rings, in rows as
// they are in memory, and a warpgroup widens K and V to float16 from there into those that are read. Or
// e4m3 is multiplied: then only V takes this way, and is turned around.
//
// Macros: HEAD_SIZE, BLOCK_SIZE, GROUP (query heads of a KV head), HEAD_PARTS (that these are divided into,
// none of them empty), KV_TILE, WARPGROUPS that multiply (2 or 3), QUERY_STAGES, BF16 (queries, and an output
// of 16 bits), FP8 (a cache of e4m3), FP8_PRODUCTS (over it queries and weights are rounded to e4m3), OUT_F32
// (an output in float32), CAUSAL (else queries see all keys), SPLIT (items are shares of a tile's keys, of who
// has more), BESIDE (the launch before is another kernel's over the same batch, beside which this one begins), the
// switches WINDOW, SOFT_CAP, ALIBI, SINKS, LSE, and TRACE, which need not be there, see trace.cuh.

#include "prefill_consumer.cuh"
#include "prefill_producer.cuh"
#include "prefill_result.cuh"
#if FP8_PRODUCTS
#include "prefill_transposer.cuh"
#elif FP8
#include "prefill_widener.cuh"
#endif

DEVICE void consume(const Parameters &p, const Shared &shared, int warpgroup, int thread) {
    int lane = thread % 32;
    Place place{0, 0};
    Consumer consumer{{p, lane, warpgroup * 64 + thread / 32 * 16}, shared, {0, 0}, {0, 0}};
    if (Consumer::TURNS && warpgroup == WARPGROUPS - 1) named_barrier_arrive(FIRST_TURN, 2 * 128);
    for (;;) {
        Item item = wait_for_item(shared, place);
        if (item.head_part < 0) break;
        barrier_wait(shared.query_full(place.stage), place.parity);
        u32 tile = shared.query(place.stage);
        if (warpgroup * 64 < item.num_tokens * TILE_HEADS) {
            if (FP8) consumer.prepare(item, tile, warpgroup);
            consumer.start_item(item);
            if (item.tile_begin < item.tile_end)
                consumer.attend(item, descriptor(tile + warpgroup * 64 * 128, 16, PIECE));
            consumer.finish(item);
            if (OUT_F32 || item.shares > 1) {
                store_floats(consumer, item, consumer.outputs);
            } else {
                // all of the warpgroup have read the query: its place takes the output
                named_barrier(1 + warpgroup, 128);
                store(consumer, item, consumer.outputs, tile);
                fence_for_tma();
            }
            mark(Moment::WRITTEN);
        } else {
            consumer.pass(item);
        }
        barrier_arrive(shared.query_empty(place.stage));
        place.next<QUERY_STAGES>();
    }
}

#if FP8
// Prepare the tiles of the work items for the products, in the order in which they are multiplied: K of a
// tile, then V of the tile before.
DEVICE void prepare_tiles(const Parameters &p, const Shared &shared, int thread) {
    Place item_place{0, 0};
    Preparer preparer(shared, thread);
    u32 count = 0;  // of the tiles of the items before
    for (;;) {
        Item item = wait_for_item(shared, item_place);
        barrier_arrive(shared.query_empty(item_place.stage));
        item_place.next<QUERY_STAGES>();
        if (item.head_part < 0) break;
        int first_key = item.first_key(p);
        int tiles = item.tile_end - item.tile_begin;
        int hidden = first_key - item.tile_end * KV_TILE, held = item.kv_length - item.tile_end * KV_TILE;
        for (int i = 0; i <= tiles; ++i, hidden += KV_TILE, held += KV_TILE) {
            if (i < tiles) preparer.prepare_key(count + i);
            if (i == 0) continue;
            if (hidden <= 0 && held >= KV_TILE)
                preparer.prepare_value<false>(count + i - 1, 0, KV_TILE);
            else
                preparer.prepare_value<true>(count + i - 1, hidden, held);
        }
        count += tiles;
    }
}
#endif

extern "C" __global__ void __launch_bounds__((WARPGROUPS + 1 + FP8) * 128, 1)
    prefill_kernel(const __grid_constant__ Parameters p) {
    // so aligned, it lies at a place that is known when this is compiled
    DYNAMIC_SHARED(memory, PIECE);
    Shared shared{shared_address(memory)};
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(shared.key_full(i), KEY_WARPS);
            barrier_init(shared.key_empty(i), CONSUMER_WARPS);
            barrier_init(shared.value_full(i), FP8 ? PREPARER_WARPS : 1);
            barrier_init(shared.value_empty(i), CONSUMER_WARPS);
        }
        barrier_init(shared.value_arrived(), 1);
        barrier_init(shared.nearly_loaded(), 1);
        for (int i = 0; i < QUERY_STAGES; ++i) {
            barrier_init(shared.item_full(i), 1);
            barrier_init(shared.query_full(i), 1);
            // every lane reads the item, and arrives when it has
            barrier_init(shared.query_empty(i), 32 * (CONSUMER_WARPS + LOADER_WARPS + PREPARER_WARPS));
        }
        for (int i = 0; i < STORED_STAGES; ++i)
            for (int values = 0; values < 2; ++values) {
                barrier_init(shared.stored_full(values, i), 1);
                barrier_init(shared.stored_empty(values, i), PREPARER_WARPS);
            }
        barrier_init_fence();
    }
    prefetch_batch(p, blockIdx.x * blockDim.x + threadIdx.x);
    u32 *sorted = (u32 *)(memory + shared.sorted() - shared.base);
    Order order(p);
    if (order.in_shared()) order.clear(shared, sorted, threadIdx.x);
    if (!BESIDE) wait_for_the_launch_before();
    mark(Moment::STARTED);
    allow_the_next_launch();
    __syncthreads();
    if (order.in_shared()) order.sort_in_shared(p, shared, sorted, threadIdx.x);
    // the same in all lanes, as the compiler sees from the shuffle
    int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
    if (warpgroup == 0) {
        give_registers<PRODUCER_REGISTERS>();
        int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        if (warp == 0)
            schedule(p, shared, order, lane);
        else if (warp == 1)
            load_tiles<false>(p, shared, lane);
        else if (warp == 2)
            load_tiles<true>(p, shared, lane);
#if FP8
    } else if (warpgroup == 1) {
        give_registers<PREPARER_REGISTERS>();
        prepare_tiles(p, shared, threadIdx.x % 128);
#endif
    } else {
        take_registers<CONSUMER_REGISTERS>();
        consume(p, shared, warpgroup - 1 - FP8, threadIdx.x % 128);
    }
    mark(Moment::ENDED);
    // whoever waits for this launch waits for the one before too
    if (BESIDE) wait_for_the_launch_before();
}
