// Who works on what: which tiles of which sequences and heads a program has.
#pragma once
#include "decode_shape.cuh"

// The tiles of a sequence: those that some query of it sees.
struct Tiles {
    int kv_length, lowest, first, count;  // `lowest` token and `first` tile that are seen
};

DEVICE Tiles tiles_of(const Parameters &p, int sequence) {
    Tiles tiles;
    tiles.kv_length = p.kv_lengths[sequence];
    tiles.lowest = 0;
#if WINDOW
    int queries = p.query_starts[sequence + 1] - p.query_starts[sequence];
    tiles.lowest = max(0, tiles.kv_length - queries + 1 - p.window);
#endif
    tiles.first = tiles.lowest / TILE;
    tiles.count = (tiles.kv_length + TILE - 1) / TILE - tiles.first;
    return tiles;
}

// What a program works on is a range of tiles. KV heads form groups of `parallel_heads`, neighbours.
// All sequences' tiles, once a group, are laid end to end and cut into ranges, and each range goes to
// as many programs as a group has heads: they read the same blocks at the same time, and what they
// read of a block lies together.
struct Batch {
    int parallel_heads;
    int groups;  // of heads of a sequence, laid end to end
    int total, ranges;
    int each, extra;  // tiles of a range, and how many ranges have one more
    int lane_end;     // tiles of the sequences of this lane and of those before, one head

    DEVICE Batch(const Parameters &p, int lane) {
        int of_lane = (p.num_sequences + 31) / 32, mine = 0;
#pragma unroll 4
        for (int i = 0; i < of_lane; ++i) {
            int sequence = lane * of_lane + i;
            if (sequence < p.num_sequences) mine += tiles_of(p, sequence).count;
        }
        lane_end = mine;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            int before = __shfl_up_sync(~0u, lane_end, step);
            if (lane >= step) lane_end += before;
        }
        parallel_heads = p.parallel_heads;
        groups = p.num_kv_heads / parallel_heads;
        int of_head = __shfl_sync(~0u, lane_end, 31);
        total = of_head * groups;
        ranges = max(1, min(p.num_programs / parallel_heads, total));
        each = (u32)total / (u32)ranges;
        extra = total - each * ranges;
        // sequences of one length: whole rows, if that leaves few ranges with less, or little that
        // those without work could have read: less than merging takes
        int row = tiles_of(p, 0).count, rows = p.num_sequences * groups;
        bool even = true;
        for (int sequence = lane; sequence < p.num_sequences; sequence += 32)
            even = even && tiles_of(p, sequence).count == row;
        int rows_each = (u32)(rows + ranges - 1) / (u32)ranges, missing = rows_each * ranges - rows;
        bool few = 16 * missing <= rows;
        bool little = missing <= rows && (i64)missing * row * parallel_heads <= MERGE_BYTES / (2 * TILE_BYTES);
        if (__all_sync(~0u, even) && (few || little)) {
            each = rows_each * row;
            extra = 0;
        }
    }

    // First tile of a range; that of the one after the last is `total`.
    DEVICE int begin(int range) const { return min(range * each + min(range, extra), total); }

    DEVICE int range_of(int tile) const {
        int of_larger = extra * (each + 1);
        return tile < of_larger ? (u32)tile / (u32)(each + 1) : extra + (u32)(tile - of_larger) / (u32)each;
    }

    DEVICE int range_of_program(int program) const { return program / parallel_heads; }
    DEVICE int head_of_program(int program) const { return program % parallel_heads; }
};

// A row, one sequence and one KV head, or the part of it that lies in a range.
struct Segment {
    Tiles tiles;
    int sequence, head;
    int row_begin;   // tile of the batch
    int begin, end;  // tiles of the batch

    DEVICE int row_end() const { return row_begin + tiles.count; }

    DEVICE Segment(const Parameters &p, const Batch &batch, int program, int tile, int range_end) {
        int each = (p.num_sequences + 31) / 32;
        u32 beyond = __ballot_sync(~0u, (i64)batch.lane_end * batch.groups > tile);
        int lane = __ffs(beyond) - 1;  // the tile exists, so a lane has it
        int before = __shfl_sync(~0u, batch.lane_end, max(lane - 1, 0));
        row_begin = (lane ? before : 0) * batch.groups;
        sequence = lane * each;
        tiles = tiles_of(p, sequence);
        while (row_begin + tiles.count * batch.groups <= tile) {
            row_begin += tiles.count * batch.groups;
            tiles = tiles_of(p, ++sequence);
        }
        int groups_before = (tile - row_begin) / tiles.count;
        row_begin += groups_before * tiles.count;
        head = groups_before * batch.parallel_heads + batch.head_of_program(program);
        begin = tile;
        end = min(row_end(), range_end);
    }

    // Go on to the next row; there is one if `end` is not the end of the range.
    DEVICE void next(const Parameters &p, int range_end) {
        begin = row_begin = end;
        head += p.parallel_heads;
        if (head >= p.num_kv_heads) {
            head -= p.num_kv_heads;
            do tiles = tiles_of(p, ++sequence);
            while (tiles.count == 0);
        }
        end = min(row_end(), range_end);
    }
};
