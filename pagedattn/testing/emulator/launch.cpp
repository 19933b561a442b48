// A kernel on the emulated machine: compiled with SOURCE, its file, and KERNEL, its name.
#include SOURCE

// Returns 0, or writes what went wrong.
extern "C" int launch(int programs, int threads, unsigned shared_bytes, int cluster, const void *parameters,
                      unsigned parameter_bytes, u64 seed, char *error, int error_bytes) {
    machine::Machine emulated;
    emulated.random_state = seed * 0x9e3779b97f4a7c15ull + 1;
    for (int i = 0; i < 8; ++i) emulated.random(1);
    emulated.event_odds = 1u << 4 * emulated.random(4);
    emulated.newest_first = emulated.random(2);
    emulated.slow_odds = 1u << 4 * emulated.random(4);
    emulated.nap_odds = 16u << 5 * emulated.random(5);
    emulated.leader = (int)emulated.random(machine::WARP);
    emulated.num_programs = programs;
    emulated.num_threads = threads;
    emulated.shared_bytes = shared_bytes;
    if (programs % cluster) {
        snprintf(error, error_bytes, "%d programs make no clusters of %d", programs, cluster);
        return 1;
    }
    emulated.cluster_size = cluster;
    Parameters own;
    if (parameter_bytes != sizeof own) {
        snprintf(error, error_bytes, "the kernel's parameters have %zu bytes, and it is given %u", sizeof own,
                 parameter_bytes);
        return 1;
    }
    memcpy((void *)&own, parameters, sizeof own);
    emulated.kernel = [&] { KERNEL(own); };
    if (machine::run(emulated)) return 0;
    snprintf(error, error_bytes, "%s", emulated.error);
    return 1;
}
