"""Flat arrays for ragged batches, against the obvious loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedattn.block_manager.ragged import (
    distinct,
    first_of_each,
    nonzero,
    ragged,
    ragged_numbers,
    token_counts,
    whole_numbers,
)


@pytest.mark.parametrize(
    ("given_values", "expected"),
    [
        pytest.param(3, [3], id="a-number"),
        pytest.param([], [], id="an-empty-list"),
        pytest.param(range(3), [0, 1, 2], id="a-range"),
        pytest.param((5, -1), [5, -1], id="a-tuple"),
        pytest.param(np.array([1, 2], np.uint8), [1, 2], id="bytes"),
        pytest.param(np.array([2**63 - 1], np.uint64), [2**63 - 1], id="the-largest-uint64"),
        pytest.param(np.int32(7), [7], id="a-numpy-scalar"),
    ],
)
def test_whole_numbers_become_a_flat_int64_array(given_values, expected):
    numbers = whole_numbers(given_values, "numbers")
    assert numbers.dtype == np.int64
    assert numbers.ndim == 1
    assert numbers.tolist() == expected


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(1.0, id="a-fraction"),
        pytest.param([1, 2.5], id="a-list-with-a-fraction"),
        pytest.param(True, id="a-boolean"),
        pytest.param(np.array([True, False]), id="booleans"),
        pytest.param("3", id="text"),
        pytest.param(None, id="nothing"),
        pytest.param([[1, 2]], id="two-dimensions"),
        pytest.param([[]], id="two-empty-dimensions"),
        pytest.param([[1], [2, 3]], id="lists-of-different-lengths"),
        pytest.param([2**63], id="too-large-for-int64"),
        pytest.param([2**70], id="too-large-for-uint64"),
    ],
)
def test_what_is_no_flat_list_of_whole_numbers_is_refused_by_name(bad):
    with pytest.raises(ValueError, match=r"^lengths must be (a whole number|below 2\*\*63)"):
        whole_numbers(bad, "lengths")


@pytest.mark.parametrize("bad", [0, -1, [3, 0], [5, -7, 2]], ids=str)
def test_a_token_count_below_one_is_refused_and_said(bad):
    with pytest.raises(ValueError, match=f"is {np.min(bad)}; each must be at least 1"):
        token_counts(bad)


def test_token_counts_of_one_or_none_are_accepted():
    assert token_counts(1).tolist() == [1]
    assert token_counts([]).tolist() == []


def test_the_worked_example_of_ragged_ranges_holds():
    rows, numbers = ragged(np.array([0, 5, 2]), np.array([2, 5, 5]))
    assert rows.tolist() == [0, 0, 2, 2, 2]
    assert numbers.tolist() == [0, 1, 2, 3, 4]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), max_size=8))
def test_ragged_ranges_are_those_of_nested_loops(ranges):
    starts = np.array([start for start, _ in ranges], np.int64)
    stops = starts + np.array([count for _, count in ranges], np.int64)
    rows, numbers = ragged(starts, stops)
    pairs = [(i, n) for i in range(len(ranges)) for n in range(starts[i], stops[i])]
    assert list(zip(rows.tolist(), numbers.tolist(), strict=True)) == pairs


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5), st.integers(-9, 9)), max_size=8))
def test_ragged_numbers_are_raised_by_their_rows_shift(ranges):
    starts, counts, shifts = np.array(ranges, np.int64).reshape(-1, 3).T
    expected = [shift + n for start, count, shift in ranges for n in range(start, start + count)]
    assert ragged_numbers(starts, starts + counts, shifts).tolist() == expected
    assert ragged_numbers(starts, starts + counts, 7).tolist() == [
        7 + n for start, count, _ in ranges for n in range(start, start + count)
    ]


@given(st.lists(st.integers(0, 5)))
def test_distinct_ids_are_those_of_a_set_in_order(blocks):
    assert distinct(np.array(blocks, np.int32)).tolist() == sorted(set(blocks))


@given(st.lists(st.integers(-1, 1)))
def test_nonzero_places_are_those_of_a_loop(values):
    assert nonzero(np.array(values, np.int64)).tolist() == [i for i, v in enumerate(values) if v]


def test_the_worked_example_of_first_equal_rows_holds():
    rows = np.array([[1, 2], [1, 3], [1, 2]], np.uint64)
    assert first_of_each(rows).tolist() == [0, 1, 0]


@given(st.lists(st.tuples(*[st.sampled_from([0, 1, 2**64 - 1])] * 4), max_size=12))
def test_the_first_equal_row_is_found_although_words_agree(rows):
    keys = np.array(rows, np.uint64).reshape(-1, 4)
    assert first_of_each(keys).tolist() == [rows.index(row) for row in rows]


def test_the_first_equal_row_is_found_among_thousands():
    keys = np.random.default_rng(0).integers(0, 40, (5000, 2)).astype(np.uint64)
    first = {}
    expected = [first.setdefault(tuple(key), i) for i, key in enumerate(keys.tolist())]
    assert first_of_each(keys).tolist() == expected
