// Who works on what: which tiles of which sequences and heads a program has, and its shared memory.
#pragma once
#include "decode_shape.cuh"
#include "warps.cuh"

// The tiles of a sequence: those that some query of it sees.
struct Tiles {
    int kv_length, lowest, first, count;  // `lowest` token and `first` tile that are seen

    DEVICE int tokens() const { return kv_length - lowest; }
};

DEVICE int ceil_div(int x, int y) { return (u32)(x + y - 1) / (u32)y; }

// A number from 2 on, by which x is divided if (x + of - 1) * of is less than 2^32.
struct Divisor {
    u32 of = 1, inverse = 0;

    DEVICE Divisor() {}
    DEVICE explicit Divisor(int by) : of(by), inverse(0xffffffffu / (u32)by + 1) {}
    DEVICE int ceil_div(int x) const { return __umulhi(x + of - 1, inverse); }
};

// What a row counts for where work is divided: its tiles; or, where rows are not cut, something for itself besides,
// or that alone; or, where none shares a range with another, all tiles of the ranges that it has.
struct Weight {
    int of_tile = 1, of_row = 0;
    Divisor range{};

    DEVICE int of(const Tiles &tiles) const { return tiles.count ? of(tiles.count) : 0; }
    DEVICE int of(int tiles) const {
        int own = tiles * of_tile + of_row;
        return ALIGNED && range.of > 1 ? range.ceil_div(own) * range.of : own;
    }
    DEVICE bool keeps_whole() const { return WHOLE && of_row; }
};

DEVICE Tiles tiles_of(const Parameters &p, int kv_length, int queries) {
    Tiles tiles;
    tiles.kv_length = kv_length;
    tiles.lowest = WINDOW ? max(0, kv_length - queries + 1 - p.window) : 0;
    tiles.first = tiles.lowest / TILE;
    tiles.count = (kv_length + TILE - 1) / TILE - tiles.first;
    return tiles;
}

// Whether a sequence's queries are too many for this kernel: another one takes them.
DEVICE bool is_passed_over(const Parameters &p, int sequence) {
    return AMONG_LONGER && p.query_starts[sequence + 1] - p.query_starts[sequence] > p.max_query_length;
}

DEVICE Tiles tiles_of(const Parameters &p, int sequence) {
    int queries = WINDOW ? p.query_starts[sequence + 1] - p.query_starts[sequence] : 0;
    Tiles tiles = tiles_of(p, p.kv_lengths[sequence], queries);
    if (is_passed_over(p, sequence)) tiles.count = 0;
    return tiles;
}

// What a program works on is a range of tiles. KV heads form groups of `parallel_heads`, neighbours.
// All sequences' tiles, once a group, are laid end to end and cut into ranges, all at once or row by
// row, and each range goes to as many programs as a group has heads: they read the same blocks at the
// same time, and what they read of a block lies together. Where rows are not cut, what they count for
// is laid end to end instead of tiles, and a range has the rows that begin in it. Where rows of several lengths are
// few, each may begin with a range; then there is nothing at the end of its last one.
struct Division {
    Weight weight;
    int parallel_heads;
    int groups;  // of heads of a sequence, laid end to end
    int total, ranges;
    int unit, parts;  // what is cut by itself, all tiles or each row, and into how many ranges
    int each, extra;  // tiles of a range, and how many of a unit's ranges have `step` more
    int step = 1;     // a tile, or a row
    bool is_clustered = false;  // whether what a cluster has is of one row

