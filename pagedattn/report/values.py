"""Values of a results file: each is what it has to be, or a sentence says why not."""

from __future__ import annotations

import json
from typing import Any

from pagedattn.report.text import clean, cut

LARGEST = 1e18
"""The largest number that a results file may hold, in any unit."""


class ResultsError(ValueError):
    """A results file cannot be used; the message is one sentence for the person who gave it."""


def expect_object(value: Any, what: str) -> dict[str, Any]:
    """Return `value` if it is a JSON object, else raise ResultsError naming `what`."""
    if not isinstance(value, dict):
        raise ResultsError(f"{what} must be a JSON object, not {shown(value)}.")
    return value


def expect_number(value: Any, *what: str, least: float = 0) -> float:
    """Return `value` as a float if it is a number from `least` to 1e18, else raise ResultsError.

    `what` are the words that the error names it by: they are joined only then, as most are right.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= LARGEST:
        name, limits = " ".join(what), f"{least:g} to {LARGEST:g}"
        raise ResultsError(f"{name} must be a number from {limits}, not {shown(value)}.")
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
    return {*map(type, data)} <= {int, float} and min(data) >= 0 and max(data) <= LARGEST
