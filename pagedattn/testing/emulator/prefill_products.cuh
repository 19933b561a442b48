// The products of a warpgroup by the names of the kernels' prefill_products.cuh, done on the host, each
// warp's 16 rows by themselves: at once, or only when a lane waits for them (PTX ISA, "Asynchronous
// Warpgroup Level Matrix Instructions").
#pragma once
#include "hopper.cuh"

constexpr bool OF_BF16 = BF16 && !FP8;  // factors of 16 bits, else of float16
constexpr int BYTES = FP8_PRODUCTS ? 1 : 2;  // of a factor's number
constexpr int DEPTH = 32;                    // bytes that a product sums over

// A number of a factor from its bits.
DEVICE float number_of(u32 bits) {
    return BYTES == 1 ? f16_low(f16_of_e4m3(bits)) : OF_BF16 ? bf16_low(bits) : f16_low(bits);
}

DEVICE void products_begin() {
    int none = 0;
    machine::together("wgmma.fence", none, [](int **) { machine::current->warp->may_multiply = true; });
}

DEVICE void do_products(machine::Group &group) {
    for (machine::Work &product : group.products) product();
    group.products.clear();
}

DEVICE void products_end() {
    int none = 0;
    machine::together("wgmma.commit_group", none, [](int **) {
        machine::Warp &warp = *machine::current->warp;
        warp.groups.push_back(std::exchange(warp.open, {}));
        warp.may_multiply = false;
        if (machine::here->random(2))
            for (machine::Group &group : warp.groups) do_products(group);
    });
}

template <int PENDING>
void wait_for_products() {
    int none = 0;
    machine::together("wgmma.wait_group", none, [](int **) {
        auto &groups = machine::current->warp->groups;
        for (; groups.size() > PENDING; groups.pop_front()) {
            do_products(groups.front());
            for (u32 line : groups.front().lines) --machine::current->program->num_readers[line];
        }
    });
}

template <int COUNT>
void pin(float (&)[COUNT]) {}

DEVICE u64 descriptor(u32 address, u32 leading_stride, u32 stride) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)(leading_stride >> 4) << 16 | (u64)(stride >> 4) << 32 |
           1ull << 62;
}

// A factor in shared memory, swizzled by 128 bytes, as its descriptor says where it lies. Its depth is
// what is summed over, of which a product takes 32 bytes; its rows are a's rows or b's columns.
struct Factor {
    u32 address, leading_stride, stride;
    bool depth_is_innermost;  // "K-major"; else rows are, 64 of them together ("MN-major")

    Factor(u64 descriptor, bool depth_is_innermost)
        : address((descriptor & 0x3fff) << 4),
          leading_stride((descriptor >> 16 & 0x3fff) << 4),
          stride((descriptor >> 32 & 0x3fff) << 4),
          depth_is_innermost(depth_is_innermost) {
        if (descriptor >> 46 != 1 << 16) machine::fail("multiplies what is not swizzled by 128 bytes from 1024 on");
    }

    // Call `work` with the first row and depth, and the address, of each 16 bytes that lie together.
    template <class PerLine>
    void each_line(int rows, PerLine work) const {
        if (depth_is_innermost) {
            for (int row = 0; row < rows; ++row)
                for (int byte = 0; byte < DEPTH; byte += 16)
                    work(row, byte / BYTES, swizzled(address + row / 8 * stride + row % 8 * 128 + byte, 128));
        } else {
            for (int depth = 0; depth < 16; ++depth)
                for (int row = 0; row < rows; row += 8)
                    work(row, depth, swizzled(address + row / 64 * leading_stride + depth / 8 * stride +
                                                  depth % 8 * 128 + row % 64 * 2, 128));
        }
    }

    // What a group of products is going to read.
    void note_read(int rows, machine::Group &group) const {
        each_line(rows, [&](int, int, u32 line) {
            machine::require_fenced("a product", line, 16);
            ++machine::current->program->num_readers[line / machine::LINE];
            group.lines.push_back(line / machine::LINE);
        });
    }

