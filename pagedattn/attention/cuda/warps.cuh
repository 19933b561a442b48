// What the lanes of a warp make of each other's numbers.
#pragma once
#include "hopper.cuh"

// The sum of the lanes' numbers up to and with one's own.
DEVICE int sum_up_to(int own, int lane) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        int lower = __shfl_up_sync(0xffffffff, own, step);
        if (lane >= step) own += lower;
    }
    return own;
}
