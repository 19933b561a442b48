"""vLLM's block manager and ours, given the same requests, hold the same blocks."""

import subprocess
import sys

import numpy as np
import pytest

from pagedattn.peers import PagedattnBlockManager, VllmBlockManager
from pagedattn.peers.vllm_block_manager import unavailable

needs_vllm = pytest.mark.vllm
BLOCK_SIZE = 4


class Pair:
    """Both managers, asked the same; what each answers is an entry, vLLM's first."""

    def __init__(self, num_blocks, *, prefix_caching=True):
        self.managers = [
            kind(num_blocks, BLOCK_SIZE, prefix_caching=prefix_caching)
            for kind in (VllmBlockManager, PagedattnBlockManager)
        ]

    def admit(self, prompts):
        """Admit; return the batch of each, and the cached tokens of each prompt for each."""
        batches = [manager.prepare(prompts) for manager in self.managers]
        cached = []
        for manager, batch in zip(self.managers, batches, strict=True):
            manager.hash(batch)
            cached.append(list(manager.admit(batch)))
        return batches, cached

    def append(self, batches, token_ids=None):
        for manager, batch in zip(self.managers, batches, strict=True):
            manager.append(batch, None if token_ids is None else manager.tokens(token_ids))

    def free(self, batches):
        for manager, batch in zip(self.managers, batches, strict=True):
            manager.free(batch)

    def num_free(self):
        self.managers[1].manager.check_integrity()
        return [manager.num_free_blocks for manager in self.managers]

    def num_cached(self):
        return [manager.num_cached_blocks for manager in self.managers]


def drive(pair, rng, draw_prompts, num_actions=120):
    """Let requests come, decode and go at random; yield each admission's cached tokens, or None.

    A batch is admitted only where both have room for it with nothing shared.
    """
    live = []
    for _ in range(num_actions):
        room = min(pair.num_free())
        action = rng.choice(["admit", "append", "append", "free"])
        cached = None
        if action == "admit":
            prompts = draw_prompts()
            if sum(blocks_of(prompt.size) for prompt in prompts) <= room:
                batches, cached = pair.admit(prompts)
                live.append((batches, len(prompts)))
        elif action == "append" and live:
            batches, count = live[rng.integers(len(live))]
            if count <= room:
                pair.append(batches, rng.integers(0, 2**31 - 1, count))
        elif live:
            pair.free(live.pop(rng.integers(len(live)))[0])
        yield cached
    for batches, _ in live:
        pair.free(batches)
    yield None


