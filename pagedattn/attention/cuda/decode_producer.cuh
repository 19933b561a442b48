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

    DEVICE void run(Segment segment, int range_end) {
        int round = 0;
        while (true) {
            const int *table = p.tables + segment.sequence * p.table_stride;
            int blocks = (segment.tiles.kv_length + BLOCK_SIZE - 1) / BLOCK_SIZE;
            int base = 0, limit = -1;  // entries base to limit are in shared memory
            int ahead[ENTRIES / 32];
            auto read_ahead = [&](int from) {
#pragma unroll
                for (int i = 0; i < ENTRIES / 32; ++i) {
                    int entry = from + i * 32 + lane;
                    ahead[i] = entry < blocks ? table[entry] : 0;
                }
            };
            int tile = segment.tiles.first + segment.begin - segment.row_begin;
            int last = tile + segment.end - segment.begin;
            read_ahead(tile * TILE / BLOCK_SIZE);
            for (; tile < last; ++tile, ++round) {
                int entry = tile * TILE / BLOCK_SIZE;
                if (entry >= limit) {
                    __syncwarp();
#pragma unroll
                    for (int i = 0; i < ENTRIES / 32; ++i) shared.table[warp][i * 32 + lane] = ahead[i];
                    __syncwarp();
                    mark(Moment::FIRST_ASKED);
                    base = entry;
                    limit = base + ENTRIES;
                    read_ahead(limit);
                }
                int stage = round % STAGES;
                barrier_wait(shared_address(&shared.empty[stage]), (round / STAGES & 1) ^ 1);
                int offset = BLOCK_SIZE < TILE ? 0 : tile * TILE % BLOCK_SIZE;
                bring(shared.table[warp] + entry - base, min(BLOCKS, blocks - entry), offset, segment.head,
                      shared_address(shared.tiles[stage]), shared_address(&shared.full[stage]));
            }
            if (segment.end >= range_end) return;
            segment.next(p, range_end);
        }
    }
};
