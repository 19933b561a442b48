// Sizes, parameters and shared memory of the prefill kernel.
#pragma once
#include "prefetch.cuh"
#include "prefill_shares.cuh"
#include "trace.cuh"

// The soft cap of a score as an odd polynomial, see soft_cap.py.
template <int COUNT>
struct CapTerms {
    float largest;     // of a row's scores in a tile, as products give them; over e4m3 times the scale
    float least_peak;  // of its largest score so far, in units of log2
    float terms[COUNT];

    DEVICE float of(float score) const {
        float square = score * score, sum = terms[COUNT - 1];
#pragma unroll
        for (int i = COUNT - 2; i >= 0; --i) sum = sum * square + terms[i];
        return score * sum;
    }
};

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
    float *share_out;  // [splits, num_tokens, query heads, HEAD_SIZE] of who has more than one share, if SPLIT
    float *share_lse;  // and [splits, num_tokens, query heads]
    u32 *tickets;  // [2], zeros before and after: work items drawn, programs that are done
    i64 out_token_stride;
    i64 out_head_stride;
    i64 table_stride;
    float scale_log2;  // to scores in units of log2; under a soft cap, to twice tanh's argument
    float cap_log2;
    CapTerms<3> few_terms;
    CapTerms<5> all_terms;
    int window;
    int num_sequences;
    int num_kv_heads;
    int num_tiles;          // upper bound of the query tiles
    int section_heads;      // KV heads that are worked on together
    int octets_of_a_block;  // block stride in units of 8 tokens
    int from_both_ends;     // draw tiles from both ends of the batch by turns, if they are not sorted
    int num_tokens;         // of all queries
    int splits;             // shares of a tile's keys at most, an item each
    int share_tiles;        // see `shares_of`; as is `most_keys`, that a tile sees
    int most_keys;
    int short_queries;      // sequences of as many at most are passed over, if it is not 0
    int table_lines;        // of 128 bytes, that are asked for of each row of the block tables
    const float *key_scale;  // of a cache of e4m3, for each KV head; or null
    const float *value_scale;
};

constexpr bool HALF_PRODUCTS = FP8 || !BF16;  // products of float16, else of bfloat16

constexpr int ROWS = 64 * WARPGROUPS;  // of a query tile: tokens times heads of a group, or of a part of it
constexpr int TILE_HEADS = (GROUP + HEAD_PARTS - 1) / HEAD_PARTS;
constexpr int TILE_TOKENS = ROWS / TILE_HEADS;
static_assert((HEAD_PARTS - 1) * TILE_HEADS < GROUP && TILE_TOKENS > 0, "no part is empty, and a tile has one");
constexpr int HALVES = (HEAD_SIZE + 63) / 64;  // pieces of 64 columns; zeros fill the last
constexpr int STAGES = 2;
constexpr int SCORES = KV_TILE / 2;   // a thread's
constexpr int OUTPUTS = HALVES * 32;  // a thread's
constexpr int PIECE = 1024;           // bytes of 8 rows by 64 columns, of e4m3 by 128
constexpr int QUERY_BYTES = ROWS * HALVES * 128;
constexpr int LOAD_TOKENS = BLOCK_SIZE < KV_TILE ? BLOCK_SIZE : KV_TILE;  // of one TMA instruction
constexpr int LOADS = KV_TILE / LOAD_TOKENS;

// Tiles of e4m3 that are multiplied as they are lie in pieces of 8 rows by 128 columns, those of V turned
// around: a row is a column of the head, and has the tile's tokens.
constexpr int PIECES_OF_ROW = FP8_PRODUCTS ? (HEAD_SIZE + 127) / 128 : HALVES;
constexpr int KEY_BYTES = KV_TILE * PIECES_OF_ROW * 128;
constexpr int VALUE_BYTES = FP8_PRODUCTS ? HALVES * 64 * 128 : KEY_BYTES;
constexpr bool ARE_WIDENED = FP8 && !FP8_PRODUCTS;
constexpr int LOAD_BYTES = LOAD_TOKENS * (ARE_WIDENED ? HEAD_SIZE : PIECES_OF_ROW * 128);

// What the TMA fills: the tiles that are multiplied, or over e4m3 others, in rows of HEAD_SIZE bytes,
// which are widened from there to float16, for which heads of 64 leave room for two; or others of V alone,
// which are turned around.
constexpr int STORED_STAGES = FP8 ? (HEAD_SIZE <= 64 || FP8_PRODUCTS ? 2 : 1) : 0;
constexpr int STORED_BYTES = FP8_PRODUCTS ? KEY_BYTES : KV_TILE * HEAD_SIZE;
// Whether tiles of V, or of K, are filled there.
DEVICE constexpr bool goes_by_store(bool values) { return values ? FP8 : ARE_WIDENED; }
constexpr int LOADED_BYTES = LOADS * LOAD_BYTES;  // of a tile

// Where the pieces of a K or V tile lie. One instruction brings all columns of some tokens; where
// the last columns are missing in memory, or they are of e4m3, it brings 128 bytes, and the columns lie
// apart.
constexpr bool WHOLE_ROWS = HEAD_SIZE % 64 == 0 && !FP8_PRODUCTS;
constexpr int OCTET_STRIDE = WHOLE_ROWS ? HALVES * PIECE : PIECE;       // to the next 8 tokens
constexpr int HALF_STRIDE = WHOLE_ROWS ? PIECE : KV_TILE / 8 * PIECE;  // to the next 128 bytes

