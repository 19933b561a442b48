"""Ragged batches as flat arrays, and the checks that every batch of numbers passes first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def whole_numbers(values: ArrayLike, what: str) -> NDArray[np.int64]:
    """Return `values` as a one-dimensional int64 array; refuse fractions and booleans."""
    if type(values) is np.ndarray and values.dtype == np.int64 and values.ndim == 1:
        return values
    try:
        array = np.asarray(values)
    except ValueError:  # lists of different lengths
        raise ValueError(f"{what} must be a whole number or a flat list of them") from None
    if array.size == 0:
        array = array.astype(np.int64)
    if array.ndim > 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"{what} must be a whole number or a flat list of them; "
            f"this is an array of {array.dtype} with {array.ndim} dimensions"
        )
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{what} must be below 2**63; one is {array.max()}")
    return array.astype(np.int64, copy=False).reshape(-1)


def whole_number(value: object, what: str, least: int) -> int:
    """Return `value` as an `int`; refuse fractions, booleans and what is below `least`."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise ValueError(f"{what} is {value!r}; it must be a whole number of at least {least}")
    return int(value)


def nonzero(values: NDArray[Any]) -> NDArray[np.int64]:
    """Places of the non-zero `values`, one-dimensional (`np.flatnonzero` with less overhead)."""
    return values.nonzero()[0]


def token_counts(values: ArrayLike) -> NDArray[np.int64]:
    """Return `values` as int64 [num_sequences], each at least 1."""
    counts = whole_numbers(values, "token counts")
    if counts.size and counts.min() < 1:
        raise ValueError(f"a token count is {counts.min()}; each must be at least 1")
    return counts


def whole_sum(counts: NDArray[np.int64]) -> int:
    """Return the sum of `counts`, however large."""
    if counts.max(initial=0) < 1 << 32:
        return int(counts.sum())
    return sum(counts.tolist())


def ragged(
    starts: NDArray[Any], stops: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row numbers and numbers within the row of the ranges `starts[i]` to `stops[i]`.

    Worked example: starts [0, 5, 2] and stops [2, 5, 5] give rows [0, 0, 2, 2, 2] and
    numbers [0, 1, 2, 3, 4].
    """
    rows = np.repeat(np.arange(starts.size), stops - starts)
    return rows, ragged_numbers(starts, stops)


def ragged_numbers(
    starts: NDArray[Any], stops: NDArray[Any], shifts: NDArray[np.int64] | int = 0
) -> NDArray[np.int64]:
    """Return the second array of `ragged`, each row's numbers raised by its shift."""
    counts = stops - starts
    ends = np.cumsum(counts)
    numbers = np.repeat(starts - (ends - counts) + shifts, counts)
    numbers += np.arange(numbers.size)
    return numbers


def distinct(blocks: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the ids that occur in `blocks`, ascending (many times faster than `np.unique`)."""
    ordered = np.sort(blocks)
    if ordered.size < 2:
        return ordered
    new = np.empty(ordered.size, dtype=bool)
    new[0] = True
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    return ordered[new]


def first_of_each(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For each row of `keys`, the index of the first row that equals it.

    Worked example: rows a, b, a give [0, 1, 0]. Rows are told apart by all their words; the
    first word only sorts them. (Rows that differ but share the first word may, if they come
    in turns, be taken for more kinds than they are, never for fewer.)

    Args:
        keys: uint64 [num_keys, num_words].

    """
    order = np.argsort(keys[:, 0])
    ordered = keys[order]
    new = np.ones(order.size, dtype=bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    if (new[1:] & (ordered[1:, 0] == ordered[:-1, 0])).any():
        order = np.lexsort(keys.T)
        ordered = keys[order]
        new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    starts = nonzero(new)
    first = np.empty(order.size, dtype=np.int64)
    if starts.size == order.size:
        first[order] = order
    else:
        heads = np.minimum.reduceat(order, starts)
        first[order] = heads[np.cumsum(new) - 1]
    return first
