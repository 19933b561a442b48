// Work items: a query tile of one KV head, and how a program finds the next.
#pragma once
#include "prefill_shape.cuh"

struct Item {
    int first_token;     // the tile's first query token
    int split = 0;       // of the tile's keys, which of `splits` shares it has
    int num_tokens;      // its query tokens
    int head;            // KV head; negative after the last item
    int first_position;  // of the first query token; if not CAUSAL the last key, for all of them
    int tile_begin;      // KV tiles from here
    int tile_end;        // to here are seen by some row
    int sequence;
    int kv_length;

    // The first key that a row sees.
    DEVICE int first_key(const Parameters &p) const {
        return WINDOW ? max(first_position + 1 - p.window, 0) : 0;
    }

    DEVICE void write(u32 to) const {
        u32 tokens = SPLIT ? split << 16 | num_tokens : num_tokens;
        store_shared(to, {(u32)first_token, tokens, (u32)head, (u32)first_position});
        store_shared(to + 16, {(u32)tile_begin, (u32)tile_end, (u32)sequence, (u32)kv_length});
    }

    DEVICE void read(u32 from) {
        u32 x[4];
        load_shared(x, from);
        first_token = x[0], num_tokens = x[1], head = x[2], first_position = x[3];
        if (SPLIT) {
            split = num_tokens >> 16;
            num_tokens &= 0xffff;
        }
        load_shared(x, from + 16);
        tile_begin = x[0], tile_end = x[1], sequence = x[2], kv_length = x[3];
    }
};

DEVICE Item wait_for_item(const Shared &shared, const Place &place) {
    barrier_wait(shared.item_full(place.stage), place.parity);
    Item item;
    item.read(shared.item(place.stage));
    return item;
}

// Largest s with `query_starts[s] / TILE_TOKENS + s <= tile`, by the whole warp.
DEVICE int sequence_of_tile(const Parameters &p, int tile, int lane) {
    int low = 0, high = p.num_sequences;
    while (high - low > 1) {
        int step = (high - low + 31) / 32;
        int probe = low + lane * step;
        bool begun = probe < high && p.query_starts[probe] / TILE_TOKENS + probe <= tile;
        low += (__popc(__ballot_sync(0xffffffff, begun)) - 1) * step;  // lane 0's has begun
        high = min(high, low + step);
    }
    return low;
}

// The sequence that has a tile if tiles are counted one by one, and the first of its tiles; false if
// there is no such tile. By the whole warp, which reads all sequences: parts are few.
DEVICE bool part_of_tile(const Parameters &p, int tile, int lane, int &sequence, int &first_tile) {
    int before = 0;
    for (int base = 0; base < p.num_sequences; base += 32) {
        int own = base + lane, tiles = 0;
        if (own < p.num_sequences)
            tiles = (p.query_starts[own + 1] - p.query_starts[own] + TILE_TOKENS - 1) / TILE_TOKENS;
        int end = tiles;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            int lower = __shfl_up_sync(0xffffffff, end, step);
            if (lane >= step) end += lower;
        }
        end += before;
        u32 beyond = __ballot_sync(0xffffffff, end > tile);
        if (beyond) {
            int has = __ffs(beyond) - 1;
            sequence = base + has;
            first_tile = __shfl_sync(0xffffffff, end - tiles, has);
            return true;
        }
        before = __shfl_sync(0xffffffff, end, 31);
    }
    return false;
}

// The query tiles that items are drawn of: all, or from the first to the last one of a sequence that is
// not passed over. By the whole warp.
struct Range {
    int first, count;

    DEVICE static Range of(const Parameters &p, int lane) {
        if (p.short_queries == 0) return {0, p.num_tiles};
        int first = p.num_tiles, end = 0;
#pragma unroll 4
        for (int sequence = lane; sequence < p.num_sequences; sequence += 32) {
            int start = p.query_starts[sequence], queries = p.query_starts[sequence + 1] - start;
            if (queries <= p.short_queries) continue;
            int tile = start / TILE_TOKENS + sequence;
            first = min(first, tile);
            end = max(end, tile + (queries + TILE_TOKENS - 1) / TILE_TOKENS);
        }
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            first = min(first, __shfl_xor_sync(0xffffffff, first, step));
            end = max(end, __shfl_xor_sync(0xffffffff, end, step));
        }
        return {first, max(0, end - first)};
    }
};

// Find the item that is drawn as number `index` of those of `range`; false if it has no queries.
DEVICE bool find_item(const Parameters &p, Range range, int index, int lane, Item &item) {
    if (SPLIT) {
        item.split = index % p.splits;
        index /= p.splits;
    }
    int section_items = p.section_heads * range.count;
    int section = index / section_items;
    int rest = index - section * section_items;
    int tile = rest / p.section_heads;
    item.head = section * p.section_heads + rest - tile * p.section_heads;
    int sequence, first_tile;
    if (CAUSAL) {
        // a sequence's last tiles see the most keys: they go first
        int back = p.from_both_ends ? tile / 2 : tile;
        tile = range.first + (p.from_both_ends && tile % 2 ? tile / 2 : range.count - 1 - back);
        sequence = sequence_of_tile(p, tile, lane);
        first_tile = p.query_starts[sequence] / TILE_TOKENS + sequence;
    } else if (!part_of_tile(p, tile, lane, sequence, first_tile)) {
        // Parts are cut for about an item a program. One whose first number had none would begin
        // later, having to draw another.
        return false;
    }
    int start = p.query_starts[sequence];
    int num_queries = p.query_starts[sequence + 1] - start;
    int first_step = (tile - first_tile) * TILE_TOKENS;
    if (first_step >= num_queries || num_queries <= p.short_queries) return false;
    item.sequence = sequence;
    item.kv_length = p.kv_lengths[sequence];
    item.first_token = start + first_step;
    item.num_tokens = min(TILE_TOKENS, num_queries - first_step);
    item.first_position = item.kv_length - (CAUSAL ? num_queries - first_step : 1);
    int seen = item.first_position + (CAUSAL ? item.num_tokens : 1);
    seen = item.kv_length > 0 ? max(seen, 0) : 0;
    item.tile_end = (seen + KV_TILE - 1) / KV_TILE;
    item.tile_begin = min(item.first_key(p) / KV_TILE, item.tile_end);
    if (SPLIT) {
        int tiles = item.tile_end - item.tile_begin, begin = item.tile_begin;
        item.tile_begin = begin + tiles * item.split / p.splits;
        item.tile_end = begin + tiles * (item.split + 1) / p.splits;
    }
    return true;
}
