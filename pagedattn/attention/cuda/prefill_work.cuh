// Work items: a query tile of a KV head's query heads, or of a part of them, and how a program finds the next.
#pragma once
#include "prefill_shape.cuh"
#include "warps.cuh"

struct Item {
    int first_token;     // the tile's first query token
    int split = 0;       // which of the `shares` of the tile's keys it has
    int shares = 1;
    int num_tokens;      // its query tokens
    int head_part;       // parts of all KV heads are numbered through; negative after the last item
    int first_position;  // of the first query token; if not CAUSAL the last key, for all of them
    int tile_begin;      // KV tiles from here
    int tile_end;        // to here are seen by some row
    int sequence;
    int kv_length;

    DEVICE int kv_head() const { return head_part / HEAD_PARTS; }

    // The part's first query head, counted from the KV head's first.
    DEVICE int first_head() const { return head_part % HEAD_PARTS * TILE_HEADS; }

    // The query head of a row of the tile, and whether the row has a query.
    DEVICE int query_head(int row) const { return kv_head() * GROUP + first_head() + row % TILE_HEADS; }
    DEVICE bool has_row(int row) const {
        if (GROUP % TILE_HEADS != 0 && first_head() + row % TILE_HEADS >= GROUP) return false;
        return row / TILE_HEADS < num_tokens;
    }

    // The first key that a row sees.
    DEVICE int first_key(const Parameters &p) const {
        return WINDOW ? max(first_position + 1 - p.window, 0) : 0;
    }

    DEVICE void write(u32 to) const {
        u32 tokens = SPLIT ? shares << 24 | split << 16 | num_tokens : num_tokens;
        store_shared(to, {(u32)first_token, tokens, (u32)head_part, (u32)first_position});
        store_shared(to + 16, {(u32)tile_begin, (u32)tile_end, (u32)sequence, (u32)kv_length});
    }

