// The producers: a warp draws items and loads queries, one loads K and one V.
#pragma once
#include "prefill_work.cuh"

DEVICE void load_query(const Parameters &p, u32 to, u32 barrier, const Item &item) {
    barrier_arrive_expect(barrier, HALVES * TILE_TOKENS * TILE_HEADS * 128);
#pragma unroll
    for (int half = 0; half < HALVES; ++half)
        tma_load(to + half * ROWS * 128, &p.query, half * 64, item.first_head(), item.first_token, item.kv_head(),
                 barrier);
}

// Bring LOAD_TOKENS tokens. The tensor's dimensions: 64 columns, 8 tokens, pieces of 64 columns,
// octets of tokens, heads; or all columns, 8 tokens, octets, heads, of which a box is 128 bytes, or all
// where they are widened.
DEVICE void load_block(const TensorMap *map, u32 to, u32 barrier, int octet, int head) {
    if constexpr (ARE_WIDENED) {
        tma_load(to, map, 0, 0, octet, head, barrier);
    } else if constexpr (WHOLE_ROWS) {
        tma_load(to, map, 0, 0, 0, octet, head, barrier);
    } else {
#pragma unroll
        for (int piece = 0; piece < PIECES_OF_ROW; ++piece)
            tma_load(to + piece * HALF_STRIDE, map, piece * (FP8 ? 128 : 64), 0, octet, head, barrier);
    }
}

// Where in memory load `lane` of a KV tile begins, in units of 8 tokens; the table is read where
// the tile has tokens from `first_key` up to the sequence's end only.
DEVICE int octet_of_load(const Parameters &p, const Item &item, const int *table, int tile,
                         int first_key, int lane) {
    int token = tile * KV_TILE + lane * LOAD_TOKENS;
    if (lane >= LOADS || token >= item.kv_length || token + LOAD_TOKENS <= first_key) return 0;
    return table[token / BLOCK_SIZE] * p.octets_of_a_block + token % BLOCK_SIZE / 8;
}

// Issue loads [begin, end) of a tile.
DEVICE void load_tile(const TensorMap *map, u32 to, u32 barrier, int lane_octet, int begin, int end,
                      int head) {
    constexpr int LOAD_STRIDE = ARE_WIDENED ? LOAD_BYTES : LOAD_TOKENS / 8 * OCTET_STRIDE;
    int octets[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; ++i) octets[i] = __shfl_sync(0xffffffff, lane_octet, i);
    if (begin == 0 && end == LOADS) {
        if (elected()) {
            barrier_arrive_expect(barrier, LOADED_BYTES);
#pragma unroll
            for (int i = 0; i < LOADS; ++i)
                load_block(map, to + i * LOAD_STRIDE, barrier, octets[i], head);
        }
    } else if (elected()) {
        barrier_arrive_expect(barrier, (end - begin) * LOAD_BYTES);
#pragma unroll
        for (int i = 0; i < LOADS; ++i)
            if (begin <= i && i < end)
                load_block(map, to + i * LOAD_STRIDE, barrier, octets[i], head);
    }
}

// Zero rows [begin, end) of a V tile: a weight of 0 times a NaN would be NaN. The swizzle permutes
// what is within a row of 128 bytes, so it does not matter here.
DEVICE void clear_rows(u32 tile, int begin, int end, int lane) {
    constexpr int CHUNKS = HALVES * 8;
    for (int i = begin * CHUNKS + lane; i < end * CHUNKS; i += 32) {
        int row = i / CHUNKS, chunk = i % CHUNKS;
        u32 at = tile + row / 8 * OCTET_STRIDE + chunk / 8 * HALF_STRIDE + row % 8 * 128 +
                 chunk % 8 * 16;
        store_shared(at, {0, 0, 0, 0});
    }
}

