"""A trace through our prefix cache and vLLM's: how much each finds again, and what it costs.

Requests come in the trace's order; each is admitted, and freed before the next one. The time is of
the bookkeeping alone: hashing, admission and freeing, without making the token ids. Both have the
same number of blocks that requests can use, and take turns.
"""

import time

import pytest

from pagedattn.peers import VllmBlockManager
from pagedattn.workloads import (
    MOONCAKE_BLOCK_TOKENS,
    count_repeated_blocks,
    load_trace,
    prompt_of_hashes,
)

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("without_garbage_collection")]

NAMES = ["pagedattn", "pagedattn_from_lists", "vllm"]
A_ROUND = 20  # requests


@pytest.fixture(scope="module")
def trace(trace_path):
    """Requests of the trace that say which blocks their prompts have in common."""
    if trace_path is None:
        pytest.skip("needs --trace-file PATH of a trace with prefix hashes, such as Mooncake's")
    requests = [request for request in load_trace(trace_path) if request.prefix_hashes]
    if not requests:
        pytest.skip("the trace has no prefix hashes")
    return requests


class Replay:
    """A trace's requests one after the other, some in each round."""

    def __init__(self, manager, trace, hits):
        self.manager = manager
        self.trace = trace
        self.hits = hits
        self.num_prepared = 0
        self.batches = []
        self.hash_seconds = 0.0
        self.num_hit_blocks = 0

    def prepare(self):
        begin = self.num_prepared
        self.num_prepared = min(begin + A_ROUND, len(self.trace))
        # the fresh token lets the last hashed block be taken from the cache
        self.batches = [
            self.manager.prepare(
                [prompt_of_hashes(self.trace[i].prefix_hashes, MOONCAKE_BLOCK_TOKENS, last_token=i)]
            )
            for i in range(begin, self.num_prepared)
        ]

    def run(self):
        manager, read = self.manager, time.perf_counter
        for batch in self.batches:
            begin = read()
            manager.hash(batch)
            self.hash_seconds += read() - begin
            (num_cached,) = manager.admit(batch)
            manager.free(batch)
            self.num_hit_blocks += int(num_cached) // MOONCAKE_BLOCK_TOKENS

    def check(self):
        manager, (num_repeated, num_blocks) = self.manager, count_repeated_blocks(self.trace)
        assert self.num_prepared == len(self.trace)
        assert manager.num_free_blocks == manager.num_blocks
        num_evicted = num_blocks - self.num_hit_blocks - manager.num_cached_blocks
        if not isinstance(manager, VllmBlockManager):
            manager.manager.check_integrity()
            assert manager.manager.statistics().num_evicted_blocks == num_evicted
        assert self.num_hit_blocks <= num_repeated
        if manager.num_blocks >= num_blocks - num_repeated:  # every block fits
            assert (self.num_hit_blocks, num_evicted) == (num_repeated, 0)
        self.hits[manager.name] = self.num_hit_blocks
        if len(self.hits) == len(NAMES):
            assert self.hits["pagedattn"] == self.hits["pagedattn_from_lists"] >= self.hits["vllm"]

    def columns(self):
        num_repeated, num_blocks = count_repeated_blocks(self.trace)
        columns = {
            "pool_blocks": self.manager.num_blocks,
            "num_requests": len(self.trace),
            "num_lookup_blocks": num_blocks,
            "num_hit_blocks": self.num_hit_blocks,
            "num_evicted_blocks": num_blocks - self.num_hit_blocks - self.manager.num_cached_blocks,
            "num_repeated_blocks": num_repeated,
        }
        if isinstance(self.manager, VllmBlockManager):
            columns["hashing_us"] = 1e6 * self.hash_seconds
        return columns


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("pool", [1_000, 3_000, 10_000, 30_000, 100_000, "all"])
def bench_replay(describe_row, make_manager, play, trace, pool):
    """Pools from a small one to one that holds every block of the trace at once."""
    num_repeated, num_blocks = count_repeated_blocks(trace)
    longest = max(len(request.prefix_hashes) for request in trace) + 1
    pool_blocks = num_blocks - num_repeated + longest if pool == "all" else max(pool, longest)
    hits = {}

    def make(name):
        return Replay(make_manager(name, pool_blocks, MOONCAKE_BLOCK_TOKENS), trace, hits)

    name = "every block fits" if pool == "all" else f"{pool_blocks:,} blocks"
    describe_row("replay", f"trace, {name}", MOONCAKE_BLOCK_TOKENS)
    play(make, rounds=-(-len(trace) // A_ROUND), warmup=0, as_one=True)
