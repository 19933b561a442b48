// Small kernels, each for a property of the emulated machine: `name` says which one runs.
#include "prefill_products.cuh"

struct Parameters {
    TensorMap map, other;
    const void *in, *with;
    void *out;
    int a, b, c, d, e, f;
    char name[32];
};

DEVICE u32 make_barrier(u32 at, u32 arrivals, bool is_fenced = true) {
    if (threadIdx.x == 0) {
        barrier_init(at, arrivals);
        if (is_fenced) barrier_init_fence();
    }
    __syncthreads();
    return at;
}

DEVICE void zeros_to(u32 address) { store_shared(address, {0, 0, 0, 0}); }

// ---- who waits

DEVICE void waits_for_nobody(const Parameters &p, u32 base) {
    make_barrier(base, 1);
    if ((int)threadIdx.x >= p.a && (int)threadIdx.x < p.b) barrier_wait(base, 0);
}

DEVICE void waits_at_a_barrier(const Parameters &p, u32) {
    if ((int)threadIdx.x / 32 < p.a) named_barrier(3, p.b);
}

// Warps take turns: each adds to `out` behind the one before, and goes on at once when it has told the next.
DEVICE void takes_turns(const Parameters &p, u32) {
    int warp = threadIdx.x / 32, next = (warp + 1) % 3;
    if (warp == 2) named_barrier_arrive(4, 64);
    for (int turn = 0; turn < 3; ++turn) {
        named_barrier(4 + warp, 64);
        if (threadIdx.x % 32 == 0) {
            int *count = (int *)p.out;
            count[1 + count[0]++] = warp;
        }
        if (turn < 2 || warp < p.a) named_barrier_arrive(4 + next, 64);
    }
}

// The first warp arrives for phases that the second passes one by one, or waits in vain for.
DEVICE void comes_late(const Parameters &p, u32 base) {
    make_barrier(base, 1);
    if (threadIdx.x < 32) {
        for (int phase = 0; phase < 2; ++phase) {
            if (threadIdx.x == 0) barrier_arrive(base);
            if (p.a) __syncthreads();
        }
        if (!p.a) __syncthreads();
    } else {
        if (!p.a) __syncthreads();
        barrier_wait(base, 0);
        if (p.a) __syncthreads();
        if (p.a) barrier_wait(base, 1);
        if (p.a) __syncthreads();
    }
}

DEVICE void parts_ways(const Parameters &, u32) {
    if (threadIdx.x % 2)
        __syncwarp();
    else
        __shfl_sync(~0u, 1, 0);
}

DEVICE void ends_before_its_warp(const Parameters &, u32) {
    if (threadIdx.x != 5) __syncwarp();
}

DEVICE void some_end_before_all_meet(const Parameters &p, u32) {
    if (threadIdx.x >= 32) return;
    __syncthreads();
    ((int *)p.out)[threadIdx.x] = threadIdx.x;
}

// One program's thread leaves what the other's looks for, if it does.
DEVICE void looks_for_a_word(const Parameters &p, u32) {
    float4 *place = (float4 *)p.out;
    if (threadIdx.x) return;
    if (blockIdx.x == 0 && p.a) leave(place, make_float4(1, 2, 3, 4));
    if (blockIdx.x == 1)
        while (look(place).w == 0) {
        }
}

// ---- barriers

DEVICE void arrives_once_more(const Parameters &, u32 base) {
    make_barrier(base, 1);
    if (threadIdx.x) return;
    barrier_arrive_expect(base, 16);
    barrier_arrive(base);
}

DEVICE void waits_where_no_barrier_is(const Parameters &, u32 base) { barrier_wait(base, 0); }

// ---- shared memory

DEVICE void stores(const Parameters &p, u32 base) {
    make_barrier(base + 64, 1);
    if (threadIdx.x == 0) zeros_to(base + p.a);
}

DEVICE void overflows_its_stack(const Parameters &p, u32) {
    volatile char much[100 << 10];
    for (int i = 0; i < (int)sizeof much; ++i) much[i] = (char)p.a;
}

// ---- copies

DEVICE void copies(const Parameters &p, u32 base) {
    make_barrier(base, 32);
    u32 own = base + 128 + threadIdx.x * 16;
    copy_16_bytes(own, (const char *)p.in + threadIdx.x * 16, evict_first());
    barrier_arrive_when_copied(base);
    u32 x[4];
    if (!p.a) load_shared(x, own);
    barrier_wait(base, 0);
    if (p.a) load_shared(x, own);
    memcpy((char *)p.out + threadIdx.x * 16, x, 16);
}

// A box of p.a bytes at the corner p.b to p.f, to memory.
DEVICE void loads_a_box(const Parameters &p, u32 base) {
    u32 barrier = make_barrier(base + 8192, 1);
    if (threadIdx.x == 0) {
        barrier_arrive_expect(barrier, p.a);
        tma_load(base, &p.map, p.b, p.c, p.d, p.e, p.f, barrier);
    }
    barrier_wait(barrier, 0);
    for (int at = threadIdx.x * 16; at < p.a; at += 32 * 16) {
        u32 x[4];
        load_shared(x, base + at);
        memcpy((char *)p.out + at, x, 16);
    }
}