// Draw work items, publish them and load their queries. The next one is drawn when most of an item's keys
// are on their way: where items are few, who is done first has to get what is left.
DEVICE void schedule(const Parameters &p, const Shared &shared, Order &order, int lane) {
    Place place{0, 1};
    u32 loaded_parity = 0;
    if (order.in_registers) order.sort_in_registers(p, lane);
    int num_items = order.num_items * p.num_kv_heads * HEAD_PARTS;
    int index = blockIdx.x;
    Item item;
    while (index < num_items) {
        if (find_item(p, shared, order, index, lane, item)) {
            mark(Moment::LENGTHS_KNOWN);
            barrier_wait(shared.query_empty(place.stage), place.parity);
            if (elected()) {
                item.write(shared.item(place.stage));
                barrier_arrive(shared.item_full(place.stage));
                load_query(p, shared.query(place.stage), shared.query_full(place.stage), item);
            }
            place.next<QUERY_STAGES>();
            barrier_wait(shared.nearly_loaded(), loaded_parity);
            loaded_parity ^= 1;
        }
        u32 ticket = 0;
        if (lane == 0) ticket = atomicAdd(p.tickets, 1);
        index = gridDim.x + __shfl_sync(0xffffffff, ticket, 0);
    }
    barrier_wait(shared.query_empty(place.stage), place.parity);
    if (lane == 0) {
        item.head_part = -1;
        item.write(shared.item(place.stage));
        barrier_arrive(shared.item_full(place.stage));
        if (atomicAdd(p.tickets + 1, 1) == gridDim.x - 1) {  // nobody draws any more
            p.tickets[0] = 0;
            p.tickets[1] = 0;
        }
    }
}

// Load the K or the V tiles of the work items, an item's last tile first.
template <bool OF_VALUES>
DEVICE void load_tiles(const Parameters &p, const Shared &shared, int lane) {
    Place item_place{0, 0}, place{0, 1};
    u32 arrived_parity = 0;
    const TensorMap *map = OF_VALUES ? &p.value : &p.key;
    for (;;) {
        Item item = wait_for_item(shared, item_place);
        barrier_arrive(shared.query_empty(item_place.stage));
        item_place.next<QUERY_STAGES>();
        if (item.head_part < 0) break;
        const int *table = p.tables + item.sequence * p.table_stride;
        int kv_head = item.kv_head();
        int first_key = item.first_key(p);
        int tile = item.tile_end - 1;
        int octet = octet_of_load(p, item, table, tile, first_key, lane);
        int nearly = min(item.tile_begin + DRAWN_AHEAD, tile);
        if (!OF_VALUES && lane == 0 && tile < item.tile_begin) barrier_arrive(shared.nearly_loaded());
        for (; tile >= item.tile_begin; --tile) {
            if (!OF_VALUES && lane == 0 && tile == nearly) barrier_arrive(shared.nearly_loaded());
            int next_octet = 0;
            if (tile > item.tile_begin)
                next_octet = octet_of_load(p, item, table, tile - 1, first_key, lane);
            u32 to = shared.loaded(OF_VALUES, place.stage);
            u32 full = shared.loaded_full(OF_VALUES, place.stage);
            barrier_wait(shared.loaded_empty(OF_VALUES, place.stage), place.parity);
            place.next<goes_by_store(OF_VALUES) ? STORED_STAGES : STAGES>();
            int held = min(item.kv_length - tile * KV_TILE, KV_TILE);
            int hidden = WINDOW ? max(first_key - tile * KV_TILE, 0) : 0;
            int begin = hidden / LOAD_TOKENS;
            int end = (held + LOAD_TOKENS - 1) / LOAD_TOKENS;
            if (!OF_VALUES && tile == item.tile_end - 1) mark(Moment::FIRST_ASKED);
            if (!OF_VALUES || FP8 || (hidden == 0 && held == KV_TILE)) {
                load_tile(map, to, full, octet, begin, end, kv_head);
            } else {
                load_tile(map, to, shared.value_arrived(), octet, begin, end, kv_head);
                barrier_wait(shared.value_arrived(), arrived_parity);
                arrived_parity ^= 1;
                clear_rows(to, 0, hidden, lane);
                clear_rows(to, held, KV_TILE, lane);
                fence_for_tma();
                __syncwarp();
                if (lane == 0) barrier_arrive(full);
            }
            octet = next_octet;
        }
    }
}
