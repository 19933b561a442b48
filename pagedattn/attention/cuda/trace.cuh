// When a program's warps come to named moments, for a picture of where a launch's time goes. Only if
// the macro TRACE says how many programs the launch has; else nothing is left of it.
#pragma once
#include "hopper.cuh"

enum class Moment {
    STARTED,        // the launch before is over
    LENGTHS_KNOWN,  // and with them what the program works on
    FIRST_ASKED,    // the table's entries are there, and the first tile is asked for, be it by a guess
    FIRST_THERE,
    LAST_THERE,
    LAST_FOLDED,   // into the warp's softmax
    SUMS_THERE,    // all warps' are in shared memory
    WRITTEN,       // the result, or a part of it
    LAST_TO_COME,  // of the programs that have a part of the row
    MERGED,
    ENDED,
};

#if TRACE

constexpr int MOST_MOMENTS = 16, MOST_WARPS = 16;
constexpr u64 NEVER = ~0ull;

__device__ u64 marks[TRACE][MOST_WARPS][MOST_MOMENTS];  // ns

// Note that the warp comes to a moment. A program may have several rows: of what happens first, the
// first time is kept, and of all else the last. Then what was noted of later moments was of a row
// before, or of another launch, and is taken back.
DEVICE void mark(Moment moment) {
    if (threadIdx.x % 32 == 0) {
        u64 now, *own = marks[blockIdx.x][threadIdx.x / 32];
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)::"memory");
        bool once = moment >= Moment::LENGTHS_KNOWN && moment <= Moment::FIRST_THERE;
        if (once) {
            atomicMin(own + (int)moment, now);  // asks for no answer, so nothing is waited for
        } else {
            own[(int)moment] = now;
#pragma unroll
            for (int later = (int)moment + 1; later <= (int)Moment::ENDED; ++later) own[later] = NEVER;
        }
    }
    __syncwarp();
}

#else

DEVICE void mark(Moment) {}

#endif
