// The producer: a warp that has the TMA bring tiles, or PRODUCERS that copy them.
#pragma once
#include "decode_work.cuh"

// Address of 16 bytes of a tile, swizzled as the TMA writes it.
DEVICE u32 place_in_tile(u32 tile, int token, int byte) {
    u32 place = tile + token / BOX_TOKENS * BOX_BYTES + byte / SPAN * (BOX_TOKENS * SPAN) +
                token % BOX_TOKENS * SPAN + byte % SPAN;
    return place ^ (place >> 7 & (SWIZZLE / 16 - 1)) << 4;
}

struct Producer {
    const Parameters &p;
    Shared &shared;
    int warp, lane;
    u64 policy;
    int ahead[ENTRIES / 32];  // entries of the block table that come next

    DEVICE Producer(const Parameters &p, Shared &shared, int warp, int lane)
        : p(p), shared(shared), warp(warp), lane(lane), policy(evict_first()) {}

    DEVICE void read_ahead(int sequence, int from, int blocks) {
        const int *table = p.tables + sequence * p.table_stride;
#pragma unroll
        for (int i = 0; i < ENTRIES / 32; ++i) {
            int entry = from + i * 32 + lane;
            ahead[i] = entry < blocks ? table[entry] : 0;
        }
    }

    DEVICE void read_ahead(const Guess &guess) {
        read_ahead(guess.sequence, guess.first_tile() * TILE / BLOCK_SIZE, blocks_of(guess.tiles));
    }

    // Where in its block a tile begins, in tokens.
    DEVICE static int offset_of(int tile) { return BLOCK_SIZE < TILE ? 0 : tile * TILE % BLOCK_SIZE; }

    DEVICE static int blocks_of(const Tiles &tiles) { return (tiles.kv_length + BLOCK_SIZE - 1) / BLOCK_SIZE; }

    // Bring a tile; `table` has the entries of its blocks, of which `blocks` exist. Entries that have left
    // the window may be anything: the TMA reads blocks that do not exist as zeros, and threads leave
    // out the first `unseen` tokens.
    DEVICE void bring(const int *table, int blocks, int offset, int head, int unseen, u32 to, u32 full) {
        if (GATHER) {
            constexpr int PIECES = ROW_BYTES / 16;
#pragma unroll 4
            for (int i = warp * 32 + lane; i < TILE * PIECES; i += PRODUCERS * 32) {
                int token = i / PIECES, byte = i % PIECES * 16;
                if (token >= blocks * BLOCK_SIZE) break;
                if (WINDOW && token < unseen) continue;
                i64 from = table[token / BLOCK_SIZE] * p.block_stride + head * p.kv_head_stride +
                           token % BLOCK_SIZE * p.token_stride + byte;
                copy_16_bytes(place_in_tile(to, token, byte), p.key_memory + from, policy);
                copy_16_bytes(place_in_tile(to + TILE_BYTES, token, byte), p.value_memory + from, policy);
            }
            barrier_arrive_when_copied(full);
        } else {
            int own = table[min(lane, BLOCKS - 1)], block[BLOCKS];  // a lane has the block of a box
#pragma unroll
            for (int box = 0; box < BLOCKS; ++box) block[box] = __shfl_sync(~0u, own, box);
            if (elected()) {
                barrier_arrive_expect(full, blocks * 2 * BOX_BYTES);
                ask(block, blocks, offset, head, to, full);
            }
        }
    }

    // Ask for a tile, a box for each of its blocks, or one if it lies in a block. One elected lane does
    // it, with numbers that come by shuffles, so that the compiler knows them to be the same for all
    // lanes: else it has the lanes ask in a loop, one by one. K and V go by turns, so that the first tile is
    // whole before others come.
    DEVICE void ask(const int (&block)[BLOCKS], int blocks, int offset, int head, u32 to, u32 full) {
        int row = LINES ? offset / 16 * (ROW_BYTES / 8) : offset;  // of the block
#pragma unroll
        for (int box = 0; box < BLOCKS; ++box) {
            if (box >= blocks) break;
            tma_load(to + box * BOX_BYTES, &p.key, 0, row, 0, head, block[box], full, policy);
            tma_load(to + TILE_BYTES + box * BOX_BYTES, &p.value, 0, row, 0, head, block[box], full, policy);
        }
    }

