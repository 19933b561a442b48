// The instructions of the kernels' hopper.cuh by the same names, done on the host.
#pragma once
#include "tma.hpp"
#include "warp_products.hpp"

#define DYNAMIC_SHARED(name, alignment) unsigned char *name = machine::dynamic_shared(alignment)

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
#define MINUS_INFINITY __uint_as_float(0xff800000u)

DEVICE u32 shared_address(const void *pointer) {
    return (u32)((const unsigned char *)pointer - machine::current->program->shared);
}

// One launch runs at a time.
DEVICE void wait_for_the_launch_before() {}
DEVICE void allow_the_next_launch() {}

DEVICE void barrier_init(u32 barrier, u32 arrivals) { machine::init_barrier(barrier, (int)arrivals); }
DEVICE void barrier_init_fence() { machine::fence_barriers(); }

DEVICE void barrier_arrive_expect(u32 barrier, u32 bytes) {
    machine::arrive(barrier, bytes);
    machine::hesitate();
}

DEVICE void barrier_arrive(u32 barrier) { barrier_arrive_expect(barrier, 0); }
DEVICE void barrier_wait(u32 barrier, u32 parity) { machine::wait_for_phase(barrier, parity); }
DEVICE void named_barrier(int number, int threads) { machine::gather(number, threads); }
DEVICE void named_barrier_arrive(int number, int threads) {
    machine::come_to(number, threads);
    machine::hesitate();
}

DEVICE void copy_16_bytes(u32 to, const void *from, u64) {
    unsigned char *place = machine::shared_to_write(to, 16);
    memset(place, machine::POISON, 16);
    machine::current->copies.push_back([=] {
        memcpy(place, from, 16);
        machine::note_written(machine::current, to);
    });
}

DEVICE void barrier_arrive_when_copied(u32 barrier) {
    machine::later([barrier, copies = machine::current->copies] {
        for (const machine::Work &copy : copies) copy();
        machine::arrive(barrier);
    });
    machine::current->copies.clear();
}

DEVICE int add_in_order(int *to, int x) { return atomicAdd(to, x); }

DEVICE float4 exchange(float4 *at, const float4 &x) {
    float4 before = *at;
    *at = x;
    machine::hesitate();
    return before;
}

DEVICE void leave(float4 *at, const float4 &x) {
    *at = x;
    machine::leave();
}

DEVICE float4 look(const float4 *at) {
    machine::look();
    return *at;
}

DEVICE void clear(float4 *at) { *at = {}; }

DEVICE void store_16_bytes(void *to, const u32 (&x)[4]) {
    if ((uintptr_t)to % 16) machine::fail("writes 16 bytes to memory at no multiple of 16");
    memcpy(to, x, 16);
}

DEVICE void store_shared(u32 to, const u32 (&x)[4]) {
    memcpy(machine::shared_to_write(to, 16), x, 16);
    machine::note_written(machine::current, to);
}

DEVICE void store_shared(u32 to, const u32 (&x)[2]) {
    memcpy(machine::shared_to_write(to, 8, 8), x, 8);
    machine::note_written(machine::current, to);
}

DEVICE void load_shared(u32 (&to)[2], u32 from) { memcpy(to, machine::shared(from, 8, 8), 8); }
DEVICE void forget(int &) {}
DEVICE void load_shared(u32 (&to)[4], u32 from) { memcpy(to, machine::shared(from, 16), 16); }
DEVICE void fence_for_tma() { machine::fence(); }
// Read, so that an address that is none shows.
DEVICE void prefetch_l2(const void *from) { (void)*(const volatile char *)from; }

DEVICE bool elected() {
    machine::warp_barrier("elect");
    return machine::current->thread % machine::WARP == machine::here->leader;
}

DEVICE void cluster_arrive() {
    machine::warp_barrier("barrier.cluster.arrive");
    machine::come_to_cluster();
}

DEVICE void cluster_wait() {
    machine::warp_barrier("barrier.cluster.wait");
    machine::wait_for_cluster();
}

DEVICE void barrier_wait_for_cluster(u32 barrier) { machine::wait_for_phase(barrier, 0); }

template <class T>
void send_to_program(u32 to, int rank, T x, u32 barrier) {
    machine::later_in(machine::program_of_rank(rank), [=] {
        if (machine::barrier_at(barrier).unfenced_by) machine::fail("is sent to with a barrier that was not fenced");
        memcpy(machine::shared_to_write(to, sizeof x, sizeof x), &x, sizeof x);
        machine::bytes_come(barrier, sizeof x);
    });
}

template <int COUNT>
void give_registers() {
    machine::warp_barrier("setmaxnreg.dec");
}

template <int COUNT>
void take_registers() {
    machine::warp_barrier("setmaxnreg.inc");
}
