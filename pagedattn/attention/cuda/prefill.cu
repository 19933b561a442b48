// Prefill, chunks and mixed batches: see prefill.py for the schedule.
//
// Shared memory holds rings of query, K and V tiles, filled by the TMA with the 128-byte swizzle:
// pieces of 8 rows by 64 columns (1 KiB) are what the matrix units read. K is read with its
// columns innermost along the product's depth ("K-major"), V with them along its width
// ("MN-major"), so that neither is transposed.
//
// Macros: HEAD_SIZE, BLOCK_SIZE, GROUP (query heads of a KV head), KV_TILE, QUERY_STAGES, BF16,
// and the switches WINDOW, SOFT_CAP, ALIBI, SINKS, LSE.

#include "hopper.cuh"

struct Parameters {
    TensorMap query;  // columns, heads of a group, tokens, groups
    TensorMap key;    // see `load_block`
    TensorMap value;
    void *out;
    float *lse;
    const int *tables;
    const int *kv_lengths;
    const int *query_starts;
    const float *alibi_slopes;
    const float *sinks;
    u32 *tickets;  // [2], zeros before and after: work items drawn, programs that are done
    i64 out_token_stride;
    i64 out_head_stride;
    i64 table_stride;
    float scale_log2;  // to scores in units of log2; under a soft cap, to twice tanh's argument
    float cap_log2;
    int window;
    int num_sequences;
    int num_kv_heads;
    int num_tiles;          // upper bound of the query tiles
    int section_heads;      // KV heads that are worked on together
    int octets_of_a_block;  // block stride in units of 8 tokens
    int from_both_ends;     // draw tiles from both ends of the batch by turns
};

constexpr int ROWS = 128;  // of a query tile: tokens times heads of a group
constexpr int TILE_TOKENS = ROWS / GROUP;
constexpr int HALVES = (HEAD_SIZE + 63) / 64;  // pieces of 64 columns; zeros fill the last
constexpr int STAGES = 2;
constexpr int SCORES = KV_TILE / 2;   // a thread's
constexpr int OUTPUTS = HALVES * 32;  // a thread's
constexpr int PIECE = 1024;           // bytes of 8 rows by 64 columns
constexpr int QUERY_BYTES = ROWS * HALVES * 128;
constexpr int TILE_BYTES = KV_TILE * HALVES * 128;
constexpr int LOAD_TOKENS = BLOCK_SIZE < KV_TILE ? BLOCK_SIZE : KV_TILE;  // of one TMA instruction
constexpr int LOADS = KV_TILE / LOAD_TOKENS;
constexpr int LOAD_BYTES = LOAD_TOKENS * HALVES * 128;

// Where the pieces of a K or V tile lie. One instruction brings all columns of some tokens; where
// the last columns are missing in memory, it brings 64, and the columns lie apart.
constexpr bool WHOLE_ROWS = HEAD_SIZE % 64 == 0;
constexpr int OCTET_STRIDE = WHOLE_ROWS ? HALVES * PIECE : PIECE;       // to the next 8 tokens
constexpr int HALF_STRIDE = WHOLE_ROWS ? PIECE : KV_TILE / 8 * PIECE;  // to the next 64 columns

constexpr int CONSUMER_WARPS = 8;
constexpr int LOADER_WARPS = 2;

// ---- shared memory

struct Shared {
    u32 base;

    DEVICE u32 query(int stage) const { return base + stage * QUERY_BYTES; }
    DEVICE u32 key(int stage) const {
        return base + QUERY_STAGES * QUERY_BYTES + stage * TILE_BYTES;
    }
    DEVICE u32 value(int stage) const { return key(STAGES + stage); }
    DEVICE u32 item(int stage) const { return key(2 * STAGES) + stage * 32; }

