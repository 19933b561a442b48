// A program's shared memory: who may touch what of it, and the barriers in it. Addresses are numbers
// from its beginning, as the instructions take them.
#pragma once
#include "machine.hpp"

namespace machine {

// The launch's shared memory, as far from its beginning as its alignment allows: a kernel that wants
// more has to see to it.
inline unsigned char *dynamic_shared(uint32_t alignment) {
    current->program->shared_begin = alignment;
    return current->program->shared + alignment;
}

inline unsigned char *shared_to_init(uint32_t address, uint32_t bytes, uint32_t alignment) {
    if (address % alignment) fail("uses %u, which is no multiple of %u", address, alignment);
    uint32_t begin = current->program->shared_begin;
    if (address < begin || address + (uint64_t)bytes > begin + (uint64_t)here->shared_bytes)
        fail("uses %u bytes at %u, and shared memory has %u at %u", bytes, address, here->shared_bytes, begin);
    return current->program->shared + address;
}

// Some bytes of shared memory, which begin at a multiple of `alignment` and where no barrier lies.
inline unsigned char *shared(uint32_t address, uint32_t bytes, uint32_t alignment = LINE) {
    unsigned char *place = shared_to_init(address, bytes, alignment);
    auto barrier = current->program->barriers.lower_bound(address);
    if (barrier != current->program->barriers.end() && barrier->first < address + bytes)
        fail("uses %u bytes at %u, where the barrier at %u lies", bytes, address, barrier->first);
    return place;
}

// The same, to be written to: no product that is not waited for may read there.
inline unsigned char *shared_to_write(uint32_t address, uint32_t bytes, uint32_t alignment = LINE) {
    unsigned char *place = shared(address, bytes, alignment);
    for (uint32_t line = address / LINE; line < (address + bytes + LINE - 1) / LINE; ++line)
        if (current->program->num_readers[line])
            fail("writes to %u, which products that are not waited for read", line * LINE);
    return place;
}

// The cluster's program of this rank, to be sent to.
inline Program &program_of_rank(int rank) {
    int cluster = here->cluster_size;
    if (rank < 0 || rank >= cluster) fail("sends to program %d of its cluster, which has %d", rank, cluster);
    Program &program = here->programs[current->program->index / cluster * cluster + rank];
    if (!program.shared_begin) fail("sends to program %d, which has not begun", program.index);
    if (!program.num_alive) fail("sends to program %d, which has ended", program.index);
    return program;
}

// The TMA and a warpgroup's products come to shared memory by another way than lanes: they may meet
// what a lane wrote only after it has fenced it. Seen are copies, `store_shared` and
// `store_matrices`, and nothing that is written through a pointer.

inline void note_written(Lane *lane, uint32_t address) {
    lane->program->writers[address / LINE] = lane;
    lane->written.push_back(address / LINE);
}

inline void fence() {
    for (uint32_t line : current->written) {
        Lane *&writer = current->program->writers[line];
        if (writer == current) writer = nullptr;
    }
    current->written.clear();
}

inline void require_fenced(const char *who, uint32_t address, uint32_t bytes) {
    for (uint32_t line = address / LINE; line < (address + bytes + LINE - 1) / LINE; ++line)
        if (const Lane *writer = current->program->writers[line])
            fail("has %s come to %u, which thread %d wrote and has not fenced", who, line * LINE, writer->thread);
}

// ---- barriers (PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier")

inline Barrier &barrier_at(uint32_t address) {
    auto found = current->program->barriers.find(address);
    if (found == current->program->barriers.end()) fail("uses a barrier at %u, where none is", address);
    return found->second;
}

inline void init_barrier(uint32_t address, int arrivals) {
    shared_to_init(address, 8, 8);
    current->program->barriers[address] = {arrivals, arrivals, current};
}

inline void fence_barriers() {
    for (auto &[address, barrier] : current->program->barriers)
        if (barrier.unfenced_by == current) barrier.unfenced_by = nullptr;
}

inline void end_phase_if_all_is_there(Barrier &barrier) {
    if (barrier.pending || barrier.bytes) return;
    ++barrier.phase;
    barrier.pending = barrier.arrivals;
    make_ready(barrier.waiting);
}

// Arrive, after more bytes are expected.
inline void arrive(uint32_t address, int64_t more_bytes = 0) {
    Barrier &barrier = barrier_at(address);
    if (!barrier.pending) fail("arrives at the barrier at %u, where all that it expects have", address);
    barrier.bytes += more_bytes;
    --barrier.pending;
    end_phase_if_all_is_there(barrier);
}

inline void bytes_come(uint32_t address, int64_t bytes) {
    Barrier &barrier = barrier_at(address);
    barrier.bytes -= bytes;
    end_phase_if_all_is_there(barrier);
}

// Wait for the end of a phase of this parity; the one before the barrier's first was odd. Who comes
// when the next one has ended as well waits on, as on a GPU.
inline void wait_for_phase(uint32_t address, uint32_t parity) {
    Barrier &barrier = barrier_at(address);
    while ((barrier.phase & 1) == parity) {
        barrier.waiting.push_back(current);
        wait_for("the barrier at", address);
    }
}

}  // namespace machine
