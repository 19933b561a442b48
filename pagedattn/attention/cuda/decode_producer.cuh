// The producer: a warp that has the TMA bring tiles, or four that copy them.
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

    DEVICE static int blocks_of(const Tiles &tiles) { return (tiles.kv_length + BLOCK_SIZE - 1) / BLOCK_SIZE; }

    // Bring a tile; `table` has the entries of its blocks, of which `blocks` exist.
    DEVICE void bring(const int *table, int blocks, int offset, int head, u32 to, u32 full) {
        if (GATHER) {
            constexpr int PIECES = ROW_BYTES / 16;
#pragma unroll 4
            for (int i = warp * 32 + lane; i < TILE * PIECES; i += PRODUCERS * 32) {
                int token = i / PIECES, byte = i % PIECES * 16;
                if (token >= blocks * BLOCK_SIZE) break;
                i64 from = table[token / BLOCK_SIZE] * p.block_stride + head * p.kv_head_stride +
                           token % BLOCK_SIZE * p.token_stride + byte;
                copy_16_bytes(place_in_tile(to, token, byte), p.key_memory + from);
                copy_16_bytes(place_in_tile(to + TILE_BYTES, token, byte), p.value_memory + from);
            }
            barrier_arrive_when_copied(full);
        } else {
            if (lane == 0) barrier_arrive_expect(full, blocks * 2 * BOX_BYTES);
            __syncwarp();
            for (int i = lane; i < 2 * blocks; i += 32) {
                int box = i / 2;
                const TensorMap *map = i % 2 ? &p.value : &p.key;
                tma_load(to + i % 2 * TILE_BYTES + box * BOX_BYTES, map, 0, offset, 0, head, table[box],
                         full, policy);
            }
        }
    }

    // Make the barriers expect what is guessed, which touches no memory but this program's.
    DEVICE void expect(const Guess &guess) {
        int entry = (guess.first_tile() + lane) * TILE / BLOCK_SIZE;
        int bytes = min(BLOCKS, blocks_of(guess.tiles) - entry) * 2 * BOX_BYTES;
        if (lane < guess.count) barrier_arrive_expect(shared_address(&shared.full[lane]), bytes);
        __syncwarp();
    }

    // Ask for what is guessed, each lane for a block. Entries of the table behind a sequence's end may
    // be anything: blocks that do not exist are read as zeros by the TMA, and what a wrong guess
    // brings is thrown away.
    DEVICE void bring(const Guess &guess) {
        int stage = lane / BLOCKS, box = lane % BLOCKS, tile = guess.first_tile() + stage;
        int entry = tile * TILE / BLOCK_SIZE + box, offset = BLOCK_SIZE < TILE ? 0 : tile * TILE % BLOCK_SIZE;
        if (stage < guess.count && entry < blocks_of(guess.tiles)) {
            int block = p.tables[guess.sequence * p.table_stride + entry];
            u32 to = shared_address(shared.tiles[stage]) + box * BOX_BYTES, full = shared_address(&shared.full[stage]);
            tma_load(to, &p.key, 0, offset, 0, guess.head, block, full, policy);
            tma_load(to + TILE_BYTES, &p.value, 0, offset, 0, guess.head, block, full, policy);
        }
        mark(Moment::FIRST_ASKED);
    }

    DEVICE void bring_tile(const int *table, int base, int blocks, int tile, int head, int stage) {
        int entry = tile * TILE / BLOCK_SIZE, offset = BLOCK_SIZE < TILE ? 0 : tile * TILE % BLOCK_SIZE;
        bring(table + entry - base, min(BLOCKS, blocks - entry), offset, head,
              shared_address(shared.tiles[stage]), shared_address(&shared.full[stage]));
    }

    // Bring a segment's tiles and those of the segments after it, from `round` on; of a guess that
    // holds the first `there` are on their way, and their entries are read. The table is read before it is
    // needed, the next segment's too: a warp that waits for it has no tiles on their way.
    DEVICE void run(Segment segment, int range_end, int round, int there) {
        bool is_read = there > 0;
        while (true) {
            Segment next = segment;
            bool goes_on = segment.end < range_end;
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
                    bring_tile(shared.table[warp], base, blocks, tile, segment.head, stage);
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
