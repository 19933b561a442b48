"""Our block manager beside vLLM's: the same requests for both, in one run.

Both are asked in the form that is their own: vLLM request by request with lists of token ids, ours
in batches with arrays; `pagedattn_from_lists` is ours with vLLM's lists. Preparing requests is not
timed, hashing them is. Both have the same number of blocks that requests can use. Python's garbage
collector is off while rows run, which spares vLLM's objects.
"""

import time

import numpy as np
import pytest

from pagedattn.peers import VllmBlockManager
from pagedattn.workloads import VOCABULARY, random_prompts

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("without_garbage_collection")]

BLOCK_SIZE = 16
NUM_PROMPTS = 256
ROUNDS = 30
STEPS = 10 * BLOCK_SIZE  # each sequence opens ten blocks
WARMUP = 3
NATIVE = ["pagedattn", "vllm"]
WITH_LISTS = ["pagedattn", "pagedattn_from_lists", "vllm"]
CACHING = {"no-caching": False, "caching": True}


def blocks_of(lengths):
    return int((-(-np.asarray(lengths) // BLOCK_SIZE)).sum())


def full_blocks_of(lengths):
    return int((np.asarray(lengths) // BLOCK_SIZE).sum())


def draw_lengths(count=NUM_PROMPTS):
    return np.random.default_rng(0).integers(100, 1025, count)


def draw_prompts(lengths, seed=1):
    return random_prompts(np.random.default_rng(seed), lengths)


class Admissions:
    """A call that hashes and admits a batch, and what is needed around it.

    `hashing` collects the seconds of the part that vLLM does beforehand.
    """

    def __init__(self, manager, prompts):
        self.manager = manager
        self.prompts = prompts
        self.batch = None
        self.cached = None
        self.hashing = []

    def free(self):
        """End what was admitted."""
        if self.cached is not None:
            self.manager.free(self.batch)
        self.cached = None

    def prepare(self):
        self.batch = self.manager.prepare(self.prompts)

    def admit(self):
        begin = time.perf_counter()
        self.manager.hash(self.batch)
        self.hashing.append(time.perf_counter() - begin)
        self.cached = self.manager.admit(self.batch)

    def hashing_column(self):
        if not isinstance(self.manager, VllmBlockManager):
            return {}
        return {"hashing_us": 1e6 * float(np.median(self.hashing[-ROUNDS:]))}


@pytest.mark.parametrize("implementation", NATIVE)
def bench_admit_without_caching(benchmark, describe_row, make_manager):
    """Blocks for 256 prompts, of which both need no more than the lengths."""
    lengths = draw_lengths()
    manager = make_manager(blocks_of(lengths), BLOCK_SIZE, prefix_caching=False)
    admissions = Admissions(manager, draw_prompts(lengths))

    def start_over():
        admissions.free()
        admissions.prepare()

    describe_row("admit", "no caching", BLOCK_SIZE, NUM_PROMPTS)
    benchmark.pedantic(admissions.admit, setup=start_over, rounds=ROUNDS, warmup_rounds=WARMUP)
    assert manager.num_free_blocks == 0
    assert not any(admissions.cached)


@pytest.mark.parametrize("implementation", WITH_LISTS)
def bench_admit_to_an_empty_cache(benchmark, describe_row, make_manager):
    """256 prompts that nothing has been seen of: hash, look up, allocate, register."""
    lengths = draw_lengths()
    manager = make_manager(blocks_of(lengths), BLOCK_SIZE, prefix_caching=True)
    admissions = Admissions(manager, draw_prompts(lengths))

    def start_over():
        admissions.free()
        manager.reset_prefix_cache()
        admissions.prepare()

    describe_row("admit", "caching, nothing cached", BLOCK_SIZE, NUM_PROMPTS)
    benchmark.pedantic(admissions.admit, setup=start_over, rounds=ROUNDS, warmup_rounds=WARMUP)
    benchmark.extra_info.update(admissions.hashing_column())
    assert manager.num_free_blocks == 0
    assert not any(admissions.cached)
    admissions.free()
    assert manager.num_cached_blocks == full_blocks_of(lengths)


@pytest.mark.parametrize("implementation", WITH_LISTS)
def bench_admit_what_is_cached(benchmark, describe_row, make_manager):
    """256 prompts that were there before: all but the block of the last token is shared."""
    lengths = draw_lengths()
    manager = make_manager(2 * blocks_of(lengths), BLOCK_SIZE, prefix_caching=True)
    admissions = Admissions(manager, draw_prompts(lengths))
    admissions.prepare()
    admissions.admit()

    def start_over():
        admissions.free()
        admissions.prepare()

    describe_row("admit", "caching, all cached", BLOCK_SIZE, NUM_PROMPTS)
    benchmark.pedantic(admissions.admit, setup=start_over, rounds=ROUNDS, warmup_rounds=WARMUP)
    benchmark.extra_info.update(admissions.hashing_column())
    assert list(admissions.cached) == ((lengths - 1) // BLOCK_SIZE * BLOCK_SIZE).tolist()
    assert manager.num_free_blocks == manager.num_blocks - blocks_of(lengths)


@pytest.mark.parametrize("implementation", WITH_LISTS)
def bench_admit_under_eviction(benchmark, describe_row, make_manager):
    """256 new prompts into a pool full of cached blocks: every block evicts one."""
    lengths = draw_lengths()
    manager = make_manager(blocks_of(lengths), BLOCK_SIZE, prefix_caching=True)
    admissions = Admissions(manager, draw_prompts(lengths))
    older = draw_prompts(-(-lengths // BLOCK_SIZE) * BLOCK_SIZE, seed=2)

    def start_over():
        admissions.free()
        manager.reset_prefix_cache()
        filler = manager.prepare(older)
        manager.hash(filler)
        manager.admit(filler)
        manager.free(filler)
        assert manager.num_cached_blocks == manager.num_free_blocks == manager.num_blocks
        admissions.prepare()

    describe_row("admit", "caching, every block evicts", BLOCK_SIZE, NUM_PROMPTS)
    benchmark.pedantic(admissions.admit, setup=start_over, rounds=ROUNDS, warmup_rounds=WARMUP)
    benchmark.extra_info.update(admissions.hashing_column())
    assert manager.num_free_blocks == 0
    assert not any(admissions.cached)
    admissions.free()
    assert manager.num_cached_blocks == full_blocks_of(lengths)


@pytest.mark.parametrize("implementation", NATIVE)
@pytest.mark.parametrize("num_sequences", [256, 1024])
@pytest.mark.parametrize("caching", CACHING)
def bench_decode_step(benchmark, describe_row, make_manager, caching, num_sequences):
    """One more token for every sequence; a sixteenth of them open a block."""
    lengths = draw_lengths(num_sequences)
    steps = STEPS + WARMUP
    manager = make_manager(blocks_of(lengths + steps), BLOCK_SIZE, prefix_caching=CACHING[caching])
    admissions = Admissions(manager, draw_prompts(lengths))
    admissions.prepare()
    admissions.admit()
    drawn = np.random.default_rng(3).integers(0, VOCABULARY, (steps, num_sequences), dtype=np.int32)
    tokens = [manager.tokens(step) if CACHING[caching] else None for step in drawn]
    append, batch, following = manager.append, admissions.batch, iter(tokens)

    describe_row("decode step", caching.replace("-", " "), BLOCK_SIZE, num_sequences)
    benchmark.pedantic(lambda: append(batch, next(following)), rounds=STEPS, warmup_rounds=WARMUP)
    count = steps - len(list(following))
    assert manager.num_free_blocks == manager.num_blocks - blocks_of(lengths + count)
    admissions.free()
    cached = full_blocks_of(lengths + count) if CACHING[caching] else 0
    assert manager.num_cached_blocks == cached


@pytest.mark.parametrize("implementation", NATIVE)
@pytest.mark.parametrize("caching", CACHING)
def bench_free(benchmark, describe_row, make_manager, caching):
    lengths = draw_lengths()
    manager = make_manager(blocks_of(lengths), BLOCK_SIZE, prefix_caching=CACHING[caching])
    admissions = Admissions(manager, draw_prompts(lengths))

    def start_over():
        manager.reset_prefix_cache()
        admissions.prepare()
        admissions.admit()
        assert manager.num_free_blocks == 0

    describe_row("free", caching.replace("-", " "), BLOCK_SIZE, NUM_PROMPTS)
    benchmark.pedantic(admissions.free, setup=start_over, rounds=ROUNDS, warmup_rounds=WARMUP)
    assert manager.num_free_blocks == manager.num_blocks
    assert manager.num_cached_blocks == (full_blocks_of(lengths) if CACHING[caching] else 0)
