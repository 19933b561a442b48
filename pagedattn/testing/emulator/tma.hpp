// The tensor memory accelerator: boxes of a tensor to shared memory, some time later, with zeros where
// the tensor ends. Source: PTX ISA, "Tensors" and "Swizzling Modes".
#pragma once
#include "cuda_names.hpp"

struct alignas(64) TensorMap {
    u64 words[16];
};

// What `tensor_map` of the emulator puts into a TensorMap.
struct TensorDescription {
    const unsigned char *memory;
    u64 sizes[5], strides[5];  // elements; bytes, of which the first is an element's
    u16 box[5];                // elements
    u16 swizzle, dimensions;   // bytes that the swizzle spans, 16 for none
};
static_assert(sizeof(TensorDescription) <= sizeof(TensorMap), "a map holds a description");

// Where 16 bytes at a multiple of 16 go: within what the swizzle spans, by which of 8 times 128 bytes
// they lie in.
DEVICE u32 swizzled(u32 address, u32 swizzle) { return address ^ (address >> 7 & (swizzle / 16 - 1)) << 4; }

// Bring 16 bytes of a row, of which the tensor has the columns from 0 to `columns`.
DEVICE void bring_16_bytes(unsigned char *to, const unsigned char *row, i64 column, i64 columns, int bytes) {
    if (row && column >= 0 && column + 16 / bytes <= columns) {
        memcpy(to, row + column * bytes, 16);
        return;
    }
    memset(to, 0, 16);
    for (int i = 0; i < 16 / bytes; ++i)
        if (row && column + i >= 0 && column + i < columns) memcpy(to + i * bytes, row + (column + i) * bytes, bytes);
}

template <int DIMENSIONS>
void tma_load_box(u32 to, const TensorMap *map, const int (&corner)[DIMENSIONS], u32 barrier) {
    TensorDescription tensor;
    memcpy(&tensor, map, sizeof tensor);
    if (tensor.dimensions != DIMENSIONS)
        machine::fail("gives the TMA %d coordinates of %d", DIMENSIONS, tensor.dimensions);
    int bytes = (int)tensor.strides[0];
    u32 row_bytes = tensor.box[0] * bytes, rows = 1;
    for (int d = 1; d < DIMENSIONS; ++d) rows *= tensor.box[d];
    unsigned char *place = machine::shared_to_write(to, rows * row_bytes, 128);
    machine::require_fenced("the TMA", to, rows * row_bytes);
    if (machine::barrier_at(barrier).unfenced_by) machine::fail("gives the TMA a barrier that was not fenced");
    memset(place, machine::POISON, rows * row_bytes);
    std::vector<int> from(corner, corner + DIMENSIONS);
    machine::later([=] {
        for (u32 number = 0; number < rows; ++number) {
            const unsigned char *row = tensor.memory;
            u32 rest = number;
            for (int d = 1; d < DIMENSIONS; ++d) {
                i64 at = (i64)from[d] + rest % tensor.box[d];
                rest /= tensor.box[d];
                row = row && at >= 0 && at < (i64)tensor.sizes[d] ? row + at * (i64)tensor.strides[d] : nullptr;
            }
            for (u32 byte = 0; byte < row_bytes; byte += 16) {
                u32 at = swizzled(to + number * row_bytes + byte, tensor.swizzle);
                bring_16_bytes(machine::current->program->shared + at, row, (i64)from[0] + byte / bytes,
                               (i64)tensor.sizes[0], bytes);
            }
        }
        machine::bytes_come(barrier, rows * row_bytes);
    });
}

DEVICE void prefetch_tensor_map(const TensorMap *) {}
DEVICE u64 evict_first() { return 0; }

DEVICE void tma_load(u32 to, const TensorMap *map, int c0, int c1, int c2, int c3, int c4, u32 barrier, u64) {
    tma_load_box<5>(to, map, {c0, c1, c2, c3, c4}, barrier);
}

DEVICE void tma_load(u32 to, const TensorMap *map, int c0, int c1, int c2, int c3, int c4, u32 barrier) {
    tma_load_box<5>(to, map, {c0, c1, c2, c3, c4}, barrier);
}

DEVICE void tma_load(u32 to, const TensorMap *map, int c0, int c1, int c2, int c3, u32 barrier) {
    tma_load_box<4>(to, map, {c0, c1, c2, c3}, barrier);
}
