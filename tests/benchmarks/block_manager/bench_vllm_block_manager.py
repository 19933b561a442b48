"""Our block manager beside vLLM's: the same requests for both, in one run.

Both are asked in the form that is their own: vLLM request by request with lists of token ids, ours
in batches with arrays; `pagedattn_from_lists` is ours with vLLM's lists. Preparing requests is not
timed, hashing them is. Both have the same number of blocks that requests can use. They take turns,
so that what slows the machine slows both. Python's garbage collector is off while rows run, which
spares vLLM's objects.
"""

import time

import numpy as np
import pytest

from pagedattn.peers import VllmBlockManager
from pagedattn.workloads import VOCABULARY, random_prompts

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("without_garbage_collection")]

BLOCK_SIZE = 16
NUM_PROMPTS = 256
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
    """Rounds in which a batch is hashed and admitted, and what has to be there before each.

    Args:
        manager: a `ComparedBlockManager`.
        lengths: int64 [num_prompts], tokens.
        num_cached: int64 [num_prompts], tokens of each prompt that have to be found.
        forget: whether all that was cached is forgotten before each round.
        older: prompts whose blocks fill the cache before each round.

    """

    def __init__(self, manager, lengths, num_cached=0, *, forget=False, older=None):
        self.manager = manager
        self.lengths = lengths
        self.prompts = draw_prompts(lengths)
        self.num_cached = np.zeros_like(lengths) + num_cached
        self.forget = forget
        self.older = older
        self.batch = None
        self.cached = None
        self.hashing = []

    def prepare(self):
        self.end()
        if self.forget:
            self.manager.reset_prefix_cache()
        if self.older is not None:
            filler = self.manager.prepare(self.older)
            self.manager.hash(filler)
            self.manager.admit(filler)
            self.manager.free(filler)
            assert self.manager.num_cached_blocks == self.manager.num_blocks
        self.batch = self.manager.prepare(self.prompts)

    def run(self):
        begin = time.perf_counter()
        self.manager.hash(self.batch)
        self.hashing.append(time.perf_counter() - begin)
        self.cached = self.manager.admit(self.batch)

    def end(self):
        """Free what was admitted."""
        if self.cached is not None:
            self.manager.free(self.batch)
        self.cached = None

    def check(self):
        assert list(self.cached) == self.num_cached.tolist()
        held = blocks_of(self.lengths)
        assert self.manager.num_free_blocks == self.manager.num_blocks - held
        self.end()
        assert self.manager.num_free_blocks == self.manager.num_blocks

    def columns(self):
        """The part that vLLM does before it admits."""
        if not isinstance(self.manager, VllmBlockManager):
            return {}
        return {"hashing_us": 1e6 * float(np.median(self.hashing[WARMUP:]))}


class CachedAdmissions(Admissions):
    """Rounds that find nothing, and leave their full blocks to be found."""

    def check(self):
        super().check()
        assert self.manager.num_cached_blocks == full_blocks_of(self.lengths)


class DecodeSteps:
    """Rounds in which every sequence of a batch gets a token."""

    def __init__(self, manager, lengths, *, caching):
        self.manager = manager
        self.lengths = lengths
        self.caching = caching
        self.batch = manager.prepare(draw_prompts(lengths))
        manager.hash(self.batch)
        manager.admit(self.batch)
        rng = np.random.default_rng(3)
        drawn = rng.integers(0, VOCABULARY, (STEPS + WARMUP, lengths.size), dtype=np.int32)
        self.steps = iter([manager.tokens(step) if caching else None for step in drawn])
        self.tokens = None

    def prepare(self):
        self.tokens = next(self.steps)

    def run(self):
        self.manager.append(self.batch, self.tokens)

    def check(self):
        assert next(self.steps, "none is left") == "none is left"
        grown = self.lengths + STEPS + WARMUP
        assert self.manager.num_free_blocks == self.manager.num_blocks - blocks_of(grown)
        self.manager.free(self.batch)
        cached = full_blocks_of(grown) if self.caching else 0
        assert self.manager.num_cached_blocks == cached

    def columns(self):
        return {}


