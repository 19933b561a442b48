"""SOSP '23, Figure 15: blocks saved by sharing, over blocks without sharing, on real forks.

Parallel sampling follows from the lengths alone. How often beams die depends on the model and the
text, which the paper does not describe: one number for each data set, the `sharpness` of the
scores, was chosen to fit; widths 2, 4 and 6 then come out together.
"""

import numpy as np
import pytest

from pagedattn.reservation import Requests, beam_search, parallel_sampling
from pagedattn.workloads import ALPACA, SHAREGPT

POINTS = 3.0


def requests_of(lengths, count):
    return Requests.draw(lengths, np.random.default_rng(0), count, max_model_len=2048)


@pytest.mark.parametrize(
    ("lengths", "count", "width", "printed"),
    [
        (ALPACA, 1000, 2, 6.09),
        (ALPACA, 1000, 4, 8.53),
        (ALPACA, 1000, 6, 9.79),
        (SHAREGPT, 500, 2, 16.2),
        (SHAREGPT, 500, 6, 30.5),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_parallel_samples_save_what_figure_15_says(lengths, count, width, printed):
    saving = 100 * parallel_sampling(requests_of(lengths, count), width).saving
    assert saving == pytest.approx(printed, abs=POINTS)


@pytest.mark.parametrize(
    ("lengths", "count", "sharpness", "width", "printed"),
    [
        (ALPACA, 500, 11, 2, 37.56),
        (ALPACA, 500, 11, 4, 53.13),
        (ALPACA, 500, 11, 6, 55.16),
        (SHAREGPT, 200, 80, 2, 44.3),
        (SHAREGPT, 200, 80, 6, 66.3),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_beams_save_what_figure_15_says(lengths, count, sharpness, width, printed):
    rng = np.random.default_rng(1)
    saving = 100 * beam_search(requests_of(lengths, count), width, rng, sharpness).saving
    assert saving == pytest.approx(printed, abs=POINTS)
