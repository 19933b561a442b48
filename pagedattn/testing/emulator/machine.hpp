// A GPU as far as the kernels use one: programs of warps of lanes, each lane with a stack of its own,
// one of them running at a time and the next chosen at random. Lanes wait for their warp, for a barrier
// or for nothing; copies that a lane asks for are done some time later, also at random. What comes out
// must not depend on the order, so that other seeds show what a kernel forgets to wait for.
//
// A lane is left where it waits, joins its warp or counts in memory, and nowhere else: what it does
// between is not interrupted, and one that waits in a loop of its own is never left.
#pragma once
#include <setjmp.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <utility>
#include <vector>

namespace machine {

constexpr int WARP = 32;
constexpr size_t STACK_BYTES = 64 << 10;
constexpr size_t MARGIN = 1 << 20;                  // below the first stack, for what overflows it
constexpr uint64_t UNTOUCHED = 0x9e3779b97f4a7c15;  // at the end of a stack, unless it was too small
constexpr uint32_t ALIGNMENT = 1024;                // of a program's shared memory
constexpr uint32_t LINE = 16;
constexpr unsigned char POISON = 0xff;  // NaN in bfloat16, float16, float32 and e4m3

using Work = std::function<void()>;

struct Program;
struct Warp;

struct Lane {
    Program *program;
    Warp *warp;
    int thread;
    bool has_begun = false, has_ended = false;
    jmp_buf at;
    const char *waits_for = nullptr;
    uint32_t where = 0;             // number or address of what it waits for
    uint64_t naps_until = 0;        // turn
    std::vector<Work> copies;       // asked for by this lane, not yet on their way
    std::vector<uint32_t> written;  // lines of shared memory, not fenced since
    uint64_t came_in = 0;           // phase of the cluster's barrier that it came to last, from 1 on
    uint64_t num_looks = 0, left_then = 0;  // for words of others since one was left; how many were
};

// Matrix products of a warp that are waited for together.
struct Group {
    std::vector<Work> products;   // not done yet
    std::vector<uint32_t> lines;  // of shared memory that they read
};

// What a warp's lanes do together is done when the last of them comes.
struct Warp {
    bool is_slow = false;
    const Lane *slow_lane = nullptr;  // or none
    std::vector<Lane *> ready;
    bool is_listed = false;  // among the machine's warps that have lanes ready
    const char *instruction = nullptr;
    void *arguments[WARP];
    int num_come = 0, num_ended = 0;
    bool may_multiply = false;  // `products_begin` was called
    int num_products = 0;       // of a warpgroup, in all
    Group open;                 // not committed
    std::deque<Group> groups;   // committed, and not waited for
};

// In shared memory: a phase ends when all have arrived and all bytes have come.
struct Barrier {
    int arrivals, pending;
    Lane *unfenced_by;  // the lane that made it, until the TMA may know of it
    int64_t bytes = 0;
    uint32_t phase = 0;
    std::vector<Lane *> waiting;
};

// Of named barriers, and of __syncthreads, which is number 0 for all lanes that have not ended.
struct Gathering {
    int threads = 0, num_come = 0;
    std::vector<Lane *> waiting;
};

struct Program {
    int index;
    unsigned char *shared;
    uint32_t shared_begin = 0;  // address of the launch's `shared_bytes`
    std::map<uint32_t, Barrier> barriers;
    std::map<int, Gathering> gatherings;
    std::vector<Lane *> writers;  // of each line of shared memory, if it is not fenced since
    std::vector<int> num_readers;  // of each line, products that are not waited for
    std::vector<Warp> warps;
    std::vector<Lane> lanes;
    int num_alive = 0, num_copies = 0;  // lanes; copies on their way
};

// Programs that reach each other's shared memory, and their barrier.
struct Cluster {
    int num_alive = 0, num_come = 0;  // lanes; in this phase
    uint64_t phase = 1;
    std::vector<Lane *> waiting;
};

struct Event {
    Lane *lane;  // that asked for it
    Work work;
};

struct Machine {
    uint64_t random_state;
    uint32_t event_odds;       // one in so many steps lets a copy be done though lanes could run
    bool newest_first;         // the copy that was asked for last, else any
    uint32_t slow_odds;        // one in so many turns of a slow lane or warp is taken
    uint32_t nap_odds;         // one in so many turns of a lane is the last for long
    int leader;                // lane that `elected` chooses
    int num_threads, num_programs;
    int cluster_size = 1;  // programs
    uint32_t shared_bytes;
    Work kernel;
    std::vector<Program> programs;
    std::vector<Cluster> clusters;
    std::vector<Warp *> warps;  // with lanes that are ready
    std::vector<Event> events;  // copies on their way
    int num_alive = 0;          // programs
    uint64_t num_turns = 0;
    uint64_t num_left = 0;        // words that programs left for others
    std::vector<Lane *> looking;  // for one, in vain since the last
    size_t num_idle = 0;  // turns since some lane ran
    unsigned char *stacks = nullptr;
    jmp_buf scheduler;
    char error[1024] = {};