class Frees:
    """Rounds in which a batch ends that filled the pool."""

    def __init__(self, manager, lengths, *, caching):
        self.manager = manager
        self.lengths = lengths
        self.caching = caching
        self.prompts = draw_prompts(lengths)
        self.batch = None

    def prepare(self):
        self.manager.reset_prefix_cache()
        self.batch = self.manager.prepare(self.prompts)
        self.manager.hash(self.batch)
        self.manager.admit(self.batch)
        assert self.manager.num_free_blocks == 0

    def run(self):
        self.manager.free(self.batch)

    def check(self):
        assert self.manager.num_free_blocks == self.manager.num_blocks
        cached = full_blocks_of(self.lengths) if self.caching else 0
        assert self.manager.num_cached_blocks == cached

    def columns(self):
        return {}


@pytest.mark.parametrize("implementation", NATIVE)
def bench_admit_without_caching(describe_row, make_manager, play):
    """Blocks for 256 prompts, of which both need no more than the lengths."""
    lengths = draw_lengths()

    def make(name):
        manager = make_manager(name, blocks_of(lengths), BLOCK_SIZE, prefix_caching=False)
        return Admissions(manager, lengths)

    describe_row("admit", "no caching", BLOCK_SIZE, NUM_PROMPTS)
    play(make)


@pytest.mark.parametrize("implementation", WITH_LISTS)
def bench_admit_to_an_empty_cache(describe_row, make_manager, play):
    """256 prompts that nothing has been seen of: hash, look up, allocate, register."""
    lengths = draw_lengths()

    def make(name):
        manager = make_manager(name, blocks_of(lengths), BLOCK_SIZE)
        return CachedAdmissions(manager, lengths, forget=True)

    describe_row("admit", "caching, nothing cached", BLOCK_SIZE, NUM_PROMPTS)
    play(make)


@pytest.mark.parametrize("implementation", WITH_LISTS)
def bench_admit_what_is_cached(describe_row, make_manager, play):
    """256 prompts that were there before: all but the block of the last token is shared."""
    lengths = draw_lengths()

    def make(name):
        manager = make_manager(name, 2 * blocks_of(lengths), BLOCK_SIZE)
        return Admissions(manager, lengths, (lengths - 1) // BLOCK_SIZE * BLOCK_SIZE)

    describe_row("admit", "caching, all cached", BLOCK_SIZE, NUM_PROMPTS)
    play(make)


@pytest.mark.parametrize("implementation", WITH_LISTS)
def bench_admit_under_eviction(describe_row, make_manager, play):
    """256 new prompts into a pool full of cached blocks: every block evicts one."""
    lengths = draw_lengths()
    older = draw_prompts(-(-lengths // BLOCK_SIZE) * BLOCK_SIZE, seed=2)

    def make(name):
        manager = make_manager(name, blocks_of(lengths), BLOCK_SIZE)
        return CachedAdmissions(manager, lengths, forget=True, older=older)

    describe_row("admit", "caching, every block evicts", BLOCK_SIZE, NUM_PROMPTS)
    play(make)


@pytest.mark.parametrize("implementation", NATIVE)
@pytest.mark.parametrize("num_sequences", [256, 1024])
@pytest.mark.parametrize("caching", CACHING)
def bench_decode_step(describe_row, make_manager, play, caching, num_sequences):
    """One more token for every sequence; a sixteenth of them open a block."""
    lengths = draw_lengths(num_sequences)
    num_blocks = blocks_of(lengths + STEPS + WARMUP)
    cached = CACHING[caching]

    def make(name):
        manager = make_manager(name, num_blocks, BLOCK_SIZE, prefix_caching=cached)
        return DecodeSteps(manager, lengths, caching=cached)

    describe_row("decode step", caching.replace("-", " "), BLOCK_SIZE, num_sequences)
    play(make, rounds=STEPS, turn=BLOCK_SIZE)


@pytest.mark.parametrize("implementation", NATIVE)
@pytest.mark.parametrize("caching", CACHING)
def bench_free(describe_row, make_manager, play, caching):
    lengths = draw_lengths()
    cached = CACHING[caching]

    def make(name):
        manager = make_manager(name, blocks_of(lengths), BLOCK_SIZE, prefix_caching=cached)
        return Frees(manager, lengths, caching=cached)

    describe_row("free", caching.replace("-", " "), BLOCK_SIZE, NUM_PROMPTS)
    play(make)