    // Make the barriers expect what is guessed, which touches no memory but this program's.
    DEVICE void expect(const Guess &guess) {
        int entry = (guess.first_tile() + lane) * TILE / BLOCK_SIZE;
        int bytes = min(BLOCKS, blocks_of(guess.tiles) - entry) * 2 * BOX_BYTES;
        if (lane < guess.count) barrier_arrive_expect(shared_address(&shared.full[lane]), bytes);
        __syncwarp();
    }

    // Ask for what is guessed. Entries of the table behind a sequence's end may be anything: blocks that
    // do not exist are read as zeros by the TMA, and what a wrong guess brings is thrown away.
    DEVICE void bring(const Guess &guess) {
        int blocks = blocks_of(guess.tiles), first = guess.first_tile();
        // a lane has the block of a box
        int entry = (first + lane / BLOCKS) * TILE / BLOCK_SIZE + lane % BLOCKS;
        bool exists = lane < guess.count * BLOCKS && entry < blocks;
        int own = exists ? p.tables[guess.sequence * p.table_stride + entry] : 0;
#pragma unroll 1
        for (int stage = 0; stage < guess.count; ++stage) {
            int tile = first + stage, block[BLOCKS];
#pragma unroll
            for (int box = 0; box < BLOCKS; ++box) block[box] = __shfl_sync(~0u, own, stage * BLOCKS + box);
            if (elected())
                ask(block, blocks - tile * TILE / BLOCK_SIZE, offset_of(tile), guess.head, shared_address(shared.tiles[stage]), shared_address(&shared.full[stage]));
        }
        mark(Moment::FIRST_ASKED);
    }

    DEVICE void bring_tile(const int *table, int base, const Segment &segment, int tile, int stage) {
        int entry = tile * TILE / BLOCK_SIZE;
        bring(table + entry - base, min(BLOCKS, blocks_of(segment.tiles) - entry), offset_of(tile),
              segment.head, segment.tiles.lowest - tile * TILE, shared_address(shared.tiles[stage]), shared_address(&shared.full[stage]));
    }

    // Bring a segment's tiles and those of the segments after it, from `round` on; of a guess that
    // holds the first `there` are on their way, and their entries are read. The table is read before it is
    // needed, the next segment's too: a warp that waits for it has no tiles on their way.
    DEVICE void run(Segment segment, int range_end, int round, int there) {
        bool is_read = there > 0;
        while (true) {
            Segment next = segment;
            bool goes_on = segment.goes_on(range_end);
            int blocks = blocks_of(segment.tiles);
            int base = 0, limit = -1;  // entries base to limit are in shared memory
            int tile = segment.first_tile(), last = tile + segment.end - segment.begin;
            if (!is_read) read_ahead(segment.sequence, tile * TILE / BLOCK_SIZE, blocks);
            is_read = false;
            for (; tile < last; ++tile, ++round) {
                int entry = tile * TILE / BLOCK_SIZE;
                bool is_used_up = entry >= limit;
                if (is_used_up) {
                    __syncwarp();
#pragma unroll
                    for (int i = 0; i < ENTRIES / 32; ++i) shared.table[warp][i * 32 + lane] = ahead[i];
                    __syncwarp();
                    mark(Moment::FIRST_ASKED);
                    base = entry;
                    limit = base + ENTRIES;
                }
                if (round >= there) {
                    int stage = round % STAGES;
                    barrier_wait(shared_address(&shared.empty[stage]), (round / STAGES & 1) ^ 1);
                    bring_tile(shared.table[warp], base, segment, tile, stage);
                }
                if (!is_used_up) continue;
                if ((last - 1) * TILE / BLOCK_SIZE >= limit) {
                    read_ahead(segment.sequence, limit, blocks);
                } else if (goes_on) {
                    next.next(p, range_end);
                    read_ahead(next.sequence, next.first_tile() * TILE / BLOCK_SIZE, blocks_of(next.tiles));
                    is_read = true;
                }
            }
            if (!goes_on) return;
            segment = next;
        }
    }
};