DEVICE void reads_a_box_early(const Parameters &p, u32 base) {
    u32 barrier = make_barrier(base + 8192, 1);
    u32 x[4];
    if (threadIdx.x == 0) {
        barrier_arrive_expect(barrier, p.a);
        tma_load(base, &p.map, 0, 0, 0, 0, 0, barrier);
        load_shared(x, base);
        memcpy(p.out, x, 16);
    }
    barrier_wait(barrier, 0);
}

DEVICE void leaves_a_copy_behind(const Parameters &p, u32 base) {
    u32 barrier = make_barrier(base + 8192, 1);
    if (threadIdx.x == 0) {
        barrier_arrive_expect(barrier, p.a);
        tma_load(base, &p.map, 0, 0, 0, 0, 0, barrier);
    }
}

DEVICE void hides_a_barrier_from_the_tma(const Parameters &p, u32 base) {
    u32 barrier = make_barrier(base + 8192, 1, false);
    if (threadIdx.x == 0) tma_load(base, &p.map, 0, 0, 0, 0, 0, barrier);
}

DEVICE void writes_before_the_tma(const Parameters &p, u32 base) {
    u32 barrier = make_barrier(base + 8192, 1);
    if (threadIdx.x == 3) zeros_to(base + 32);
    if (threadIdx.x == 3 && p.b) fence_for_tma();
    __syncthreads();
    if (threadIdx.x == 0) {
        barrier_arrive_expect(barrier, p.a);
        tma_load(base, &p.map, 0, 0, 0, 0, 0, barrier);
    }
    barrier_wait(barrier, 0);
}

// ---- products

// Lane's parts of a matrix of 16 x 16 there and back: as it is, transposed on loading, or in registers.
DEVICE void moves_matrices(const Parameters &p, u32 base) {
    int lane = threadIdx.x;
    u32 x[4], row = base + lane % 16 * 32 + lane / 16 * 16;
    memcpy(x, (const char *)p.in + lane * 16, 16);
    store_shared(base + lane * 16, x);
    __syncwarp();
    if (p.a == 1)
        load_matrices_transposed(x, row);
    else
        load_matrices(x, row);
    if (p.a == 2)
        for (u32 &part : x) part = transpose_matrix(part);
    __syncwarp();
    // transposed, the matrices on the right come first to the left
    store_matrices(p.a ? base + lane % 8 * 32 + lane / 16 * 256 + lane / 8 % 2 * 16 : row, x);
    __syncwarp();
    load_shared(x, base + lane * 16);
    memcpy((char *)p.out + lane * 16, x, 16);
}

