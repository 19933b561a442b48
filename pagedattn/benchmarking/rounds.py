"""How many rounds a benchmark gets."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def rounds_within(
    call: Callable[[], object], seconds: float = 0.5, least: int = 5, most: int = 200
) -> int:
    """Rounds of `call` that take about `seconds`, from its second call's time.

    The first call is a warm-up, so that compilation is not counted.
    """
    call()
    begin = time.perf_counter()
    call()
    each = max(time.perf_counter() - begin, 1e-9)
    return max(least, min(most, round(seconds / each)))
