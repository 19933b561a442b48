// Hopper's instructions by name: barriers, the tensor memory accelerator (TMA), matrix products.
// Source: PTX ISA 9.0. Addresses of shared memory are 32-bit, as the instructions take them.
#pragma once
#include "numbers.cuh"

struct alignas(64) TensorMap {
    u64 words[16];
};

// Shared memory whose size the launch says; so aligned, it lies at a place known when this is compiled.
#define DYNAMIC_SHARED(name, alignment) extern __shared__ __align__(alignment) unsigned char name[]

DEVICE u32 shared_address(const void *pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// ---- launches that begin while the one before ends (programmatic dependent launch)

// Until the launches before are over and what they wrote is seen; no memory is read or written before, but
// by a launch of which the one before has waited for all that is read and counts with its own counters.
DEVICE void wait_for_the_launch_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Let the next launch's programs come as this one's go; they wait as above.
DEVICE void allow_the_next_launch() { asm volatile("griddepcontrol.launch_dependents;"); }

// ---- barriers in shared memory

DEVICE void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Make initialised barriers known to the TMA; before the block's first __syncthreads.
DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrive, and expect so many bytes from the TMA before the phase ends.
DEVICE void barrier_arrive_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

DEVICE void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra over;\n"
        "bra again;\n"
        "over:\n"
        "}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Barrier of some of the block's warps.
DEVICE void named_barrier(int number, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Come to it as one of its warps, and go on.
DEVICE void named_barrier_arrive(int number, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// ---- copies by threads

// From memory to shared memory; `policy` is what `evict_first` returns.
DEVICE void copy_16_bytes(u32 to, const void *from, u64 policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "l"(policy)
                 : "memory");
}

// Arrive once all of this thread's copies before are done.
DEVICE void barrier_arrive_when_copied(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Add to a number in memory; what was written before, here and by those who added before, is seen by
// who comes after.
DEVICE int add_in_order(int *to, int x) {
    int before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;" : "=r"(before) : "l"(to), "r"(x) : "memory");
    return before;
}

// The halves of 16 bytes, and 16 bytes of two halves.
DEVICE void halve(const float4 &x, u64 (&to)[2]) {
    to[0] = __float_as_uint(x.x) | (u64)__float_as_uint(x.y) << 32;
    to[1] = __float_as_uint(x.z) | (u64)__float_as_uint(x.w) << 32;
}

DEVICE float4 joined(const u64 (&x)[2]) {
    return make_float4(__uint_as_float((u32)x[0]), __uint_as_float((u32)(x[0] >> 32)),
                       __uint_as_float((u32)x[1]), __uint_as_float((u32)(x[1] >> 32)));
}

// Put 16 bytes in the place of others in memory, which are returned; as one.
DEVICE float4 exchange(float4 *at, const float4 &x) {
    u64 mine[2], theirs[2];
    halve(x, mine);
    asm volatile(
        "{\n"
        ".reg .b128 mine, theirs;\n"
        "mov.b128 mine, {%2, %3};\n"
        "atom.relaxed.gpu.global.exch.b128 theirs, [%4], mine;\n"
        "mov.b128 {%0, %1}, theirs;\n"
        "}"
        : "=l"(theirs[0]), "=l"(theirs[1])
        : "l"(mine[0]), "l"(mine[1]), "l"(at)
        : "memory");
    return joined(theirs);
}

// 16 bytes, as one, to memory where another program looks for them, and what is there now.
DEVICE void leave(float4 *at, const float4 &x) {
    u64 mine[2];
    halve(x, mine);
    asm volatile(
        "{\n"
        ".reg .b128 mine;\n"
        "mov.b128 mine, {%1, %2};\n"
        "st.relaxed.gpu.global.b128 [%0], mine;\n"
        "}" ::"l"(at), "l"(mine[0]), "l"(mine[1])
        : "memory");
}

DEVICE float4 look(const float4 *at) {
    u64 theirs[2];
    asm volatile(
        "{\n"
        ".reg .b128 theirs;\n"
        "ld.relaxed.gpu.global.b128 theirs, [%2];\n"
        "mov.b128 {%0, %1}, theirs;\n"
        "}"
        : "=l"(theirs[0]), "=l"(theirs[1])
        : "l"(at)
        : "memory");
    return joined(theirs);
}

// Put +0 there, which later launches see.
DEVICE void clear(float4 *at) {
    asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %1, %1, %1};" ::"l"(at), "f"(0.f) : "memory");
}

// 16 bytes from or to memory, or shared memory.
DEVICE void store_16_bytes(void *to, const u32 (&x)[4]) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
                 : "memory");
}