    DEVICE u32 barrier(int index) const { return item(QUERY_STAGES) + index * 8; }
    DEVICE u32 key_full(int stage) const { return barrier(stage); }
    DEVICE u32 key_empty(int stage) const { return barrier(STAGES + stage); }
    DEVICE u32 value_full(int stage) const { return barrier(2 * STAGES + stage); }
    DEVICE u32 value_empty(int stage) const { return barrier(3 * STAGES + stage); }
    DEVICE u32 value_arrived() const { return barrier(4 * STAGES); }
    DEVICE u32 item_full(int stage) const { return barrier(4 * STAGES + 1 + stage); }
    DEVICE u32 query_full(int stage) const { return item_full(QUERY_STAGES + stage); }
    DEVICE u32 query_empty(int stage) const { return item_full(2 * QUERY_STAGES + stage); }
};

// A place in a ring of stages, and the parity of its barriers there.
struct Place {
    int stage;
    u32 parity;

    template <int COUNT>
    DEVICE void next() {
        if (++stage == COUNT) {
            stage = 0;
            parity ^= 1;
        }
    }
};

DEVICE void fence_for_tma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// True in one lane, in a way that lets the compiler see that one lane runs what depends on it.
DEVICE bool elected() {
    u32 chosen;
    asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}"
                 : "=r"(chosen));
    return chosen != 0;
}

// ---- work items: a query tile of one KV head

struct Item {
    int first_token;     // the tile's first query token
    int num_tokens;      // its query tokens
    int head;            // KV head; negative after the last item
    int first_position;  // place of the first query token in its sequence
    int tile_begin;      // KV tiles from here
    int tile_end;        // to here are seen by some row
    int sequence;
    int kv_length;

    // The first key that a row sees.
    DEVICE int first_key(const Parameters &p) const {
        return WINDOW ? max(first_position + 1 - p.window, 0) : 0;
    }

    DEVICE void write(u32 to) const {
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(first_token),
                     "r"(num_tokens), "r"(head), "r"(first_position)
                     : "memory");
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to + 16), "r"(tile_begin),
                     "r"(tile_end), "r"(sequence), "r"(kv_length)
                     : "memory");
    }

    DEVICE void read(u32 from) {
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(first_token), "=r"(num_tokens), "=r"(head), "=r"(first_position)
                     : "r"(from)
                     : "memory");
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(tile_begin), "=r"(tile_end), "=r"(sequence), "=r"(kv_length)
                     : "r"(from + 16)
                     : "memory");
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

// Find the item that is drawn as number `index`; false if it has no queries.
DEVICE bool find_item(const Parameters &p, int index, int lane, Item &item) {
    int section_items = p.section_heads * p.num_tiles;
    int section = index / section_items;
    int rest = index - section * section_items;
    int tile = rest / p.section_heads;
    item.head = section * p.section_heads + rest - tile * p.section_heads;
    // a sequence's last tiles see the most keys: they go first
    int back = p.from_both_ends ? tile / 2 : tile;
    tile = p.from_both_ends && tile % 2 ? tile / 2 : p.num_tiles - 1 - back;
    int sequence = sequence_of_tile(p, tile, lane);
    int start = p.query_starts[sequence];
    int num_queries = p.query_starts[sequence + 1] - start;
    int first_step = (tile - (start / TILE_TOKENS + sequence)) * TILE_TOKENS;
    if (first_step >= num_queries) return false;
    item.sequence = sequence;
    item.kv_length = p.kv_lengths[sequence];
    item.first_token = start + first_step;
    item.num_tokens = min(TILE_TOKENS, num_queries - first_step);
    item.first_position = item.kv_length - num_queries + first_step;
    int seen = item.kv_length > 0 ? max(item.first_position + item.num_tokens, 0) : 0;
    item.tile_end = (seen + KV_TILE - 1) / KV_TILE;
    item.tile_begin = min(item.first_key(p) / KV_TILE, item.tile_end);
    return true;
}

// ---- producers

DEVICE void load_query(const Parameters &p, u32 to, u32 barrier, const Item &item) {
    barrier_arrive_expect(barrier, HALVES * TILE_TOKENS * GROUP * 128);
#pragma unroll
    for (int half = 0; half < HALVES; ++half)
        asm volatile(
            "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
            " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to + half * ROWS * 128),
            "l"(&p.query), "r"(barrier), "r"(half * 64), "r"(0), "r"(item.first_token),
            "r"(item.head)
            : "memory");
}

