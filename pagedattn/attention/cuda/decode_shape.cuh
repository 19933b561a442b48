// Sizes and parameters of the decode kernel.
#pragma once
#include "prefetch.cuh"
#include "trace.cuh"

constexpr int CHUNKS_OF_16 = HEAD_SIZE / 16;
constexpr int ROW_BYTES = HEAD_SIZE * KV_BYTES;
// Bytes of a row that lie together in shared memory: what the TMA's swizzle spans, or whole rows
// without one where that would be 32 bytes. Eight such rows meet in the same banks by twos, which
// costs less than moving 32 bytes at a time. Those rows follow each other, and come as LINES of 128 bytes if
// they do so in memory too.
constexpr int SPAN = ROW_BYTES % 128 == 0 ? 128 : ROW_BYTES % 64 == 0 ? 64 : ROW_BYTES;
constexpr int SWIZZLE = SPAN == ROW_BYTES && SPAN % 64 ? 16 : SPAN;  // 16: none
static_assert(!LINES || SWIZZLE == 16, "what is swizzled comes by rows");
// where the TMA would need an instruction for each token, the producer's lanes copy 16 bytes each
constexpr bool GATHER = BLOCK_SIZE == 1;
constexpr int BOX_TOKENS = BLOCK_SIZE < TILE && !GATHER ? BLOCK_SIZE : TILE;
constexpr int BOX_BYTES = BOX_TOKENS * ROW_BYTES;
constexpr int BLOCKS = BLOCK_SIZE < TILE ? TILE / BLOCK_SIZE : 1;  // of a tile
constexpr int TILE_BYTES = TILE * ROW_BYTES;
constexpr int TILE_ROWS = TILE / 16;
constexpr int COLUMN_TILES = COLUMNS / 8;
constexpr int ENTRIES = BLOCKS * 16 < 32 ? 32 : BLOCKS * 16;  // of the block table, read at once
// Bytes of K and V that a program asks for before it knows the lengths.
constexpr int GUESSED_BYTES = 65536 / PROGRAMS;
// tiles: a warp has to throw away one at most, and a lane has a block
constexpr int MOST_GUESSED = WARPS < 32 / BLOCKS ? WARPS : 32 / BLOCKS;
constexpr int FIT = GUESSED_BYTES / (2 * TILE_BYTES);
constexpr int GUESSED = FIT < 1 ? 1 : FIT > MOST_GUESSED ? MOST_GUESSED : FIT;
constexpr int SUM_PITCH = HEAD_SIZE + 4;                    // floats; keeps banks apart
constexpr bool FP8 = KV_BYTES == 1;
constexpr bool HALF_PRODUCTS = FP8 || !BF16;  // products of float16, else of bfloat16

constexpr int FAN_IN = 20;  // parts that are merged at once: a bundle, if there are more
// If WHOLE, rows are not cut where that takes less time; if there are more of them than multiprocessors, WHOLE_TOKENS at
// most. Ending a row takes as long as ROW_END tiles take to come. Both were measured on an H100.
constexpr int TOKEN_BYTES = 2 * ROW_BYTES;  // of K and V of a head
constexpr int WHOLE_TOKENS = 1024 * TOKEN_BYTES <= 512 << 10 ? 1024 : (512 << 10) / TOKEN_BYTES;
constexpr int ROW_END = ((24 << 10) + TILE * TOKEN_BYTES - 1) / (TILE * TOKEN_BYTES);
// Of sequences of several lengths, whose rows may each begin with a range: how many a lane has at most, and how many
// tiles more a range may have for it, and for the longest row to be a bundle. Measured on an H200.
constexpr int MOST_ALIGNED = 4;
constexpr int SUMS = COLUMNS * HEAD_SIZE;  // of a row's results: to end it takes longer if they are more
constexpr int MORE_TO_ALIGN = ((SUMS <= 512 ? 128 : SUMS <= 1024 ? 192 : 384) << 10) / (TILE * TOKEN_BYTES);
constexpr int MORE_FOR_BUNDLE = 384 / TILE;
constexpr int LEAST_CUT = 3;  // rows that are cut, for it to pay
constexpr int MOST_ALIGNED_TILES = 1 << 15;  // of all rows together, see `Divisor`

// What the programs of a cluster send each other of a row: items of four elements of a column and their weight,
// so many of which that follow each other go to the same program.
constexpr int ITEMS_A_TURN = 4;
constexpr int SENT = CLUSTER > 1 ? COLUMNS * HEAD_SIZE / 4 + CLUSTER * ITEMS_A_TURN : 1;

static_assert(CLUSTER == 1 || PROGRAMS == 1, "clusters are for few rows");
static_assert(CLUSTER == 1 || !WHOLE, "a cluster shares out a row");
static_assert(BOX_BYTES % 128 == 0, "the TMA wants aligned boxes");
static_assert(GATHER || BLOCKS <= 32, "a lane has a block");
static_assert(PROGRAMS <= 2, "see spread");
static_assert(GATHER || PRODUCERS == 1, "one warp asks the TMA");
static_assert(STAGES % WARPS == 0, "a warp has its own stages");
static_assert(!FP8 || HEAD_SIZE % 32 == 0, "e4m3 rows are taken 32 at a time");

#if OUT_F32
using Out = float;
#else
using Out = u16;
#endif

struct Parameters {
    TensorMap key, value;
    const u16 *query;
    Out *out;
    float *lse;
    // two places a program for parts, then two for what bundles of parts are merged to
    float *part;          // [4 * num_programs, COLUMNS, HEAD_SIZE]
    float2 *part_weight;  // [4 * num_programs, COLUMNS, WARPS], peak and total
    int *arrived;         // [2 * num_programs, WARPS], zeros before and after
    // what a program has of a row of few parts, or for it, or a cluster of a row that several have: sums of two
    // elements, a peak and a total each; zeros before and after
    float4 *swapped;  // [num_programs, COLUMNS, HEAD_SIZE / 2]
    const int *tables, *kv_lengths, *query_starts;
    const unsigned char *key_memory, *value_memory;
    const float *key_scale, *value_scale, *alibi_slopes, *sinks;
    i64 query_token_stride, query_head_stride, out_token_stride, out_head_stride, table_stride;
    i64 block_stride, kv_head_stride, token_stride;  // bytes
    float scale_log2;  // of the scores; with a soft cap, of its argument
    float cap_log2;
    int num_sequences, num_query_heads, num_kv_heads, window, num_programs;
    int parallel_heads;  // neighbouring programs have so many heads of a sequence; divides num_kv_heads
    int groups, ranges;  // of heads, and of tiles at most: num_kv_heads and num_programs by parallel_heads, or less
    int all_ranges;      // if ALIGNED, of tiles at most where rows begin with one: num_programs by parallel_heads
    int table_lines;     // of 128 bytes, that are asked for of each row of the block tables
    int query_lines;     // of the queries
    int max_kv_length, max_query_length;  // of a sequence
    int is_full;  // whether all sequences have `max_kv_length` tokens, as far as the host knows
    // Rows of one length stay whole if they have at most `whole_tiles`: a range then has `whole_rows` of them, and each
    // of the first `whole_more` one more. See `WholeRows` of decode_division.py.
    int whole_rows, whole_more, whole_tiles;
};
