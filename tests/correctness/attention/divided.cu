// How a batch is divided, told by the decode kernel's own source; programs of one warp.
#include "decode_work.cuh"

// Writes to `arrived`, int32: of each program how many tiles it guesses, if that is what it has, 0 if it
// is not, and -1 if it has none; then the tiles of all of a group's heads; then the first tile of each
// range and of the one after the last; then the range of each tile.
extern "C" __global__ void divide(const Parameters p) {
    int program = blockIdx.x, lane = threadIdx.x;
    Guess guess(p, program);
    Batch batch = Batch::read(p, lane);
    int range = batch.range_of_program(program);
    int begin = batch.begin(range), end = batch.begin(range + 1), guessed = -1;
    if (begin < end) guessed = guess.holds(Segment(p, batch, program, begin, end)) ? guess.count : 0;
    if (lane) return;
    p.arrived[program] = guessed;
    if (program) return;
    int *out = p.arrived + p.num_programs;
    *out++ = batch.total;
    for (int range = 0; range <= p.ranges; ++range) *out++ = batch.begin(range);
    for (int tile = 0; tile < batch.total; ++tile) *out++ = batch.range_of(tile);
}

// Writes to `arrived`, int32: of each program the tiles that it has of rows; then, for each sequence and KV
// head, how many parts programs have of it, 0 before.
extern "C" __global__ void share_out(const Parameters p) {
    int program = blockIdx.x, lane = threadIdx.x, tiles = 0;
    Batch batch = Batch::read(p, lane);
    int range = batch.range_of_program(program);
    int begin = batch.begin(range), end = batch.begin(range + 1);
    if (begin < end) {
        Segment segment(p, batch, program, begin, end);
        if (segment.is_in(p, end))
            while (true) {
                tiles += segment.end - segment.begin;
                if (lane == 0)
                    atomicAdd(p.arrived + p.num_programs + segment.sequence * p.num_kv_heads + segment.head, 1);
                if (!segment.goes_on(end)) break;
                segment.next(p, end);
            }
    }
    if (lane == 0) p.arrived[program] = tiles;
}