    // Divide what rows of one head count for, all together; of a `sequence` as all are if they are `even`.
    DEVICE Division(const Parameters &p, int of_head, bool even, const Tiles &sequence, Weight weight = {})
        : weight(weight) {
        parallel_heads = p.parallel_heads;
        groups = p.groups;
        total = of_head * groups;
        ranges = max(1, min(p.ranges, total));
        if (ALIGNED && weight.range.of > 1) ranges = total / (int)weight.range.of;
        unit = total;
        parts = ranges;
        each = (u32)total / (u32)ranges;
        extra = total - each * ranges;
        if (!even) return;
        int rows = p.num_sequences * groups, row = weight.of(sequence);
        if (weight.keeps_whole()) {
            keep_even(rows, row);
            return;
        }
        if (CLUSTER > 1) {
            int of_row = (u32)ranges / (u32)rows / CLUSTER * CLUSTER;
            if (of_row && of_row <= row && of_row / CLUSTER <= FAN_IN) {
                cut_rows(rows, row, of_row);
                is_clustered = true;
                return;
            }
        }
        if (row <= p.whole_tiles) {
            each = p.whole_rows * row;
            extra = p.whole_more;
            step = row;
            return;
        }
        if (1 < rows && rows < ranges) {
            // each row by itself in as many ranges, if that leaves few without work: then none has
            // the end of a row and the beginning of another, two to merge
            int of_row = (u32)ranges / (u32)rows;
            if (16 * (ranges - of_row * rows) <= ranges) cut_rows(rows, row, of_row);
        }
    }

    // Cut no row of `row` tiles: the first ranges have one more than the others. `spread` puts their programs on
    // a multiprocessor each, of two that it has, and on one of each two multiprocessors, if there are no more.
    DEVICE void keep_even(int rows, int row) {
        each = (u32)rows / (u32)ranges * row;
        extra = (u32)rows % (u32)ranges;
        step = row;
    }

    // Cut each row of `row` tiles by itself into `of_row` ranges.
    DEVICE void cut_rows(int rows, int row, int of_row) {
        unit = row;
        parts = of_row;
        ranges = of_row * rows;
        each = (u32)row / (u32)of_row;
        extra = row - each * of_row;
    }

    // Where a range begins, as what rows count for is laid end to end; any after the last, at `total`.
    DEVICE int begin(int range) const {
        int before = parts == ranges ? 0 : (u32)range / (u32)parts;  // units
        int part = range - before * parts;
        return min(before * unit + part * each + min(part, extra) * step, total);
    }

    // The range that a tile is in.
    DEVICE int range_of(int tile) const {
        int before = unit == total ? 0 : (u32)tile / (u32)unit, of_larger = extra * (each + step);
        tile -= before * unit;
        int part = tile < of_larger ? (u32)tile / (u32)(each + step) : extra + (u32)(tile - of_larger) / (u32)each;
        return before * parts + part;
    }

    DEVICE int range_of_program(int program) const { return program / parallel_heads; }
    DEVICE int head_of_program(int program) const { return program % parallel_heads; }
};

// The batch as it is: known once its lengths are read.
struct Batch : Division {
    int lane_end;  // what rows of this lane's sequences and of those before count for, of one head

    DEVICE static Batch read(const Parameters &p, int lane) {
        int of_lane = (p.num_sequences + 31) / 32, tiles = 0, rows = 0, longest = 0;
#pragma unroll 4
        for (int i = 0; i < of_lane; ++i) {
            int sequence = lane * of_lane + i;
            if (sequence >= p.num_sequences) continue;
            Tiles here = tiles_of(p, sequence);
            tiles += here.count;
            if (WHOLE && here.count) {
                ++rows;
                longest = max(longest, here.tokens());
            }
        }
        Tiles first = tiles_of(p, 0);
        bool even = true;
        for (int sequence = lane; sequence < p.num_sequences; sequence += 32)
            even = even && tiles_of(p, sequence).count == first.count;
        even = __all_sync(~0u, even);
        bool may_align = ALIGNED && !even && of_lane <= MOST_ALIGNED;
        Weight weight{};
        int weighs = tiles;  // what rows of this lane's sequences do
        if (WHOLE) {
            Load load(p, tiles, rows, longest);
            int most = load.share + load.cutting();
            bool whole = load.stays_whole(p, may_align ? min(most, load.aligned(p) + ALIGNED_TOKENS) : most);
            if (may_align && !whole) {
                weighs = align(p, lane * of_lane, of_lane, weight);
                whole = weight.range.of == 1 && load.stays_whole(p, most);
            }
            if (whole) {
                weight = load.rows <= p.ranges / PROGRAMS ? Weight{0, 1} : Weight{1, ROW_END};
                weighs = tiles * weight.of_tile + rows * weight.of_row;
            }
        } else if (may_align) {
            weighs = align(p, lane * of_lane, of_lane, weight);
        }
        int lane_end = sum_up_to(weighs, lane);
        return {Division(p, __shfl_sync(~0u, lane_end, 31), even, first, weight), lane_end};
    }

