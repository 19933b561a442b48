"""A sequence keeps its tokens, and a fork goes its own way."""

import numpy as np
import pytest

from pagedattn.sequence import Sequence


@pytest.mark.parametrize("num_prompt_tokens", [1, 4, 7])
def test_appended_tokens_come_after_the_prompt(num_prompt_tokens):
    prompt = list(range(10, 10 + num_prompt_tokens))
    sequence = Sequence(prompt)
    for token_id in range(20):
        sequence.append(token_id)
    assert sequence.num_tokens == num_prompt_tokens + 20
    assert sequence.num_prompt_tokens == num_prompt_tokens
    assert sequence.token_ids.tolist() == prompt + list(range(20))
    assert sequence.prompt_token_ids.tolist() == prompt
    assert sequence.output_token_ids.tolist() == list(range(20))
    assert sequence.token_ids.dtype == np.int64


def test_a_new_sequence_has_no_output():
    assert Sequence([3]).output_token_ids.tolist() == []


def test_an_array_is_copied_and_not_aliased():
    prompt = np.array([1, 2, 3], dtype=np.int64)
    sequence = Sequence(prompt)
    prompt[0] = 9
    assert sequence.token_ids.tolist() == [1, 2, 3]


def test_returned_arrays_are_read_only_and_stay_as_they_were():
    sequence = Sequence([1, 2])
    before = sequence.token_ids
    for token_id in (7, 8, 9):
        sequence.append(token_id)
    assert before.tolist() == [1, 2]
    with pytest.raises(ValueError, match="read-only"):
        before[0] = 5


def test_a_fork_starts_equal_and_shares_nothing():
    parent = Sequence([1, 2])
    parent.append(3)
    child = parent.fork()
    assert child.output_token_ids.tolist() == [3]
    parent.append(4)
    child.append(5)
    child.append(6)
    assert parent.token_ids.tolist() == [1, 2, 3, 4]
    assert child.token_ids.tolist() == [1, 2, 3, 5, 6]
    assert child.num_prompt_tokens == 2


@pytest.mark.parametrize("bad", [-1, True, 1.0, "1", None, 2**63], ids=repr)
def test_what_is_no_token_id_is_refused_and_changes_nothing(bad):
    sequence = Sequence([1])
    with pytest.raises(ValueError, match="a token id must be"):
        sequence.append(bad)
    assert sequence.token_ids.tolist() == [1]
    with pytest.raises(ValueError, match="a token id must be"):
        Sequence([1, bad])


@pytest.mark.parametrize(
    "prompt",
    [np.array([1, -1]), np.array([1.0]), np.array([True]), np.array([[1]]), "12"],
    ids=repr,
)
def test_a_prompt_that_holds_no_token_ids_is_refused(prompt):
    with pytest.raises(ValueError, match="a token id must be"):
        Sequence(prompt)


@pytest.mark.parametrize("prompt", [[], np.array([], dtype=np.int64)], ids=repr)
def test_an_empty_prompt_is_refused(prompt):
    with pytest.raises(ValueError, match="1 token or more, not 0"):
        Sequence(prompt)