// Bring LOAD_TOKENS tokens. The tensor's dimensions: 64 columns, 8 tokens, pieces of 64 columns,
// octets of tokens, heads; or all columns, 8 tokens, octets, heads.
DEVICE void load_block(const TensorMap *map, u32 to, u32 barrier, int octet, int head) {
    if constexpr (WHOLE_ROWS) {
        asm volatile(
            "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
            " [%0], [%1, {%3, %3, %3, %4, %5}], [%2];" ::"r"(to),
            "l"(map), "r"(barrier), "r"(0), "r"(octet), "r"(head)
            : "memory");
    } else {
#pragma unroll
        for (int half = 0; half < HALVES; ++half)
            asm volatile(
                "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to + half * HALF_STRIDE),
                "l"(map), "r"(barrier), "r"(half * 64), "r"(0), "r"(octet), "r"(head)
                : "memory");
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
    constexpr int LOAD_STRIDE = LOAD_TOKENS / 8 * OCTET_STRIDE;
    int octets[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; ++i) octets[i] = __shfl_sync(0xffffffff, lane_octet, i);
    if (begin == 0 && end == LOADS) {
        if (elected()) {
            barrier_arrive_expect(barrier, TILE_BYTES);
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
        asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory");
    }
}

// Draw work items, publish them and load their queries.
DEVICE void schedule(const Parameters &p, const Shared &shared, int lane) {
    Place place{0, 1};
    int num_items = p.num_tiles * p.num_kv_heads;
    int index = blockIdx.x;
    Item item;
    while (index < num_items) {
        u32 ticket = 0;
        if (lane == 0) ticket = atomicAdd(p.tickets, 1);
        if (find_item(p, index, lane, item)) {
            barrier_wait(shared.query_empty(place.stage), place.parity);
            if (elected()) {
                item.write(shared.item(place.stage));
                barrier_arrive(shared.item_full(place.stage));
                load_query(p, shared.query(place.stage), shared.query_full(place.stage), item);
            }
            place.next<QUERY_STAGES>();
        }
        index = gridDim.x + __shfl_sync(0xffffffff, ticket, 0);
    }
    barrier_wait(shared.query_empty(place.stage), place.parity);
    if (lane == 0) {
        item.head = -1;
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
        __syncwarp();
        if (lane == 0) barrier_arrive(shared.query_empty(item_place.stage));
        item_place.next<QUERY_STAGES>();
        if (item.head < 0) break;
        const int *table = p.tables + item.sequence * p.table_stride;
        int first_key = item.first_key(p);
        int tile = item.tile_end - 1;
        int octet = octet_of_load(p, item, table, tile, first_key, lane);
        for (; tile >= item.tile_begin; --tile) {
            int next_octet = 0;
            if (tile > item.tile_begin)
                next_octet = octet_of_load(p, item, table, tile - 1, first_key, lane);
            u32 to = OF_VALUES ? shared.value(place.stage) : shared.key(place.stage);
            u32 full = OF_VALUES ? shared.value_full(place.stage) : shared.key_full(place.stage);
            barrier_wait(OF_VALUES ? shared.value_empty(place.stage)
                                   : shared.key_empty(place.stage),
                         place.parity);
            place.next<STAGES>();
            int held = min(item.kv_length - tile * KV_TILE, KV_TILE);
            int hidden = WINDOW ? max(first_key - tile * KV_TILE, 0) : 0;
            int begin = hidden / LOAD_TOKENS;
            int end = (held + LOAD_TOKENS - 1) / LOAD_TOKENS;
            if (!OF_VALUES || (hidden == 0 && held == KV_TILE)) {
                load_tile(map, to, full, octet, begin, end, item.head);
            } else {
                load_tile(map, to, shared.value_arrived(), octet, begin, end, item.head);
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

// ---- matrix products of a warpgroup: 64 rows; a thread has of each row r = lane / 4 and r + 8 of
// its warp's 16 the columns 8 j + 2 (lane % 4) + {0, 1}, four numbers for each j

#define REGISTERS_32                                                                               \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,"  \
    "%25,%26,%27,%28,%29,%30,%31}"
#define REGISTERS_64                                                                               \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,"  \
    "%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
    "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"
#define SUMS_4(d, i) "+f"((d)[i]), "+f"((d)[i + 1]), "+f"((d)[i + 2]), "+f"((d)[i + 3])
#define SUMS_16(d, i) SUMS_4(d, i), SUMS_4(d, i + 4), SUMS_4(d, i + 8), SUMS_4(d, i + 12)
#define SUMS_32(d) SUMS_16(d, 0), SUMS_16(d, 16)
#define SUMS_64(d) SUMS_32(d), SUMS_16(d, 32), SUMS_16(d, 48)
#if BF16
#define TYPES "f32.bf16.bf16"
#else
#define TYPES "f32.f16.f16"
#endif

DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
DEVICE void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keep the compiler from moving uses of sums across a wait for them.
template <int COUNT>
DEVICE void pin(float (&sums)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// Where a factor lies in shared memory, swizzled by 128 bytes, and the bytes between its pieces.
DEVICE u64 descriptor(u32 address, u32 leading_stride, u32 stride) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)(leading_stride >> 4) << 16 |
           (u64)(stride >> 4) << 32 | 1ull << 62;
}

// d [64, KV_TILE] = (add ? d : 0) + a [64, 16] b [KV_TILE, 16] transposed
DEVICE void multiply_scores(float (&d)[64], u64 a, u64 b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16." TYPES " " REGISTERS_64
                 ", %64, %65, p, 1, 1, 0, 0;}\n"
                 : SUMS_64(d)
                 : "l"(a), "l"(b), "r"(add));
}

DEVICE void multiply_scores(float (&d)[32], u64 a, u64 b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16." TYPES " " REGISTERS_32
                 ", %32, %33, p, 1, 1, 0, 0;}\n"
                 : SUMS_32(d)
                 : "l"(a), "l"(b), "r"(add));
}

// d [64, 128 or 64] += a [64, 16], in registers, b [16, 128 or 64]
DEVICE void multiply_values_128(float *d, const u32 *a, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16." TYPES " " REGISTERS_64
                 ", {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
                 : SUMS_64(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

DEVICE void multiply_values_64(float *d, const u32 *a, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16." TYPES " " REGISTERS_32
                 ", {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
                 : SUMS_32(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// ---- consumers

DEVICE u32 pack(float low, float high) {
    return BF16 ? pack_bf16(low, high) : pack_f16(low, high);
}

// Bytes of a swizzled row's 16-byte chunk, in a tile whose pieces of 64 columns lie apart.
DEVICE u32 chunk_of_row(int row, int chunk) {
    return chunk / 8 * (ROWS * 128) + row * 128 + ((chunk % 8) ^ (row % 8)) * 16;
}

struct Consumer {
    const Parameters &p;
    const Shared &shared;
    int lane;
    int warp_row;  // first of the warp's 16 rows of the tile
    Place key, value;
    float scores[SCORES];
    float outputs[OUTPUTS];
    u32 weights[SCORES / 2];
    float peak[2];   // of each row: the largest score, before or after scaling as `scale` says
    float total[2];  // this thread's part of the sum of weights
    float slope[2];  // ALiBi, in units of log2

    // Under these, scores are brought to units of log2 before the softmax.
    static constexpr bool SCALED_EARLY = SOFT_CAP || ALIBI;

    DEVICE float scale() const { return SCALED_EARLY ? 1.0f : p.scale_log2; }

    DEVICE void start_item(const Item &item) {
#pragma unroll
        for (int i = 0; i < OUTPUTS; ++i) outputs[i] = 0.0f;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            peak[i] = MINUS_INFINITY;
            total[i] = 0.0f;
            int row = warp_row + lane / 4 + 8 * i;
            if (ALIBI && row < TILE_TOKENS * GROUP)
                slope[i] = p.alibi_slopes[item.head * GROUP + row % GROUP] * LOG2_E;
        }
    }

    // Let a stage be filled anew: this warp has read it.
    DEVICE void release(u32 empty) {
        if (lane == 0) barrier_arrive(empty);
    }

    DEVICE void issue_scores(u64 query) {
        u64 keys = descriptor(shared.key(key.stage), 16, OCTET_STRIDE);
        products_begin();
#pragma unroll
        for (int step = 0; step < HEAD_SIZE / 16; ++step) {
            int half = step / 4, inside = step % 4 * 32;
            multiply_scores(scores, query + (half * ROWS * 128 + inside) / 16,
                            keys + (half * HALF_STRIDE + inside) / 16, step > 0);
        }
        products_end();
    }

    DEVICE void issue_outputs() {
        u64 values = descriptor(shared.value(value.stage), HALF_STRIDE, OCTET_STRIDE);
        products_begin();
#pragma unroll
        for (int step = 0; step < KV_TILE / 16; ++step) {
            u64 rows = values + step * 2 * OCTET_STRIDE / 16;
#pragma unroll
            for (int half = 0; half < HALVES;) {
                if (HALVES % 2 == 0) {
                    multiply_values_128(outputs + half * 32, weights + 4 * step,
                                        rows + half * HALF_STRIDE / 16);
                    half += 2;
                } else {
                    multiply_values_64(outputs + half * 32, weights + 4 * step,
                                       rows + half * HALF_STRIDE / 16);
                    half += 1;
                }
            }
        }
        products_end();
    }

    // Scores to weights; earlier sums must be multiplied by `decay`. `own` is each row's own key,
    // counted from this thread's first column.
    template <bool MASKED>
    DEVICE void softmax(const int (&own)[2], float (&decay)[2]) {
        if (SCALED_EARLY) {
#pragma unroll
            for (int i = 0; i < SCORES; ++i) {
                float score = scores[i] * p.scale_log2;
                if (SOFT_CAP) {  // cap tanh(x) = cap - 2 cap / (exp(2 x) + 1)
                    score = exp2_of(score) + 1.0f;
                    score = p.cap_log2 - __fdividef(2.0f * p.cap_log2, score);
                }
                int column = i / 4 * 8 + i % 2, row = i % 4 / 2;
                if (ALIBI) score += slope[row] * (column - own[row]);
                scores[i] = score;
            }
        }
        if (MASKED) {
#pragma unroll
            for (int i = 0; i < SCORES; ++i) {
                int column = i / 4 * 8 + i % 2, row = i % 4 / 2;
                bool hidden = column > own[row] || (WINDOW && column <= own[row] - p.window);
                if (hidden) scores[i] = MINUS_INFINITY;
            }
        }
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float even = scores[2 * row], odd = scores[2 * row + 1];
#pragma unroll
            for (int i = 4; i < SCORES; i += 4) {
                even = fmaxf(even, scores[i + 2 * row]);
                odd = fmaxf(odd, scores[i + 2 * row + 1]);
            }
            float highest = fmaxf(even, odd);
            highest = fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, 2));
            highest = fmaxf(highest, peak[row]);
            // -inf - -inf is NaN: a row without keys so far is shifted by 0 instead
            float shift = MASKED && highest == MINUS_INFINITY ? 0.0f : highest * scale();
            decay[row] = exp2_of(peak[row] * scale() - shift);
            peak[row] = highest;
            even = odd = 0.0f;
#pragma unroll
            for (int i = 2 * row; i < SCORES; i += 4) {
                scores[i] = exp2_of(scores[i] * scale() - shift);
                scores[i + 1] = exp2_of(scores[i + 1] * scale() - shift);
                even += scores[i];
                odd += scores[i + 1];
            }
            total[row] = total[row] * decay[row] + (even + odd);
        }
    }

    DEVICE void pack_weights() {
#pragma unroll
        for (int i = 0; i < SCORES / 2; ++i)
            weights[i] = pack(scores[2 * i], scores[2 * i + 1]);
    }

    // The item's first scores and weights.
    DEVICE void first(u64 query, const int (&own)[2]) {
        float decay[2];
        barrier_wait(shared.key_full(key.stage), key.parity);
        pin(scores);
        issue_scores(query);
        wait_for_products<0>();
        pin(scores);
        release(shared.key_empty(key.stage));
        key.next<STAGES>();
        softmax<true>(own, decay);
        pack_weights();
    }

    // The next tile's scores beside the last tile's outputs, then the next tile's weights.
    template <bool MASKED>
    DEVICE void next(u64 query, const int (&own)[2]) {
        float decay[2];
        barrier_wait(shared.key_full(key.stage), key.parity);
        pin(scores);
        pin(outputs);
        issue_scores(query);
        barrier_wait(shared.value_full(value.stage), value.parity);
        issue_outputs();
        wait_for_products<1>();
        pin(scores);
        release(shared.key_empty(key.stage));
        key.next<STAGES>();
        softmax<MASKED>(own, decay);
        wait_for_products<0>();
        pin(outputs);
        release(shared.value_empty(value.stage));
        value.next<STAGES>();
        pack_weights();
#pragma unroll
        for (int i = 0; i < OUTPUTS; ++i) outputs[i] *= decay[i % 4 / 2];
    }

    // The last tile's outputs.
    DEVICE void last() {
        barrier_wait(shared.value_full(value.stage), value.parity);
        pin(outputs);
        issue_outputs();
        wait_for_products<0>();
        pin(outputs);
        release(shared.value_empty(value.stage));
        value.next<STAGES>();
    }

    // Read nothing of an item whose rows are all the other warpgroup's.
    DEVICE void pass(const Item &item) {
        for (int tile = item.tile_begin; tile < item.tile_end; ++tile) {
            barrier_wait(shared.key_full(key.stage), key.parity);
            release(shared.key_empty(key.stage));
            key.next<STAGES>();
            barrier_wait(shared.value_full(value.stage), value.parity);
            release(shared.value_empty(value.stage));
            value.next<STAGES>();
        }
    }

    DEVICE void attend(const Item &item, u64 query) {
        int row = warp_row + lane / 4;
        // each row's own key, counted from this thread's first column of tile 0
        int position[2] = {item.first_position + row / GROUP - lane % 4 * 2,
                           item.first_position + (row + 8) / GROUP - lane % 4 * 2};
        int own[2];
        auto go_to = [&](int tile) {
            own[0] = position[0] - tile * KV_TILE;
            own[1] = position[1] - tile * KV_TILE;
        };
        int tile = item.tile_end - 1;
        go_to(tile);
        first(query, own);
        int whole = max(item.first_position + 1, 0) / KV_TILE;  // tiles before it need no mask
        for (--tile; tile >= max(whole, item.tile_begin); --tile) {
            go_to(tile);
            next<true>(query, own);
        }
        int stop = item.tile_begin;
        if (WINDOW)  // the last row's window begins in the tile before `stop`
            stop = max(max(item.first_position + TILE_TOKENS - p.window + KV_TILE - 1, 0) / KV_TILE,
                       stop);
        for (; tile >= stop; --tile) {
            if (ALIBI) go_to(tile);
            next<false>(query, own);
        }
        if (WINDOW) {
            for (; tile >= item.tile_begin; --tile) {
                go_to(tile);
                next<true>(query, own);
            }
        }
        last();
    }

    // Divide by the sums of weights; write the log-sum-exp.
    DEVICE void finish(const Item &item) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float sum = total[i];
            sum += __shfl_xor_sync(0xffffffff, sum, 1);
            sum += __shfl_xor_sync(0xffffffff, sum, 2);
            int row = warp_row + lane / 4 + 8 * i;
            int token = row / GROUP, head = item.head * GROUP + row % GROUP;
            float highest = peak[i] * scale(), factor = 1.0f;
            if (SINKS && token < item.num_tokens) {
                float sink = p.sinks[head] * LOG2_E;
                float top = fmaxf(highest, sink);
                factor = exp2_of(highest - top);
                sum = sum * factor + exp2_of(sink - top);
                highest = top;
            }
            float inverse = sum > 0.0f ? factor / sum : 0.0f;
#pragma unroll
            for (int j = 2 * i; j < OUTPUTS; j += 4) {
                outputs[j] *= inverse;
                outputs[j + 1] *= inverse;
            }
            if (LSE && lane % 4 == 0 && token < item.num_tokens)
                p.lse[(i64)(item.first_token + token) * (p.num_kv_heads * GROUP) + head] =
                    sum > 0.0f ? (highest + log2_of(sum)) * LN_2 : MINUS_INFINITY;
        }
    }

    // Write the warp's rows by way of its part of the query tile, 16 bytes a lane.
    DEVICE void store(const Item &item, u32 tile) {
        int row = warp_row + lane % 16;
#pragma unroll
        for (int i = 0; i < HEAD_SIZE / 16; ++i) {
            const float *o = outputs + 8 * i;
            asm volatile(
                "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                    tile + chunk_of_row(row, 2 * i + lane / 16)),
                "r"(pack(o[0], o[1])), "r"(pack(o[2], o[3])), "r"(pack(o[4], o[5])),
                "r"(pack(o[6], o[7]))
                : "memory");
        }
        __syncwarp();
        constexpr int CHUNKS = HEAD_SIZE / 8;
#pragma unroll
        for (int i = lane; i < 16 * CHUNKS; i += 32) {
            int from_row = warp_row + i / CHUNKS, chunk = i % CHUNKS;
            u32 x, y, z, w;
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(x), "=r"(y), "=r"(z), "=r"(w)
                         : "r"(tile + chunk_of_row(from_row, chunk))
                         : "memory");
            int token = from_row / GROUP, head = item.head * GROUP + from_row % GROUP;
            if (token < item.num_tokens) {
                u16 *to = (u16 *)p.out + (item.first_token + token) * p.out_token_stride +
                          head * p.out_head_stride + chunk * 8;
                asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x), "r"(y),
                             "r"(z), "r"(w)
                             : "memory");
            }
        }
    }
};