    uint32_t random(uint32_t below) {
        random_state ^= random_state << 13;
        random_state ^= random_state >> 7;
        random_state ^= random_state << 17;
        return (uint32_t)((random_state >> 32) * below >> 32);
    }
};

static Machine *here;  // the machine that runs
static Lane *current;  // the lane that runs, or whose copy is done

// End the launch; the sentence begins with the lane.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char *format, ...) {
    int at = snprintf(here->error, sizeof here->error, "program %d's thread %d ", current->program->index,
                      current->thread);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(here->error + at, sizeof here->error - at, format, arguments);
    va_end(arguments);
    _longjmp(here->scheduler, 2);
}

inline void make_ready(Lane *lane) {
    lane->waits_for = nullptr;
    lane->warp->ready.push_back(lane);
    if (!lane->warp->is_listed) here->warps.push_back(lane->warp);
    lane->warp->is_listed = true;
}

inline void make_ready(std::vector<Lane *> &lanes) {
    std::vector<Lane *> all;
    all.swap(lanes);
    for (Lane *lane : all) make_ready(lane);
}

// Let others run until somebody makes this lane ready.
__attribute__((noinline)) inline void wait_for(const char *what, uint32_t where = 0) {
    current->waits_for = what;
    current->where = where;
    if (!_setjmp(current->at)) _longjmp(here->scheduler, 1);
}

// Let others run first, at times.
inline void hesitate() {
    if (here->random(2)) return;
    make_ready(current);
    wait_for("its turn");
}

// Look for a word that another program leaves. Who has looked often since the last was left would not find it
// later either, and waits for the next: else it could go on for ever, and nothing that is left behind would.
inline void look() {
    constexpr uint64_t OFTEN = 100;  // more than one looks for at a time
    if (current->left_then != here->num_left) current->num_looks = 0;
    current->left_then = here->num_left;
    if (++current->num_looks < OFTEN) return hesitate();
    here->looking.push_back(current);
    wait_for("a word of another program");
}

inline void leave() {
    ++here->num_left;
    make_ready(here->looking);
    hesitate();
}

// Do what a warp does together: `work` gets each lane's argument.
template <class Argument, class Together>
void together(const char *instruction, Argument &own, Together work) {
    Warp &warp = *current->warp;
    if (warp.num_come && strcmp(warp.instruction, instruction))
        fail("comes to %s, where others of its warp are at %s", instruction, warp.instruction);
    if (warp.num_ended) fail("comes to %s, and lanes of its warp have ended", instruction);
    warp.instruction = instruction;
    warp.arguments[current->thread % WARP] = &own;
    if (++warp.num_come < WARP) return wait_for(instruction);
    work((Argument **)warp.arguments);
    warp.num_come = 0;
    Lane *first = current - current->thread % WARP;
    for (int lane = 0; lane < WARP; ++lane)
        if (first + lane != current) make_ready(first + lane);
}

inline void warp_barrier(const char *name) {
    int none = 0;
    together(name, none, [](int **) {});
}

// Come to a barrier of so many threads; 0: all. Returns it if others are missing, else null and lets them go on.
inline Gathering *come_to(int number, int threads) {
    if (number < 0 || number > 15 || threads % WARP) fail("comes to barrier %d of %d threads", number, threads);
    Gathering &gathering = current->program->gatherings[number];
    if (!gathering.num_come) gathering.threads = threads;
    if (gathering.threads != threads)
        fail("comes to barrier %d of %d threads, and others there to one of %d", number, threads, gathering.threads);
    if (++gathering.num_come < (threads ? threads : current->program->num_alive)) return &gathering;
    gathering.num_come = 0;
    make_ready(gathering.waiting);
    return nullptr;
}

// Wait until so many threads have come to a barrier; 0: all.
inline void gather(int number, int threads) {
    Gathering *gathering = come_to(number, threads);
    if (!gathering) return;
    gathering->waiting.push_back(current);
    wait_for("others at named barrier", number);
}

// ---- the barrier of a cluster (PTX ISA, "barrier.cluster")

inline Cluster &cluster_of(const Lane *lane) { return here->clusters[lane->program->index / here->cluster_size]; }

inline void end_phase_if_all_came(Cluster &cluster) {
    if (!cluster.num_come || cluster.num_come < cluster.num_alive) return;
    ++cluster.phase;
    cluster.num_come = 0;
    make_ready(cluster.waiting);
}

inline void come_to_cluster() {
    Cluster &cluster = cluster_of(current);
    if (current->came_in == cluster.phase) fail("comes to the cluster's barrier twice");
    current->came_in = cluster.phase;
    ++cluster.num_come;
    end_phase_if_all_came(cluster);
}

inline void wait_for_cluster() {
    Cluster &cluster = cluster_of(current);
    if (!current->came_in) fail("waits for the cluster, to whose barrier it has not come");
    while (cluster.phase == current->came_in) {
        cluster.waiting.push_back(current);
        wait_for("its cluster");
    }
}

inline void leave_cluster() {
    Cluster &cluster = cluster_of(current);
    --cluster.num_alive;
    if (current->came_in == cluster.phase) --cluster.num_come;
    end_phase_if_all_came(cluster);
}

// Have a copy to the program's shared memory done some time later.
inline void later(Work copy) {
    ++current->program->num_copies;
    here->events.push_back({current, std::move(copy)});
}

// The same of another program's.
inline void later_in(Program &program, Work copy) {
    ++program.num_copies;
    here->events.push_back({&program.lanes[0], std::move(copy)});
}

}  // namespace machine