DEVICE void store_shared(u32 to, const u32 (&x)[4]) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
                 : "memory");
}

DEVICE void store_shared(u32 to, const u32 (&x)[2]) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(x[0]), "r"(x[1]) : "memory");
}

DEVICE void load_shared(u32 (&to)[4], u32 from) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}

DEVICE void load_shared(u32 (&to)[2], u32 from) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "r"(from) : "memory");
}

// Have what this thread wrote to shared memory be seen by the TMA and by products that read there.
DEVICE void fence_for_tma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

DEVICE void prefetch_l2(const void *from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

// ---- TMA

DEVICE void prefetch_tensor_map(const TensorMap *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// What is read once should leave the L2 first.
DEVICE u64 evict_first() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

DEVICE void tma_load(u32 to, const TensorMap *map, int c0, int c1, int c2, int c3, int c4,
                     u32 barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(to),
        "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "l"(policy)
        : "memory");
}

DEVICE void tma_load(u32 to, const TensorMap *map, int c0, int c1, int c2, int c3, int c4, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(to),
        "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
        : "memory");
}

DEVICE void tma_load(u32 to, const TensorMap *map, int c0, int c1, int c2, int c3, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
        "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

// ---- warps

// True in one lane, in a way that lets the compiler see that one lane runs what depends on it.
DEVICE bool elected() {
    u32 chosen;
    asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(chosen));
    return chosen != 0;
}

// Leave registers to other warpgroups, or take them: a thread then has COUNT.
template <int COUNT>
DEVICE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// ---- matrix products of a warp

// Four 8 x 8 matrices of 16 bits; lanes 8i to 8i + 7 give the addresses of matrix i's rows. A lane
// gets of each the two elements (lane / 4, 2 * (lane % 4) + {0, 1}).
DEVICE void load_matrices(u32 (&to)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

DEVICE void load_matrices_transposed(u32 (&to)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

// The other way: four matrices to shared memory.
DEVICE void store_matrices(u32 address, const u32 (&x)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]),
                 "r"(x[1]), "r"(x[2]), "r"(x[3])
                 : "memory");
}

// An 8 x 8 matrix of 16 bits that lies in the warp's registers as `load_matrices` leaves it.
DEVICE u32 transpose_matrix(u32 matrix) {
    u32 transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(matrix));
    return transposed;
}

// c [16, 8] += a [16, 16] b [16, 8]
DEVICE void multiply_bf16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

DEVICE void multiply_f16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- clusters: programs that run at the same time and reach each other's shared memory

// Come to the cluster's barrier, and wait until all threads of it have come or ended.
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Wait for the end of the first phase of a barrier of which others of the cluster send bytes.
DEVICE void barrier_wait_for_cluster(u32 barrier) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
        "@done bra over;\n"
        "bra again;\n"
        "over:\n"
        "}" ::"r"(barrier)
        : "memory");
}

// Send to the shared memory of the cluster's program of this rank, at an address and with a barrier of it, which
// then has these bytes, that are the same in one's own. The program has begun and waits for them.
DEVICE void send_to_program(u32 to, int rank, float4 x, u32 barrier) {
    asm volatile(
        "{\n"
        ".reg .u32 there, barrier;\n"
        "mapa.shared::cluster.u32 there, %0, %2;\n"
        "mapa.shared::cluster.u32 barrier, %1, %2;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%3, %4, %5, %6}, [barrier];\n"
        "}" ::"r"(to),
        "r"(barrier), "r"(rank), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
        : "memory");
}

DEVICE void send_to_program(u32 to, int rank, float2 x, u32 barrier) {
    asm volatile(
        "{\n"
        ".reg .u32 there, barrier;\n"
        "mapa.shared::cluster.u32 there, %0, %2;\n"
        "mapa.shared::cluster.u32 barrier, %1, %2;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [there], {%3, %4}, [barrier];\n"
        "}" ::"r"(to),
        "r"(barrier), "r"(rank), "f"(x.x), "f"(x.y)
        : "memory");
}