DEVICE void consume(const Parameters &p, const Shared &shared, int warpgroup, int thread) {
    int lane = thread % 32;
    Place place{0, 0};
    Consumer consumer{p, shared, lane, warpgroup * 64 + thread / 32 * 16, {0, 0}, {0, 0}};
    for (;;) {
        Item item = wait_for_item(shared, place);
        if (item.head < 0) break;
        barrier_wait(shared.query_full(place.stage), place.parity);
        u32 tile = shared.query(place.stage);
        if (warpgroup * 64 < item.num_tokens * GROUP) {
            consumer.start_item(item);
            if (item.tile_begin < item.tile_end)
                consumer.attend(item, descriptor(tile + warpgroup * 64 * 128, 16, PIECE));
            consumer.finish(item);
            // all of the warpgroup have read the query: its place takes the output
            named_barrier(1 + warpgroup, 128);
            consumer.store(item, tile);
            fence_for_tma();
            __syncwarp();
        } else {
            consumer.pass(item);
        }
        if (lane == 0) barrier_arrive(shared.query_empty(place.stage));
        place.next<QUERY_STAGES>();
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
    prefill_kernel(const __grid_constant__ Parameters p) {
    // so aligned, it lies at a place that is known when this is compiled
    extern __shared__ __align__(PIECE) unsigned char memory[];
    Shared shared{shared_address(memory)};
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(shared.key_full(i), 1);
            barrier_init(shared.key_empty(i), CONSUMER_WARPS);
            barrier_init(shared.value_full(i), 1);
            barrier_init(shared.value_empty(i), CONSUMER_WARPS);
        }
        barrier_init(shared.value_arrived(), 1);
        for (int i = 0; i < QUERY_STAGES; ++i) {
            barrier_init(shared.item_full(i), 1);
            barrier_init(shared.query_full(i), 1);
            barrier_init(shared.query_empty(i), CONSUMER_WARPS + LOADER_WARPS);
        }
        barrier_init_fence();
    }
    __syncthreads();
    // the same in all lanes, as the compiler sees from the shuffle
    int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
    if (warpgroup == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        if (warp == 0)
            schedule(p, shared, lane);
        else if (warp == 1)
            load_tiles<false>(p, shared, lane);
        else if (warp == 2)
            load_tiles<true>(p, shared, lane);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        consume(p, shared, warpgroup - 1, threadIdx.x % 128);
    }
}
