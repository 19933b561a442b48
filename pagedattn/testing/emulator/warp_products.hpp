// Matrices of 8 x 8 numbers of 16 bits, and a warp's products of them, by the names of the kernels'
// hopper.cuh. A lane has of a matrix the row lane / 4, and of that the columns 2 * (lane % 4) + {0, 1}
// (PTX ISA, "Warp Level Matrix Instructions").
#pragma once
#include "numbers.hpp"

struct Matrix {
    u16 rows[8][8];

    u32 part_of(int lane) const {
        u32 pair;
        memcpy(&pair, &rows[lane / 4][lane % 4 * 2], 4);
        return pair;
    }

    u32 transposed_part_of(int lane) const {
        int row = lane / 4, column = lane % 4 * 2;
        return rows[column][row] | (u32)rows[column + 1][row] << 16;
    }
};

template <bool TRANSPOSED>
void load_matrices_of_warp(const char *name, u32 (&to)[4], u32 address) {
    struct Own {
        u32 *to, address;
    } own{to, address};
    machine::together(name, own, [](Own **lanes) {
        for (int i = 0; i < 4; ++i) {
            Matrix matrix;
            for (int row = 0; row < 8; ++row)
                memcpy(matrix.rows[row], machine::shared(lanes[i * 8 + row]->address, 16), 16);
            for (int lane = 0; lane < machine::WARP; ++lane)
                lanes[lane]->to[i] = TRANSPOSED ? matrix.transposed_part_of(lane) : matrix.part_of(lane);
        }
    });
}

DEVICE void load_matrices(u32 (&to)[4], u32 address) { load_matrices_of_warp<false>("ldmatrix", to, address); }
DEVICE void load_matrices_transposed(u32 (&to)[4], u32 address) {
    load_matrices_of_warp<true>("ldmatrix.trans", to, address);
}

DEVICE void store_matrices(u32 address, const u32 (&x)[4]) {
    struct Own {
        machine::Lane *lane;
        const u32 *from;
        u32 address;
    } own{machine::current, x, address};
    machine::together("stmatrix", own, [](Own **lanes) {
        for (int i = 0; i < 4; ++i)
            for (int lane = 0; lane < machine::WARP; ++lane) {
                u32 row = lanes[i * 8 + lane / 4]->address;
                memcpy(machine::shared_to_write(row, 16) + lane % 4 * 4, lanes[lane]->from + i, 4);
                machine::note_written(lanes[lane]->lane, row);
            }
    });
}

DEVICE u32 transpose_matrix(u32 part) {
    machine::together("movmatrix", part, [](u32 **lanes) {
        Matrix matrix;
        for (int lane = 0; lane < machine::WARP; ++lane) memcpy(&matrix.rows[lane / 4][lane % 4 * 2], lanes[lane], 4);
        for (int lane = 0; lane < machine::WARP; ++lane) *lanes[lane] = matrix.transposed_part_of(lane);
    });
    return part;
}

// c [16, 8] += a [16, 16] b [16, 8]
template <class Low, class High>
void multiply_of_warp(const char *name, float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], Low low, High high) {
    struct Own {
        float *c;
        const u32 *a, *b;
    } own{c, a, b};
    machine::together(name, own, [=](Own **lanes) {
        float first[16][16], second[8][16];  // of b the columns
        for (int lane = 0; lane < machine::WARP; ++lane) {
            int row = lane / 4, column = lane % 4 * 2;
            for (int i = 0; i < 4; ++i) {
                first[row + i % 2 * 8][column + i / 2 * 8] = low(lanes[lane]->a[i]);
                first[row + i % 2 * 8][column + i / 2 * 8 + 1] = high(lanes[lane]->a[i]);
            }
            for (int i = 0; i < 2; ++i) {
                second[row][column + i * 8] = low(lanes[lane]->b[i]);
                second[row][column + i * 8 + 1] = high(lanes[lane]->b[i]);
            }
        }
        for (int lane = 0; lane < machine::WARP; ++lane)
            for (int i = 0; i < 4; ++i) {
                const float *x = first[lane / 4 + i / 2 * 8], *y = second[lane % 4 * 2 + i % 2];
                float sum = 0;
                for (int k = 0; k < 16; ++k) sum += x[k] * y[k];
                lanes[lane]->c[i] += sum;
            }
    });
}

DEVICE void multiply_bf16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    multiply_of_warp("mma of bfloat16", c, a, b, bf16_low, bf16_high);
}

DEVICE void multiply_f16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    multiply_of_warp("mma of float16", c, a, b, f16_low, f16_high);
}
