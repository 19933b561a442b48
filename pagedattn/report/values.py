"""Values of a results file: each is what it has to be, or a sentence says why not."""

from __future__ import annotations

import json
from typing import Any

from pagedattn.report.text import clean, cut

LARGEST = 1e18
"""The largest number that a results file may hold, in any unit."""

SMALLEST = 1e-30
"""The smallest number above 0 that a results file may hold, in any unit."""


class ResultsError(ValueError):
    """A results file cannot be used; the message is one sentence for the person who gave it."""


def expect_object(value: Any, what: str) -> dict[str, Any]:
    """Return `value` if it is a JSON object, else raise ResultsError naming `what`."""
    if not isinstance(value, dict):
        raise ResultsError(f"{what} must be a JSON object, not {shown(value)}.")
    return value


def expect_number(
    value: Any,
    *what: str,
    least: float = 0,
    most: float = LARGEST,
    smallest: float = SMALLEST,
) -> float:
    """Return `value` as a float if it is a plausible number, else raise ResultsError.

    It is plausible from `least` to `most`, and not if it is above 0 and below `smallest`: ratios
    of such numbers are beyond what a float holds. `what` are the words that the error names it by:
    they are joined only then, as most are right.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= most or 0 < value < smallest:
        limits = f"a number from {least:g} to {most:g}"
        if is_number and 0 < value < smallest:
            limits = f"0 or a number from {smallest:g} to {most:g}"
        raise ResultsError(f"{' '.join(what)} must be {limits}, not {shown(value)}.")
    return float(value)


def shown(value: Any) -> str:
    """Return a value as an error's sentence shows it."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and abs(value) > LARGEST:
        return "a larger number"
    return cut(json.dumps(value), 60)


def text_of(value: Any, *what: str) -> str | None:
    """Return a string, cleaned; None for null or an empty one; or raise ResultsError."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise ResultsError(f"{' '.join(what)} must be a string, not {shown(value)}.")
    return clean(value) or None


def count_of(value: Any, *what: str) -> int | None:
    """Return a whole number, None for null, or raise ResultsError."""
    if value is None:
        return None
    number = expect_number(value, *what)
    if not number.is_integer():
        raise ResultsError(f"{' '.join(what)} must be a whole number, not {shown(value)}.")
    return int(value)


def are_all_numbers(data: list[Any]) -> bool:
    """Whether `expect_number` would take each, found in one look at all."""
    if not {*map(type, data)} <= {int, float} or max(data) > LARGEST:
        return False
    least = min(data)
    return least >= SMALLEST or (least == 0 and min(filter(None, data), default=1) >= SMALLEST)