// Of a row's steps of 32 bytes in the product with K, over e4m3: those that are kept in registers, so
// that products read less of shared memory, which is busy with widening. With one more there are too few
// registers for the compiler to let a product run beside others. Outputs of heads of 256 leave none.
constexpr int STEPS = FP8_PRODUCTS ? (HEAD_SIZE + 31) / 32 : HEAD_SIZE / 16;
constexpr int QUERY_STEPS = !FP8 || HEAD_SIZE > 192 ? 0 : STEPS < 5 ? STEPS : 5;

constexpr int CONSUMER_WARPS = 4 * WARPGROUPS;
constexpr int FIRST_TURN = 1 + WARPGROUPS;  // of the named barriers by which warpgroups multiply in an order
constexpr int PREPARER_WARPS = FP8 ? 4 : 0;  // that widen K and V, or turn V around
constexpr int KEY_WARPS = ARE_WIDENED ? PREPARER_WARPS : 1;  // that bring a tile of K to where it is multiplied
constexpr int LOADER_WARPS = 2;
constexpr int MOST_SORTED = 192;  // sequences, in shared memory
static_assert(MOST_SORTED <= (1 + WARPGROUPS) * 128 && 16 * MOST_SORTED <= QUERY_BYTES, "a thread ranks one");
static_assert(MOST_SORTED % 32 == 0, "they are looked at by 8, and by 32");
// Tiles of keys that are left to be loaded of an item when the next one is drawn: as long as that takes.
constexpr int DRAWN_AHEAD = 2;

// All of a multiprocessor's 65,536 registers: few for those that load, as many for those that widen as
// their part of a tile needs, the rest for those that multiply. Multiples of 8.
constexpr int PRODUCER_REGISTERS = WARPGROUPS == 2 ? 40 : 32;
constexpr int PREPARER_REGISTERS = 56;
constexpr int CONSUMER_REGISTERS = FP8 ? 208 : WARPGROUPS == 2 ? 232 : 160;
static_assert(PRODUCER_REGISTERS + FP8 * PREPARER_REGISTERS + WARPGROUPS * CONSUMER_REGISTERS <= 65536 / 128,
              "as many as there are");

// ---- shared memory

struct Shared {
    u32 base;

    DEVICE u32 query(int stage) const { return base + stage * QUERY_BYTES; }
    DEVICE u32 key(int stage) const {
        return base + QUERY_STAGES * QUERY_BYTES + stage * KEY_BYTES;
    }
    DEVICE u32 value(int stage) const { return key(STAGES) + stage * VALUE_BYTES; }
    DEVICE u32 stored(bool values, int stage) const {
        return value(STAGES) + ((values && ARE_WIDENED) * STORED_STAGES + stage) * STORED_BYTES;
    }
    DEVICE u32 item(int stage) const { return stored(true, STORED_STAGES) + stage * 32; }

    DEVICE u32 barrier(int index) const { return item(QUERY_STAGES) + index * 8; }
    DEVICE u32 key_full(int stage) const { return barrier(stage); }
    DEVICE u32 key_empty(int stage) const { return barrier(STAGES + stage); }
    DEVICE u32 value_full(int stage) const { return barrier(2 * STAGES + stage); }
    DEVICE u32 value_empty(int stage) const { return barrier(3 * STAGES + stage); }
    DEVICE u32 value_arrived() const { return barrier(4 * STAGES); }
    DEVICE u32 item_full(int stage) const { return barrier(4 * STAGES + 1 + stage); }
    DEVICE u32 query_full(int stage) const { return item_full(QUERY_STAGES + stage); }
    DEVICE u32 query_empty(int stage) const { return item_full(2 * QUERY_STAGES + stage); }
    DEVICE u32 stored_full(bool values, int stage) const {
        return item_full(3 * QUERY_STAGES + values * STORED_STAGES + stage);
    }
    DEVICE u32 stored_empty(bool values, int stage) const {
        return stored_full(true, STORED_STAGES + values * STORED_STAGES + stage);
    }

    DEVICE u32 nearly_loaded() const { return stored_empty(true, STORED_STAGES); }

    // Of the sequences that are sorted: how many these are and their items; of each rank the items up to its
    // sequence's end, and the sequence; and before that is known, where queries come later, what it is found out from.
    DEVICE u32 sorted() const { return nearly_loaded() + 8; }
    DEVICE u32 rank(int rank) const { return sorted() + 8 + rank * 8; }
    DEVICE u32 unsorted(int place) const { return base + place * 16; }

    // The ring of K or V that the TMA fills.
    DEVICE u32 loaded(bool values, int stage) const {
        return goes_by_store(values) ? stored(values, stage) : values ? value(stage) : key(stage);
    }
    DEVICE u32 loaded_full(bool values, int stage) const {
        return goes_by_store(values) ? stored_full(values, stage) : values ? value_full(stage) : key_full(stage);
    }
    DEVICE u32 loaded_empty(bool values, int stage) const {
        return goes_by_store(values) ? stored_empty(values, stage) : values ? value_empty(stage) : key_empty(stage);
    }
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