    // All rows of one head of those that are read side by side, together.
    struct Load {
        int tiles, rows;
        int share, longest;  // in KV tokens: what each multiprocessor would have, and the longest row

        // Each lane has some sequences' tiles, how many have any, and tokens of the longest.
        DEVICE Load(const Parameters &p, int tiles_, int rows_, int longest_) {
            tiles = __reduce_add_sync(~0u, tiles_) * p.groups;
            rows = __reduce_add_sync(~0u, rows_) * p.groups;
            longest = __reduce_max_sync(~0u, longest_);
            u32 multiprocessors = max(1, p.num_programs / (PROGRAMS * p.parallel_heads));
            share = (u32)tiles / multiprocessors * TILE;
        }

        // Tokens that would be read while rows are cut and merged: of few, few programs have two to end.
        DEVICE int cutting() const { return rows <= LEAST_CUT ? (CUT_TOKENS + ALIGNED_TOKENS) / 2 : CUT_TOKENS; }

        // Tokens of a multiprocessor's ranges, or so, where each row begins with one.
        DEVICE int aligned(const Parameters &p) const {
            return PROGRAMS * ceil_div(tiles, max(1, p.all_ranges - rows / 2)) * TILE;
        }

        // Whether none is cut, if else the last to end would have so many tokens: where there are no more of them
        // than multiprocessors, of which each has one then, or where none is long.
        DEVICE bool stays_whole(const Parameters &p, int most) const {
            if (rows > p.ranges / PROGRAMS && longest > WHOLE_TOKENS) return false;
            return NEVER_CUTS || longest <= most;
        }
    };

    // Have each row begin with a range, if ranges are not much larger for it. A range that has the end of a row and
    // the beginning of another takes longer than one with more tiles of one row, as it has two to end and to merge.
    // And of more parts than a bundle has, those of each bundle are merged first: so ranges are larger too where the
    // longest row is a bundle then. By a warp, of which each lane has `count` sequences from `first` on and returns
    // what their rows of a head count for.
    DEVICE static int align(const Parameters &p, int first, int count, Weight &weight) {
        int own[MOST_ALIGNED], of_lane = 0, rows = 0, longest = 0;
#pragma unroll
        for (int i = 0; i < MOST_ALIGNED; ++i) {
            own[i] = i < count && first + i < p.num_sequences ? tiles_of(p, first + i).count : 0;
            of_lane += own[i];
            rows += own[i] > 0;
            longest = max(longest, own[i]);
        }
        int all = __reduce_add_sync(~0u, of_lane) * p.groups;
        rows = __reduce_add_sync(~0u, rows) * p.groups;
        longest = __reduce_max_sync(~0u, longest);
        if (rows >= p.all_ranges || all >= MOST_ALIGNED_TILES) return of_lane;
        int share = ceil_div(all, p.all_ranges), least = ceil_div(longest, FAN_IN), cut = 0;
        if (least > share + MORE_FOR_BUNDLE) least = share;
#pragma unroll
        for (int i = 0; i < MOST_ALIGNED; ++i) cut += own[i] > share;
        if (least <= share && __reduce_add_sync(~0u, cut) * p.groups < LEAST_CUT) return of_lane;
        // a row's last range is half full on average, and has a tile at least
        int each = max(least, ceil_div(all, p.all_ranges - rows / 2)), most = max(least, share + MORE_TO_ALIGN);
        if (each < 2 || each > most) return of_lane;
        auto fits = [&](int tiles) {
            Divisor range(tiles);
            int used = 0;
#pragma unroll
            for (int i = 0; i < MOST_ALIGNED; ++i) used += range.ceil_div(own[i]);
            return __reduce_add_sync(~0u, used) * p.groups <= p.all_ranges;
        };
        if (!fits(each)) {
            if (!fits(most)) return of_lane;
            int less = each;  // do not fit
            each = most;
#pragma unroll 1
            while (each - less > ceil_div(less, 16)) {
                int middle = (less + each) / 2;
                if (fits(middle))
                    each = middle;
                else
                    less = middle;
            }
        }
        Divisor range(each);
        weight.range = range;
        of_lane = 0;
#pragma unroll
        for (int i = 0; i < MOST_ALIGNED; ++i) of_lane += weight.of(own[i]);
        return of_lane;
    }
};