    void read(int rows, float (*to)[DEPTH]) const {
        each_line(rows, [&](int row, int depth, u32 line) {
            const unsigned char *from = machine::shared(line, 16);
            for (int i = 0; i < 16 / BYTES; ++i) {
                u32 bits = 0;
                memcpy(&bits, from + i * BYTES, BYTES);
                (depth_is_innermost ? to[row][depth + i] : to[row + i][depth]) = number_of(bits);
            }
        });
    }
};

struct ProductOfLane {
    float *d;
    const u32 *a;
};

// d [16 of this warp, N] = (add ? d : 0) + a b, where `read_first` has rows of a.
template <int N, class ReadFirst>
void product(float *d, const u32 *a, const Factor &second, bool add, ReadFirst read_first) {
    ProductOfLane own{d, a};
    machine::together("wgmma", own, [&](ProductOfLane **lanes) {
        machine::Warp &warp = *machine::current->warp;
        if (!warp.may_multiply) machine::fail("multiplies without `products_begin` since the last group");
        ++warp.num_products;
        second.note_read(N, warp.open);
        std::vector<ProductOfLane> all(machine::WARP);
        for (int lane = 0; lane < machine::WARP; ++lane) all[lane] = *lanes[lane];
        warp.open.products.push_back([=] {
            float rows[16][DEPTH] = {}, columns[N][DEPTH] = {};
            read_first(all, rows);
            second.read(N, columns);
            for (int lane = 0; lane < machine::WARP; ++lane)
                for (int i = 0; i < N / 2; ++i) {
                    const float *x = rows[lane / 4 + i % 4 / 2 * 8], *y = columns[i / 4 * 8 + lane % 4 * 2 + i % 2];
                    float sum = 0;
                    for (int k = 0; k < DEPTH / BYTES; ++k) sum += x[k] * y[k];
                    float &to = all[lane].d[i];
                    to = add ? to + sum : sum;
                }
        });
    });
}

// a [64, 16] and b [N, 16], transposed, in shared memory; of e4m3 32 instead of 16.
template <int N>
void product_of_shared(float *d, u64 a, u64 b, bool add) {
    Factor first(a, true);
    if (machine::current->thread % machine::WARP == 0) first.note_read(64, machine::current->warp->open);
    first.address += machine::current->thread / machine::WARP % 4 * 2 * first.stride;  // this warp's rows
    product<N>(d, nullptr, Factor(b, true), add,
               [=](const std::vector<ProductOfLane> &, float (*rows)[DEPTH]) { first.read(16, rows); });
}

// a [64, 16] in registers, b in shared memory; of e4m3 32 instead of 16.
template <int N>
void product_of_registers(float *d, const u32 *a, const Factor &b, bool add = true) {
    product<N>(d, a, b, add, [](const std::vector<ProductOfLane> &lanes, float (*rows)[DEPTH]) {
        constexpr int NUMBERS = 4 / BYTES;  // of a register
        for (int lane = 0; lane < machine::WARP; ++lane)
            for (int i = 0; i < 4; ++i)
                for (int j = 0; j < NUMBERS; ++j) {
                    u32 bits = lanes[lane].a[i] >> 8 * BYTES * j & (BYTES == 1 ? 0xff : 0xffff);
                    rows[lane / 4 + i % 2 * 8][(lane % 4 + i / 2 * 4) * NUMBERS + j] = number_of(bits);
                }
    });
}

DEVICE void multiply_scores(float (&d)[64], u64 a, u64 b, int add) { product_of_shared<128>(d, a, b, add); }
DEVICE void multiply_scores(float (&d)[32], u64 a, u64 b, int add) { product_of_shared<64>(d, a, b, add); }
DEVICE void multiply_scores(float (&d)[64], const u32 (&a)[4], u64 b, int add) {
    product_of_registers<128>(d, a, Factor(b, true), add);
}
DEVICE void multiply_scores(float (&d)[32], const u32 (&a)[4], u64 b, int add) {
    product_of_registers<64>(d, a, Factor(b, true), add);
}
DEVICE void multiply_values_128(float *d, const u32 *a, u64 b) { product_of_registers<128>(d, a, Factor(b, FP8_PRODUCTS)); }
DEVICE void multiply_values_64(float *d, const u32 *a, u64 b) { product_of_registers<64>(d, a, Factor(b, FP8_PRODUCTS)); }
