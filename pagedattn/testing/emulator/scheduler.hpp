// Who runs when: a launch, from its lanes' beginning to their end.
#pragma once
#include <sys/mman.h>
#include <ucontext.h>

#include <string>

#include "machine.hpp"

namespace machine {

inline void end_lane() {
    Program &program = *current->program;
    Warp &warp = *current->warp;
    if (warp.num_come) fail("ends, and others of its warp wait for it at %s", warp.instruction);
    if (warp.open.lines.size() + warp.groups.size()) fail("ends, and products of its warp are not waited for");
    if (current->copies.size()) fail("ends, and its copies are not waited for");
    if (!--program.num_alive) {
        if (program.num_copies)
            fail("ends as the last of its program, whose copies to shared memory are not waited for");
        --here->num_alive;
    }
    leave_cluster();
    current->has_ended = true;
    ++warp.num_ended;
    Gathering &all = program.gatherings[0];
    if (!all.threads && all.num_come == program.num_alive) {
        all.num_come = 0;
        make_ready(all.waiting);
    }
}

inline void run_lane() {
    here->kernel();
    end_lane();
    _longjmp(here->scheduler, 1);
}

// The end of a lane's stack, which grows downwards.
inline unsigned char *stack_of(const Lane *lane) {
    return here->stacks + ((size_t)lane->program->index * here->num_threads + lane->thread) * STACK_BYTES;
}

inline void begin(Lane *lane) {
    lane->has_begun = true;
    memcpy(stack_of(lane), &UNTOUCHED, sizeof UNTOUCHED);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stack_of(lane);
    context.uc_stack.ss_size = STACK_BYTES;
    context.uc_link = nullptr;
    makecontext(&context, run_lane, 0);
    setcontext(&context);
}

// Run a lane until it waits or ends, or do a copy that it asked for; false if it fails.
__attribute__((noinline)) inline bool go_on(Lane *lane, const Work *copy = nullptr) {
    current = lane;
    int came_back = _setjmp(here->scheduler);
    if (!came_back && copy) {
        --lane->program->num_copies;
        (*copy)();
    } else if (!came_back) {
        if (current->has_begun) _longjmp(current->at, 1);
        begin(current);
    }
    if (memcmp(stack_of(current), &UNTOUCHED, sizeof UNTOUCHED)) {
        snprintf(here->error, sizeof here->error, "program %d's thread %d needs more than %zu bytes of stack",
                 current->program->index, current->thread, STACK_BYTES);
        return false;
    }
    return came_back != 2;
}

template <class T>
T take_one_of(std::vector<T> &all, bool last = false) {
    if (!last) std::swap(all[here->random((uint32_t)all.size())], all.back());
    T chosen = std::move(all.back());
    all.pop_back();
    return chosen;
}

// Whether a slow warp, or a lane that is slow or naps, is left behind now; none is if nothing else can
// go on.
inline bool stays_behind(bool is_slow, Lane *lane = nullptr) {
    if (here->num_idle > here->warps.size()) return false;
    if (lane && here->random(here->nap_odds) == 0) lane->naps_until = here->num_turns + (1u << here->random(14));
    return (is_slow && here->random(here->slow_odds)) || (lane && lane->naps_until > here->num_turns);
}

// Run a warp's lanes that are ready; false if one fails.
inline bool run_ready_lanes(Warp *warp) {
    static std::vector<Lane *> turn;
    turn.clear();
    turn.swap(warp->ready);
    warp->is_listed = false;
    ++here->num_turns;
    ++here->num_idle;
    bool is_left = stays_behind(warp->is_slow);
    for (size_t i = turn.size(); i > 1; --i) std::swap(turn[i - 1], turn[here->random((uint32_t)i)]);
    for (Lane *lane : turn) {
        if (is_left || stays_behind(lane == warp->slow_lane, lane)) {
            make_ready(lane);
            continue;
        }
        here->num_idle = 0;
        if (!go_on(lane)) return false;
    }
    return true;
}

inline void tell_who_waits() {
    std::string told;
    for (Program &program : here->programs)
        for (size_t i = 0, end; i < program.lanes.size(); i = end) {
            const Lane &first = program.lanes[i];
            auto waits_too = [&](const Lane &lane) {
                return !lane.has_ended && lane.waits_for == first.waits_for && lane.where == first.where;
            };
            for (end = i + 1; end < program.lanes.size() && waits_too(program.lanes[end]);) ++end;
            if (first.has_ended) continue;
            bool one = end == i + 1;
            told += (told.empty() ? "" : "; ") + ("program " + std::to_string(program.index)) + "'s thread" +
                    (one ? " " : "s ") + std::to_string(i) + (one ? "" : " to " + std::to_string(end - 1)) +
                    (one ? " waits for " : " wait for ") + first.waits_for +
                    (first.where ? " " + std::to_string(first.where) : "");
        }
    snprintf(here->error, sizeof here->error, "nothing goes on: %s", told.c_str());
}

inline bool run_all() {
    here->num_alive = here->num_programs;
    while (here->num_alive) {
        bool is_idle = here->num_idle >= here->warps.size();
        if (here->events.size() && (is_idle || here->random(here->event_odds) == 0)) {
            here->num_idle = 0;
            Event event = take_one_of(here->events, here->newest_first);
            if (!go_on(event.lane, &event.work)) return false;
        } else if (here->warps.size()) {
            if (!run_ready_lanes(take_one_of(here->warps))) return false;
        } else {
            tell_who_waits();
            return false;
        }
    }
    return true;
}

// The warps of a warpgroup multiply together, each as often as the others.
inline bool have_multiplied_together() {
    for (Program &program : here->programs)
        for (size_t i = 0; i < program.warps.size(); ++i)
            if (program.warps[i].num_products != program.warps[i / 4 * 4].num_products) {
                snprintf(here->error, sizeof here->error,
                         "program %d's warps %zu and %zu, of one warpgroup, made %d and %d products", program.index,
                         i / 4 * 4, i, program.warps[i / 4 * 4].num_products, program.warps[i].num_products);
                return false;
            }
    return true;
}

inline void make_programs(unsigned char *shared, size_t pitch) {
    here->programs.resize(here->num_programs);
    here->clusters.resize(here->num_programs / here->cluster_size);
    for (Cluster &cluster : here->clusters) cluster.num_alive = here->cluster_size * here->num_threads;
    for (Program &program : here->programs) {
        program.index = (int)(&program - here->programs.data());
        program.shared = shared + program.index * pitch;
        program.writers.resize(pitch / LINE);
        program.num_readers.resize(pitch / LINE);
        program.warps.resize(here->num_threads / WARP);
        program.lanes.resize(here->num_threads);
        program.num_alive = here->num_threads;
        for (int thread = 0; thread < here->num_threads; ++thread) {
            Lane &lane = program.lanes[thread];
            lane.program = &program;
            lane.warp = &program.warps[thread / WARP];
            lane.thread = thread;
            make_ready(&lane);
        }
        // many that are slow wait for each other, and one alone falls the farthest behind
        uint32_t num_warps = (uint32_t)program.warps.size();
        bool are_many = here->random(2);
        uint32_t one = here->random(num_warps);
        for (uint32_t i = 0; i < num_warps; ++i) {
            Warp &warp = program.warps[i];
            bool is_chosen = are_many ? here->random(4) == 0 : i == one;
            if (is_chosen) warp.slow_lane = &program.lanes[i * WARP + here->random(WARP)];
            warp.is_slow = is_chosen && here->random(4) == 0;
        }
    }
}

// Run until all lanes have ended; false with `error` if that cannot be.
inline bool run(Machine &machine) {
    here = &machine;
    size_t stacks = (size_t)machine.num_programs * machine.num_threads * STACK_BYTES;
    size_t pitch = ((size_t)machine.shared_bytes + 2 * ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    size_t bytes = MARGIN + stacks + machine.num_programs * pitch;
    void *memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        snprintf(machine.error, sizeof machine.error, "the host has no %zu MiB for stacks and shared memory",
                 bytes >> 20);
        return false;
    }
    machine.stacks = (unsigned char *)memory + MARGIN;
    memset(machine.stacks + stacks, POISON, machine.num_programs * pitch);
    make_programs(machine.stacks + stacks, pitch);
    bool done = run_all() && have_multiplied_together();
    munmap(memory, bytes);
    return done;
}

}  // namespace machine
