"""Prompts as token ids: drawn, or made so that they begin alike where a trace says so."""

import doctest

import numpy as np
import pytest

from pagedattn.workloads import (
    VOCABULARY,
    Request,
    count_repeated_blocks,
    prompt_of_hashes,
    prompts,
    random_prompts,
)


def test_random_prompts_have_the_lengths_asked_for_and_tokens_of_the_vocabulary():
    drawn = random_prompts(np.random.default_rng(0), [1, 500, 3])
    assert [prompt.size for prompt in drawn] == [1, 500, 3]
    assert all(prompt.dtype == np.int32 for prompt in drawn)
    assert all(((prompt >= 0) & (prompt < VOCABULARY)).all() for prompt in drawn)
    assert np.unique(drawn[1]).size > 450


@pytest.mark.parametrize("block_tokens", [4, 16, 512])
def test_blocks_are_equal_exactly_where_their_hashes_are(block_tokens):
    hashes = [*range(2000), 2**17, 2**34, 2**51, 2**63, 0, 5]
    prompt = prompt_of_hashes(hashes, block_tokens)
    assert prompt.dtype == np.int32
    assert prompt.size == len(hashes) * block_tokens + 1
    blocks = [block.tobytes() for block in prompt[:-1].reshape(-1, block_tokens)]
    assert len(set(blocks)) == len(set(hashes))
    assert blocks[-2:] == [blocks[0], blocks[5]]
    assert prompt.min() >= 0
    assert prompt.max() < VOCABULARY


def test_a_prompt_of_hashes_ends_with_its_last_token():
    assert prompt_of_hashes([3], 4, last_token=9)[-1] == 9
    assert prompt_of_hashes([], 4, last_token=9).tolist() == [9]


def test_tokens_look_drawn_and_not_counted():
    tokens = prompt_of_hashes([1], 512)
    assert np.unique(tokens).size > 450
    assert tokens.mean() == pytest.approx(VOCABULARY / 2, rel=0.1)


def test_blocks_too_small_for_a_hash_are_refused():
    with pytest.raises(ValueError, match="block_tokens must be 4 or more, not 3"):
        prompt_of_hashes([1], 3)


def test_repeated_blocks_are_those_that_an_earlier_request_had():
    trace = [Request(0.0, 9, 1, hashes) for hashes in [(1, 2, 3), (1, 2, 4), (), (1, 5), (2, 4)]]
    assert count_repeated_blocks(trace) == (5, 10)
    assert count_repeated_blocks([]) == (0, 0)


def test_the_examples_in_docstrings_hold():
    outcome = doctest.testmod(prompts)
    assert outcome.attempted > 0 == outcome.failed