def blocks_of(num_tokens):
    return -(-num_tokens // BLOCK_SIZE)


def draw_prompt(rng, documents, least):
    """A beginning of a document, then `least` or more tokens of its own."""
    document = documents[rng.integers(len(documents))]
    start = document[: rng.integers(1, document.size + 1)]
    own = rng.integers(100, 2**31 - 1, rng.integers(least, 9))
    return np.concatenate([start, own])


def draw_documents(rng):
    return [rng.integers(0, 100, rng.integers(1, 40)) for _ in range(4)]


@needs_vllm
def test_vllm_is_given_as_many_blocks_as_it_is_asked_for():
    manager = VllmBlockManager(5, BLOCK_SIZE, prefix_caching=False)
    assert manager.num_free_blocks == 5
    batch = manager.prepare([np.arange(5 * BLOCK_SIZE)])
    manager.admit(batch)
    assert manager.num_free_blocks == 0
    with pytest.raises(MemoryError, match="does not fit"):
        manager.admit(manager.prepare([np.arange(1)]))
    with pytest.raises(MemoryError, match="cannot grow"):
        manager.append(batch)
    with pytest.raises(RuntimeError, match="hold blocks"):
        manager.reset_prefix_cache()


@needs_vllm
def test_the_hash_is_the_one_that_vllm_takes_by_default():
    assert VllmBlockManager(5, BLOCK_SIZE).hash_algorithm == "sha256"


@needs_vllm
def test_prompts_are_not_hashed_before_they_are_asked_to_be():
    manager = VllmBlockManager(5, BLOCK_SIZE)
    (request,) = manager.prepare([np.arange(9)])
    assert request.block_hashes == []
    manager.hash([request])
    assert len(request.block_hashes) == 2


@needs_vllm
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 8, 9])
def test_a_prompt_that_is_there_shares_all_but_the_block_of_its_last_token(num_tokens):
    pair = Pair(16)
    prompt = np.arange(num_tokens) + 1000
    batches, cached = pair.admit([prompt])
    assert cached == [[0], [0]]
    pair.free(batches)
    batches, cached = pair.admit([prompt, prompt])
    expected = (num_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert cached == [[expected] * 2] * 2
    used = expected // BLOCK_SIZE + 2
    assert pair.num_free() == [16 - used] * 2
    pair.free(batches)
    for manager in pair.managers:
        manager.reset_prefix_cache()
    assert pair.num_cached() == [0, 0]
    assert pair.admit([prompt])[1] == [[0], [0]]


@needs_vllm
@pytest.mark.parametrize("is_known", [True, False])
def test_blocks_that_decoding_fills_are_found_if_their_tokens_are_known(is_known):
    pair = Pair(16)
    tokens = np.arange(12) + 7
    batches, _ = pair.admit([tokens[:2]])
    for token in tokens[2:]:
        pair.append(batches, np.array([token]) if is_known else None)
    pair.free(batches)
    assert pair.admit([tokens])[1] == [[8 if is_known else 0]] * 2


@needs_vllm
def test_without_prefix_caching_blocks_follow_from_the_lengths():
    pair = Pair(64, prefix_caching=False)
    lengths = np.array([1, 3, 4, 5, 8, 30])
    batches, cached = pair.admit([np.zeros(length, dtype=np.int64) for length in lengths])
    assert cached == [[0] * 6] * 2
    for step in range(9):
        assert pair.num_free() == [64 - blocks_of(lengths + step).sum()] * 2
        pair.append(batches)
    pair.free(batches)
    assert pair.num_free() == [64, 64]


@needs_vllm
@pytest.mark.parametrize("num_blocks", [24, 60, 1000])
@pytest.mark.parametrize("seed", range(20))
def test_requests_one_by_one_hold_the_same_blocks_and_hit_the_same_tokens(num_blocks, seed):
    """Every prompt ends with tokens of its own, so that no block is computed twice."""
    rng = np.random.default_rng(seed)
    documents = draw_documents(rng)
    pair, hits = Pair(num_blocks), 0
    for cached in drive(pair, rng, lambda: [draw_prompt(rng, documents, 1)]):
        if cached is not None:
            assert cached[0] == cached[1]
            hits += cached[0][0]
        assert pair.num_free()[0] == pair.num_free()[1]
        assert pair.num_cached()[0] == pair.num_cached()[1]
    assert pair.num_free() == [num_blocks] * 2
    assert hits > 0


@needs_vllm
@pytest.mark.parametrize("seed", range(20))
def test_batches_in_a_large_pool_hit_the_same_tokens_and_never_hold_more_than_vllm(seed):
    """A block that is computed twice is kept twice by vLLM, and once by us when one is idle."""
    rng = np.random.default_rng(seed)
    documents = draw_documents(rng)

    def draw_prompts():
        return [draw_prompt(rng, documents, 0) for _ in range(rng.integers(1, 4))]

    pair = Pair(1000)
    for cached in drive(pair, rng, draw_prompts):
        assert cached is None or cached[0] == cached[1]
        assert pair.num_free()[0] <= pair.num_free()[1]
        assert pair.num_cached()[0] >= pair.num_cached()[1]


@needs_vllm
@pytest.mark.parametrize("num_blocks", [24, 60])
def test_batches_in_a_small_pool_hit_no_fewer_tokens_than_under_vllm(num_blocks):
    """For one prompt vLLM may evict what the next prompt of the batch would have hit."""
    hits = np.zeros(2, dtype=int)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        documents = draw_documents(rng)

        def draw_prompts(rng=rng, documents=documents):
            return [draw_prompt(rng, documents, 0) for _ in range(rng.integers(1, 4))]

        for cached in drive(Pair(num_blocks), rng, draw_prompts):
            hits += (0, 0) if cached is None else np.sum(cached, axis=1)
    assert hits[1] >= hits[0] > 0


def test_without_vllm_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert unavailable() == "vLLM is not installed"
    with pytest.raises(RuntimeError, match="needs vLLM: vLLM is not installed"):
        VllmBlockManager(5, BLOCK_SIZE)


@needs_vllm
def test_a_vllm_that_is_broken_is_unavailable_with_its_reason(monkeypatch):
    assert unavailable() is None
    monkeypatch.setitem(sys.modules, "vllm.v1.core.kv_cache_manager", None)
    assert unavailable().startswith("vLLM cannot be imported (")


def test_the_peers_are_imported_without_vllm():
    code = "import sys, pagedattn.peers; print('vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
