// How a warp's rows are written when they are done.
#pragma once
#include "prefill_query.cuh"

DEVICE u32 pack_output(float low, float high) {
    return BF16 ? pack_bf16(low, high) : pack_f16(low, high);
}

// Write float32, of a share to its place, from where it is: four lanes have 32 bytes that lie together.
DEVICE void store_floats(const Rows &rows, const Item &item, const float (&outputs)[OUTPUTS]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        int row = rows.warp_row + rows.lane / 4 + 8 * i;
        int token = row / TILE_HEADS, head = item.query_head(row);
        if (!item.has_row(row)) continue;
        float *to = (float *)rows.p.out + (item.first_token + token) * rows.p.out_token_stride +
                    head * rows.p.out_head_stride;
        if (item.shares > 1) to = rows.p.share_out + rows.place_of_share(item, token, head) * HEAD_SIZE;
        to += rows.lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < HEAD_SIZE / 8; ++j)
            *(float2 *)(to + j * 8) = make_float2(outputs[4 * j + 2 * i], outputs[4 * j + 2 * i + 1]);
    }
}

// Write the warp's rows by way of its part of the query tile, 16 bytes a lane.
DEVICE void store(const Rows &rows, const Item &item, const float (&outputs)[OUTPUTS], u32 tile) {
    int row = rows.warp_row + rows.lane % 16;
#pragma unroll
    for (int i = 0; i < HEAD_SIZE / 16; ++i) {
        const float *o = outputs + 8 * i;
        store_matrices(tile + chunk_of_row(row, 2 * i + rows.lane / 16),
                       {pack_output(o[0], o[1]), pack_output(o[2], o[3]), pack_output(o[4], o[5]),
                        pack_output(o[6], o[7])});
    }
    __syncwarp();
    constexpr int CHUNKS = HEAD_SIZE / 8;
#pragma unroll
    for (int i = rows.lane; i < 16 * CHUNKS; i += 32) {
        int from_row = rows.warp_row + i / CHUNKS, chunk = i % CHUNKS;
        u32 x[4];
        load_shared(x, tile + chunk_of_row(from_row, chunk));
        int token = from_row / TILE_HEADS, head = item.query_head(from_row);
        if (item.has_row(from_row)) {
            u16 *to = (u16 *)rows.p.out + (item.first_token + token) * rows.p.out_token_stride +
                      head * rows.p.out_head_stride + chunk * 8;
            store_16_bytes(to, x);
        }
    }
}
