"""What a reader wants of a run: percentiles, and when more users stop helping."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pagedattn.serving.clients import LoadRun

PERCENTILES = (50, 90, 99)
SATURATED = 1.05


def percentiles(values: Sequence[float]) -> dict[int, float] | None:
    """The 50th, 90th and 99th percentile, interpolated; None of no values."""
    if not values:
        return None
    found = np.percentile(np.asarray(values), PERCENTILES)
    return dict(zip(PERCENTILES, found.tolist(), strict=True))


def is_saturated(runs: Sequence[LoadRun]) -> bool:
    """Whether the last two steps of a sweep each brought less than 5 % more output tokens/s."""
    rates = [run.per_second(run.output_tokens) for run in runs]
    if len(rates) < 3:
        return False
    return rates[-1] < SATURATED * rates[-2] and rates[-2] < SATURATED * rates[-3]