    DEVICE void read(u32 from) {
        u32 x[4];
        load_shared(x, from);
        first_token = x[0], num_tokens = x[1], head_part = x[2], first_position = x[3];
        if (SPLIT) {
            shares = (u32)num_tokens >> 24;
            split = num_tokens >> 16 & 0xff;
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
DEVICE bool shared_part_of_tile(const Parameters &p, int tile, int lane, int &sequence, int &first_tile) {
    int before = 0;
    for (int base = 0; base < p.num_sequences; base += 32) {
        int own = base + lane, tiles = 0;
        if (own < p.num_sequences)
            tiles = (p.query_starts[own + 1] - p.query_starts[own] + TILE_TOKENS - 1) / TILE_TOKENS;
        int end = before + sum_up_to(tiles, lane);
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

// A sequence's queries.
struct Queries {
    int sequence, start, count, kv_length;

    DEVICE int tiles() const { return (count + TILE_TOKENS - 1) / TILE_TOKENS; }
    DEVICE int shares(const Parameters &p) const { return SPLIT ? shares_of(p, kv_length) : 1; }
    DEVICE int items(const Parameters &p) const { return tiles() * shares(p); }

    // Who has more is drawn first: of the tiles of keys that the first tile sees, the fewest of all, and where these
    // are as many, as prompts' are, of those that the last one sees. Under a window, none is taken to see more. Of
    // shares, which are drawn one by one, a share's.
    DEVICE u32 keys(const Parameters &p) const {
        int least = kv_length - max(0, count - TILE_TOKENS), most = kv_length;
        if (WINDOW) least = min(least, p.window), most = min(most, p.window);
        return tiles_of(least, shares(p)) << 16 | tiles_of(most, shares(p));
    }

    DEVICE static u32 tiles_of(int keys, int shares) {
        return min((max(0, keys) + KV_TILE * shares - 1) / (KV_TILE * shares), 0xffff);
    }

    // Another lane's, by the whole warp.
    DEVICE Queries of_lane(int lane) const {
        return {__shfl_sync(0xffffffff, sequence, lane), __shfl_sync(0xffffffff, start, lane),
                __shfl_sync(0xffffffff, count, lane), __shfl_sync(0xffffffff, kv_length, lane)};
    }

    DEVICE static Queries of(const Parameters &p, int sequence) {
        int start = p.query_starts[sequence];
        return {sequence, start, p.query_starts[sequence + 1] - start, p.kv_lengths[sequence]};
    }
};

// In which order query tiles are drawn, each as often as it has shares: sequences whose first tile sees more keys, or
// has larger shares of them, before others, and of each its last tiles, which see the most, before its first ones.
// So it is where up to `MOST_SORTED` have queries that are not passed over. Of up to 32, and none passed over, a warp
// finds it out in its registers, else the whole program in shared memory. Of more, tiles are numbered through, those
// that are passed over too, each as if it had `splits` shares, and drawn from the last one on, or from both ends by
// turns.
struct Order {
    int num_items;  // of one head or part
    bool in_registers;
    int count = 0;  // of the sequences that are sorted in shared memory

    Queries own{};         // the lane's sequence, and
    int own_items = 0;     // the items that it has,
    int items_before = 0;  // and that are drawn before its first one, if that is in registers

    DEVICE explicit Order(const Parameters &p)
        : num_items(p.num_tiles * (SPLIT ? p.splits : 1)),
          in_registers(CAUSAL && p.num_sequences <= 32 && p.short_queries == 0) {}
    DEVICE bool in_shared() const { return CAUSAL && !in_registers; }

    // By a whole warp, as `find`.
    DEVICE void sort_in_registers(const Parameters &p, int lane) {
        if (lane < p.num_sequences) own = Queries::of(p, lane);
        u32 keys = own.keys(p);
        own_items = own.items(p);  // 0 where the lane has no sequence, so that nothing comes of its keys
#pragma unroll 1
        for (int base = 0; base < p.num_sequences; base += 8)
#pragma unroll
            for (int other = base; other < base + 8; ++other) {
                u32 others = __shfl_sync(0xffffffff, keys, other);
                int more = __shfl_sync(0xffffffff, own_items, other);
                if (others > keys || (others == keys && other > lane)) items_before += more;
            }
        num_items = __reduce_add_sync(0xffffffff, own_items);
    }

    // Before the program's next barrier; `sorted` are two words of shared memory: of those that are sorted, how many
    // these are and their items.
    DEVICE void clear(const Shared &shared, u32 *sorted, int thread) const {
        if (thread < MOST_SORTED) store_shared(shared.unsorted(thread), {0, 0, 0, 0});
        if (thread == 0) sorted[0] = sorted[1] = 0;
    }

    // By the whole program, after `clear`. What is unsorted lies where the TMA brings queries later.
    DEVICE void sort_in_shared(const Parameters &p, const Shared &shared, u32 *sorted, int thread) {
        for (int base = 0; base < p.num_sequences; base += blockDim.x) {
            Queries queries{};
            if (base + thread < p.num_sequences) queries = Queries::of(p, base + thread);
            bool is_drawn = queries.count > p.short_queries;
            u32 drawn = __ballot_sync(0xffffffff, is_drawn), place = 0;
            if (drawn && thread % 32 == 0) place = atomicAdd(sorted, __popc(drawn));
            place = __shfl_sync(0xffffffff, place, 0);
            if (place + __popc(drawn) > MOST_SORTED) break;  // too many, whatever comes
            place += __popc(drawn & ((1u << thread % 32) - 1));
            if (is_drawn)
                store_shared(shared.unsorted(place),
                             {(u32)queries.sequence, queries.keys(p), (u32)queries.items(p), 0});
        }
        fence_for_tma();
        __syncthreads();
        if (*sorted > MOST_SORTED) return;
        count = *sorted;
        if (thread < count) rank(shared, sorted, thread);
        __syncthreads();
        num_items = sorted[1];
    }

    // Count the sequences and items that are drawn before those of one; of sequences with as many keys the last one
    // is first.
    DEVICE void rank(const Shared &shared, u32 *sorted, int place) const {
        u32 own[4];
        load_shared(own, shared.unsorted(place));
        u64 keys = (u64)own[1] << 32 | own[0];
        u32 before = 0, items = own[2];
#pragma unroll 1
        for (int base = 0; base < count; base += 8)  // and some more, whose keys and items are zero
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                u32 other[4];
                load_shared(other, shared.unsorted(base + i));
                if (((u64)other[1] << 32 | other[0]) <= keys) continue;
                ++before;
                items += other[2];
            }
        store_shared(shared.rank(before), {items, own[0]});
        atomicAdd(sorted + 1, own[2]);
    }

    // The queries of the tile that is drawn as number `drawn`, which of their tiles it is, and which of its shares;
    // false if they have none such.
    DEVICE bool find(const Parameters &p, const Shared &shared, int drawn, int lane, Queries &queries, int &step,
                     int &split) const {
        if (in_registers) {
            int back = drawn - items_before;  // from the last one
            int owner = __ffs(__ballot_sync(0xffffffff, 0 <= back && back < own_items)) - 1;
            queries = own.of_lane(owner);
            divide(p, queries, __shfl_sync(0xffffffff, back, owner), step, split);
            return true;
        }
        if (count) {
            int before = 0;  // sequences
            u32 end[2];
            for (u32 done = 0xffffffff; done == 0xffffffff;) {
                load_shared(end, shared.rank(before + lane));
                done = __ballot_sync(0xffffffff, before + lane < count && (int)end[0] <= drawn);
                before += __popc(done);
            }
            load_shared(end, shared.rank(before));
            queries = Queries::of(p, end[1]);
            divide(p, queries, drawn - ((int)end[0] - queries.items(p)), step, split);
            return true;
        }
        int sequence, first_tile, tile = drawn;
        if (CAUSAL) {
            split = SPLIT ? drawn % p.splits : 0;
            if (SPLIT) drawn /= p.splits;
            int back = p.from_both_ends ? drawn / 2 : drawn;
            tile = p.from_both_ends && drawn % 2 ? drawn / 2 : p.num_tiles - 1 - back;
            sequence = sequence_of_tile(p, tile, lane);
            first_tile = p.query_starts[sequence] / TILE_TOKENS + sequence;
        } else if (!shared_part_of_tile(p, tile, lane, sequence, first_tile)) {
            // Parts of shared blocks are cut for about an item a program. One whose first number had none would begin
            // later, having to draw another.
            return false;
        }
        queries = Queries::of(p, sequence);
        step = tile - first_tile;
        return step < queries.tiles() && queries.count > p.short_queries && split < queries.shares(p);
    }

    // Of the item that is drawn when `back` of the same sequence are, the tile and the share.
    DEVICE static void divide(const Parameters &p, const Queries &queries, int back, int &step, int &split) {
        int shares = queries.shares(p);
        step = queries.tiles() - 1 - back / shares;
        split = back % shares;
    }
};

// Find the item that is drawn as number `index`; false if it has no queries.
DEVICE bool find_item(const Parameters &p, const Shared &shared, const Order &order, int index, int lane,
                      Item &item) {
    int section_parts = p.section_heads * HEAD_PARTS, section_items = section_parts * order.num_items;
    int section = index / section_items;
    int rest = index - section * section_items;
    int drawn = rest / section_parts, step;
    item.head_part = section * section_parts + rest - drawn * section_parts;
    Queries queries;
    if (!order.find(p, shared, drawn, lane, queries, step, item.split)) return false;
    item.shares = queries.shares(p);
    int first_step = step * TILE_TOKENS;
    item.sequence = queries.sequence;
    item.kv_length = queries.kv_length;
    item.first_token = queries.start + first_step;
    item.num_tokens = min(TILE_TOKENS, queries.count - first_step);
    item.first_position = item.kv_length - (CAUSAL ? queries.count - first_step : 1);
    int seen = item.first_position + (CAUSAL ? item.num_tokens : 1);
    seen = item.kv_length > 0 ? max(seen, 0) : 0;
    item.tile_end = (seen + KV_TILE - 1) / KV_TILE;
    item.tile_begin = min(item.first_key(p) / KV_TILE, item.tile_end);
    if (SPLIT) {
        int tiles = item.tile_end - item.tile_begin, begin = item.tile_begin;
        item.tile_begin = begin + tiles * item.split / item.shares;
        item.tile_end = begin + tiles * (item.split + 1) / item.shares;
    }
    return true;
}
