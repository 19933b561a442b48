"""Few cases in which every two values meet: all pairs, where all combinations are too many."""

from __future__ import annotations

import random
from itertools import combinations, product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


def pairwise(
    first: Sequence[Any], second: Sequence[Any], *more: Sequence[Any]
) -> list[tuple[Any, ...]]:
    """Choose combinations so that each value of an axis meets each value of every other axis.

    Most faults show when one or two parameters have certain values, and few need three (Kuhn,
    Wallace and Gallo 2004). The next row is always the one with the most pairs that no row before
    has; of several, one that chance takes, so that values which nothing forces are mixed. The
    search looks at the whole product, which has to be small: thousands. There are usually as many
    rows as the two longest axes have pairs, and fewer cannot be.

    `pairwise("ab", "xy", "12")` has 4 rows, one for each pair of two axes, not 8.

    Args:
        first: values of a parameter. One that is given twice meets all others twice, in different
            rows: so the value that matters most gets more cases.
        second: values of another.
        more: values of further ones.

    Returns:
        Rows, each with a value of every axis; the same ones in each process.

    """
    axes = (first, second, *more)
    rows = list(product(*(range(len(axis)) for axis in axes)))
    random.Random(0).shuffle(rows)
    bits: dict[Any, int] = {}

    def bit(pair: Any) -> int:
        return bits.setdefault(pair, 1 << len(bits))

    pairs = {row: sum(map(bit, combinations(enumerate(row), 2))) for row in rows}
    left = (1 << len(bits)) - 1
    chosen = []
    while left:
        best = max(rows, key=lambda row: (left & pairs[row]).bit_count())
        chosen.append(tuple(axis[place] for axis, place in zip(axes, best, strict=True)))
        left &= ~pairs[best]
    return chosen
