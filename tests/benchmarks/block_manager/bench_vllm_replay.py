"""A trace through our prefix cache and vLLM's: how much each finds again, and what it costs.

Requests come in the trace's order; each is admitted, and freed before the next one. The time is of
the bookkeeping alone: hashing, admission and freeing, without making the token ids. Both have the
same number of blocks that requests can use.
"""

import time
from collections import defaultdict

import pytest

from pagedattn.benchmarking import DeviceClock
from pagedattn.peers import VllmBlockManager
from pagedattn.workloads import (
    MOONCAKE_BLOCK_TOKENS,
    count_repeated_blocks,
    load_trace,
    prompt_of_hashes,
)

CLOCK = DeviceClock()

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.usefixtures("without_garbage_collection"),
    pytest.mark.benchmark(timer=CLOCK),
]

NAMES = {"pagedattn", "vllm"}


@pytest.fixture(scope="module")
def trace(trace_path):
    """Requests of the trace that say which blocks their prompts have in common."""
    if trace_path is None:
        pytest.skip("needs --trace-file PATH of a trace with prefix hashes, such as Mooncake's")
    requests = [request for request in load_trace(trace_path) if request.prefix_hashes]
    if not requests:
        pytest.skip("the trace has no prefix hashes")
    return requests


@pytest.fixture(scope="module")
def hits():
    """Blocks hit, by pool and implementation; at the end each pool must have both."""
    counts = defaultdict(dict)
    yield counts
    for pool, by_name in counts.items():
        assert by_name.keys() == NAMES, f"pool of {pool}: only {set(by_name)} ran"


class Replay:
    """A trace's requests one after the other; `seconds` are those of each step."""

    def __init__(self, manager, trace):
        self.manager = manager
        self.trace = trace
        self.seconds = {"hash": 0.0, "admit": 0.0, "free": 0.0}
        self.num_hit_blocks = 0

    def run(self):
        manager, seconds, read = self.manager, self.seconds, time.perf_counter
        for i, request in enumerate(self.trace):
            # the fresh token lets the last hashed block be taken from the cache
            prompt = prompt_of_hashes(request.prefix_hashes, MOONCAKE_BLOCK_TOKENS, last_token=i)
            batch = manager.prepare([prompt])
            begin = read()
            manager.hash(batch)
            hashed = read()
            (num_cached,) = manager.admit(batch)
            admitted = read()
            manager.free(batch)
            end = read()
            seconds["hash"] += hashed - begin
            seconds["admit"] += admitted - hashed
            seconds["free"] += end - admitted
            self.num_hit_blocks += int(num_cached) // MOONCAKE_BLOCK_TOKENS
        CLOCK.advance(sum(seconds.values()))


@pytest.mark.parametrize("implementation", sorted(NAMES))
@pytest.mark.parametrize("pool", [1_000, 3_000, 10_000, 30_000, 100_000, "all"])
def bench_replay(benchmark, describe_row, make_manager, trace, hits, pool, implementation):
    """Pools from a small one to one that holds every block of the trace at once."""
    num_repeated, num_blocks = count_repeated_blocks(trace)
    longest = max(len(request.prefix_hashes) for request in trace) + 1
    pool_blocks = num_blocks - num_repeated + longest if pool == "all" else max(pool, longest)
    manager = make_manager(pool_blocks, MOONCAKE_BLOCK_TOKENS, prefix_caching=True)
    replay = Replay(manager, trace)
    name = "every block fits" if pool == "all" else f"{pool_blocks:,} blocks"
    describe_row("replay", f"trace, {name}", MOONCAKE_BLOCK_TOKENS)
    benchmark.pedantic(replay.run, rounds=1)

    assert manager.num_free_blocks == pool_blocks
    num_evicted = num_blocks - replay.num_hit_blocks - manager.num_cached_blocks
    if implementation == "pagedattn":
        manager.manager.check_integrity()
        assert manager.manager.statistics().num_evicted_blocks == num_evicted
    benchmark.extra_info.update(
        pool_blocks=pool_blocks,
        num_requests=len(trace),
        num_lookup_blocks=num_blocks,
        num_hit_blocks=replay.num_hit_blocks,
        num_evicted_blocks=num_evicted,
        num_repeated_blocks=num_repeated,
    )
    if isinstance(manager, VllmBlockManager):
        benchmark.extra_info["hashing_us"] = 1e6 * replay.seconds["hash"]

    assert replay.num_hit_blocks <= num_repeated
    if pool == "all":
        assert (replay.num_hit_blocks, num_evicted) == (num_repeated, 0)
    hits[pool][implementation] = replay.num_hit_blocks
    if hits[pool].keys() == NAMES:
        assert hits[pool]["pagedattn"] >= hits[pool]["vllm"]