// out [16, 8] = a [16, 16] b [8, 16] transposed
DEVICE void multiplies_in_a_warp(const Parameters &p, u32) {
    int lane = threadIdx.x;
    const u16 *in = (const u16 *)p.in + lane / 4 * 16 + lane % 4 * 2;
    const u16 *with = (const u16 *)p.with + lane / 4 * 16 + lane % 4 * 2;
    u32 a[4], b[2];
    float c[4] = {};
    for (int i = 0; i < 4; ++i) memcpy(&a[i], in + i % 2 * 8 * 16 + i / 2 * 8, 4);
    for (int i = 0; i < 2; ++i) memcpy(&b[i], with + i * 8, 4);
    if (BF16)
        multiply_bf16(c, a, b);
    else
        multiply_f16(c, a, b);
    for (int i = 0; i < 4; ++i) ((float *)p.out)[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = c[i];
}

constexpr u32 FIRST = 0, SECOND = 8192, FULL = 8192 + 16384;

DEVICE void load_factors(const Parameters &p, u32 base, bool in_columns) {
    u32 barrier = make_barrier(base + FULL, 1);
    if (threadIdx.x == 0) {
        barrier_arrive_expect(barrier, 8192 + 16384);
        tma_load(base + FIRST, &p.map, 0, 0, 0, 0, barrier);
        tma_load(base + SECOND, &p.other, 0, 0, 0, 0, barrier);
        if (in_columns) tma_load(base + SECOND + 8192, &p.other, 64, 0, 0, 0, barrier);
    }
    barrier_wait(barrier, 0);
}

template <int COUNT>
void write_sums(const Parameters &p, const float (&d)[COUNT]) {
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
    for (int i = 0; i < COUNT; ++i)
        ((float *)p.out)[(row + i % 4 / 2 * 8) * (2 * COUNT) + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// This lane's part of a [64, 64], 16 columns a step.
DEVICE void registers_of_rows(const Parameters &p, u32 (&a)[4][4]) {
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
    for (int step = 0; step < 4; ++step)
        for (int i = 0; i < 4; ++i)
            memcpy(&a[step][i],
                   (const u16 *)p.in + (row + i % 2 * 8) * 64 + step * 16 + i / 2 * 8 + lane % 4 * 2, 4);
}

// out [64, 128] = a [64, 64] b [128, 64] transposed, of e4m3 of 128 columns each; 64 columns if p.a. Without waiting if p.b,
// without `products_begin` if p.c, by some warps if p.d, with a write to a before it if p.e, and with a
// from memory in half of the steps if p.f.
DEVICE void multiplies_rows(const Parameters &p, u32 base) {
    load_factors(p, base, false);
    if (p.d && threadIdx.x / 32 == 3) return;
    float d[64];
    float(&narrow)[32] = (float(&)[32])d;
    for (float &x : d) x = NAN;
    u32 own[4][4];
    if (p.f) registers_of_rows(p, own);
    if (!p.c) products_begin();
    for (int step = 0; step < 4; ++step) {
        u64 a = descriptor(base + FIRST + step * 32, 16, 1024), b = descriptor(base + SECOND + step * 32, 16, 1024);
        if (p.f && step % 2 == 0 && p.a)
            multiply_scores(narrow, own[step], b, step > 0);
        else if (p.f && step % 2 == 0)
            multiply_scores(d, own[step], b, step > 0);
        else if (p.a)
            multiply_scores(narrow, a, b, step > 0);
        else
            multiply_scores(d, a, b, step > 0);
    }
    products_end();
    if (p.e && threadIdx.x == 0) zeros_to(base + FIRST + 4096);
    if (!p.b) wait_for_products<0>();
    if (p.a)
        write_sums(p, narrow);
    else
        write_sums(p, d);
    wait_for_products<0>();
}

// out [64, 128] = a [64, 64] b [64, 128], a from memory
DEVICE void multiplies_columns(const Parameters &p, u32 base) {
    load_factors(p, base, true);
    float d[64] = {};
    u32 weights[4][4];
    registers_of_rows(p, weights);
    products_begin();
    for (int step = 0; step < 4; ++step) {
        u64 b = descriptor(base + SECOND + step * 2048, 8192, 1024);
        if (p.a) {
            multiply_values_64(d, weights[step], b);
            multiply_values_64(d + 32, weights[step], b + 8192 / 16);
        } else {
            multiply_values_128(d, weights[step], b);
        }
    }
    products_end();
    wait_for_products<0>();
    write_sums(p, d);
}

DEVICE void writes_before_a_product(const Parameters &p, u32 base) {
    if (threadIdx.x == 7) zeros_to(base + SECOND + 1024);
    if (threadIdx.x == 7 && p.a) fence_for_tma();
    __syncthreads();
    float d[32];
    products_begin();
    multiply_scores(d, descriptor(base, 16, 1024), descriptor(base + SECOND, 16, 1024), 0);
    products_end();
    wait_for_products<0>();
}

// ---- numbers and order

DEVICE void converts(const Parameters &p, u32) {
    for (int i = threadIdx.x; i < p.b; i += 32) {
        float x = ((const float *)p.in)[i];
        u32 bits = ((const u32 *)p.with)[i];
        u32 *to = (u32 *)p.out + i;
        if (p.a == 0) *to = pack_f16(x, -x);
        if (p.a == 1) *to = pack_bf16(x, -x);
        if (p.a == 2) *to = __float_as_uint(f16_high(bits << 16));
        if (p.a == 3) *to = __float_as_uint(bf16_low(bits));
        if (p.a == 4) *to = f16_of_e4m3(bits);
        if (p.a == 5) *to = pack_e4m3(x, -x, x / 2, x * 2);
    }
}

DEVICE void draws_numbers(const Parameters &p, u32) {
    int thread = blockIdx.x * blockDim.x + threadIdx.x;
    ((int *)p.out)[thread] = atomicAdd((int *)p.with, 1);
}

void kernel(const Parameters &p) {
    DYNAMIC_SHARED(memory, 1024);
    u32 base = shared_address(memory);
#define RUN(function) \
    if (!strcmp(p.name, #function)) return function(p, base)
    RUN(waits_for_nobody);
    RUN(waits_at_a_barrier);
    RUN(takes_turns);
    RUN(comes_late);
    RUN(parts_ways);
    RUN(ends_before_its_warp);
    RUN(some_end_before_all_meet);
    RUN(looks_for_a_word);
    RUN(arrives_once_more);
    RUN(waits_where_no_barrier_is);
    RUN(stores);
    RUN(overflows_its_stack);
    RUN(copies);
    RUN(loads_a_box);
    RUN(reads_a_box_early);
    RUN(leaves_a_copy_behind);
    RUN(hides_a_barrier_from_the_tma);
    RUN(writes_before_the_tma);
    RUN(moves_matrices);
    RUN(multiplies_in_a_warp);
    RUN(multiplies_rows);
    RUN(multiplies_columns);
    RUN(writes_before_a_product);
    RUN(converts);
    RUN(draws_numbers);
    machine::fail("is asked for %s", p.name);
}
