"""A few rows hold every two values of different axes, and no more rows than that needs."""

import itertools
import subprocess
import sys

import pytest

from pagedattn.testing import pairwise

AXES = {
    "two": ["ab", "xyz"],
    "three of two": ["ab", "xy", "12"],
    "many": [range(4), range(3), range(4), range(6), range(10)],
    "features": [range(4), range(5), range(8), range(2), range(2), range(3), range(5)],
    "one value": [range(3), "x", range(2)],
}


def pairs(rows):
    """Every two values of a row, each with its axis."""
    return {pair for row in rows for pair in itertools.combinations(enumerate(row), 2)}


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_every_two_values_meet(axes):
    rows = pairwise(*axes)
    assert pairs(rows) == pairs(itertools.product(*axes))
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_there_are_hardly_more_rows_than_the_longest_two_axes_have_pairs(axes):
    *_, second, first = sorted(len(axis) for axis in axes)
    assert len(pairwise(*axes)) <= 1.05 * first * second


def test_a_value_that_is_given_twice_meets_each_other_twice():
    rows = pairwise("aab", range(4), range(3))
    for axis, size in ((1, 4), (2, 3)):
        for value in range(size):
            assert sum(row[0] == "a" and row[axis] == value for row in rows) >= 2


def test_values_may_be_anything_and_an_axis_may_be_empty():
    assert pairwise([{}, {"window": 1}], [None]) in (
        [({}, None), ({"window": 1}, None)],
        [({"window": 1}, None), ({}, None)],
    )
    assert pairwise([], "ab") == []


def test_each_process_chooses_the_same_rows():
    code = "from pagedattn.testing import pairwise; print(pairwise('abc', 'wxyz', '12'))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == str(pairwise("abc", "wxyz", "12"))