// A row, one sequence and one KV head, or the part of it that lies in a range.
struct Segment {
    Tiles tiles;
    int sequence, head;
    int row_begin;   // as what rows count for is laid end to end
    int begin, end;  // the first tile's place there, and that and how many tiles it has
    Weight weight;   // as a `Division` has it

    DEVICE int row_end() const { return row_begin + weight.of(tiles); }
    DEVICE int tiles_end() const { return row_begin + tiles.count; }  // if the row may be cut
    DEVICE int first_tile() const { return tiles.first + begin - row_begin; }  // of the sequence
    DEVICE bool is_whole() const { return weight.keeps_whole() || (begin == row_begin && end == tiles_end()); }
    DEVICE int end_in(int range_end) const {
        return weight.keeps_whole() ? begin + tiles.count : min(tiles_end(), range_end);
    }
    DEVICE bool goes_on(int range_end) const { return row_end() < range_end; }

    DEVICE Segment(const Parameters &p, const Batch &batch, int program, int tile, int range_end) {
        int each = (p.num_sequences + 31) / 32;
        u32 beyond = __ballot_sync(~0u, (i64)batch.lane_end * batch.groups > tile);
        int lane = __ffs(beyond) - 1;  // the tile exists, so a lane has it
        int before = __shfl_sync(~0u, batch.lane_end, max(lane - 1, 0));
        row_begin = (lane ? before : 0) * batch.groups;
        sequence = lane * each;
        tiles = tiles_of(p, sequence);
        weight = batch.weight;
        while (row_begin + weight.of(tiles) * batch.groups <= tile) {
            row_begin += weight.of(tiles) * batch.groups;
            tiles = tiles_of(p, ++sequence);
        }
        int groups_before = (tile - row_begin) / weight.of(tiles);
        row_begin += groups_before * weight.of(tiles);
        head = groups_before * batch.parallel_heads + batch.head_of_program(program);
        begin = tile;
        end = end_in(range_end);
    }

    // Whether the range has some row: where rows stay whole, those that begin in it. Go on to the first.
    DEVICE bool is_in(const Parameters &p, int range_end) {
        if (!weight.keeps_whole() || begin == row_begin) return true;
        if (!goes_on(range_end)) return false;
        next(p, range_end);
        return true;
    }

    // Go on to the next row, if the range `goes_on`.
    DEVICE void next(const Parameters &p, int range_end) {
        begin = row_begin = row_end();
        head += p.parallel_heads;
        if (head >= p.num_kv_heads) {
            head -= p.num_kv_heads;
            do tiles = tiles_of(p, ++sequence);
            while (tiles.count == 0);
        }
        end = end_in(range_end);
    }
};

// A row that is cut, of which this program has a part. Its parts are those of the ranges that it lies
// in, in order. FAN_IN parts that follow each other are a bundle, from the row's first on.
struct Cut {
    int head, first_query, columns;
    int apart;        // places that the parts are apart
    int place;        // see `place_of`
    int own, total;   // part, and how many there are
    int from, count;  // of the bundle that the own part is in: first part, and how many

    // Where a part lies. A program has two places, one for a row that began before and one for a row that
    // goes on, so a row's first part is in another than those that follow.
    DEVICE int place_of(int part) const { return place + part * apart + (part == 0); }

    // What a program has of a row, but for its queries.
    DEVICE static Cut of(const Batch &batch, const Segment &segment, int program) {
        int first = batch.range_of(segment.row_begin), own = batch.range_of_program(program) - first;
        Cut cut;
        cut.own = own;
        cut.head = segment.head;
        cut.apart = 2 * batch.parallel_heads;
        cut.place = 2 * program - own * cut.apart;
        cut.total = batch.range_of(segment.tiles_end() - 1) - first + 1;
        cut.from = own / FAN_IN * FAN_IN;
        cut.count = min(FAN_IN, cut.total - cut.from);
        return cut;
    }
};

// The own part of a row of few, and how many there are; or 0.
struct Few {
    int own, total;
};

template <int BUFFERS>
struct SharedOf {
    alignas(1024) unsigned char tiles[STAGES][2][TILE_BYTES];
    float sums[BUFFERS][WARPS][8][SUM_PITCH];  // of eight columns
    float peaks[2][WARPS][COLUMNS], totals[2][WARPS][COLUMNS];
    int table[PRODUCERS][ENTRIES];
    // what the cluster's programs, one after the other, have of the elements that this one adds up
    alignas(16) float4 sent[SENT];
    float2 sent_weight[SENT];
    // rows that are cut, for each warp, which merges its elements of them when the range ends: here they
    // take no registers meanwhile
    Cut cuts[WARPS][2];
    alignas(8) u64 full[STAGES], empty[STAGES], sent_there;
};

// With room for two, warps put down what they have of eight columns while others still read what was before.
constexpr int SUM_BUFFERS = sizeof(SharedOf<2>) + 1024 <= SHARED_BYTES ? 2 : 1;
using Shared = SharedOf<SUM_BUFFERS>;

static_assert(sizeof(Shared) + 1024 <= SHARED_BYTES, "shared memory, and room to align it");

// The first tiles of a program if all sequences have as many tokens as the host allows, as they had
// when it made the batch. They are asked for before the lengths are known, which saves the time to
// read them.
struct Guess {
    Tiles tiles;
    int sequence = 0, head = 0;
    int tile = 0, count = 0;  // the first one's number in its row, and how many there are

    DEVICE Guess(const Parameters &p, int program) {
        tiles = tiles_of(p, p.max_kv_length, p.max_query_length);
        Division division(p, tiles.count * p.num_sequences, true, tiles);
        int range = division.range_of_program(program);
        int begin = division.begin(range), left = division.begin(range + 1) - begin;
        if (GATHER || WHOLE || !p.is_full || left <= 0) return;
        int row = (u32)begin / (u32)tiles.count;
        tile = begin - row * tiles.count;
        count = min(min(GUESSED, left), tiles.count - tile);
        sequence = (u32)row / (u32)division.groups;
        head = (row - sequence * division.groups) * division.parallel_heads + division.head_of_program(program);
    }

    DEVICE int first_tile() const { return tiles.first + tile; }  // of the sequence

    DEVICE bool holds(const Segment &segment) const {
        return count > 0 && segment.sequence == sequence && segment.head == head &&
               segment.begin - segment.row_begin == tile && segment.tiles.first == tiles.first &&
               segment.end - segment.begin >= count && segment.tiles.kv_length <= tiles.kv_length;
    }
};
