"""SOSP '23, Figure 2: what OPT-13B's KV memory is used for while ShareGPT requests wait."""

import numpy as np
import pytest

from pagedattn.reservation import Requests, StepTime, make_reservation, simulate
from pagedattn.workloads import SHAREGPT

NUM_SLOTS = 15_728  # Table 1: 12 GiB of 819,200 bytes a token
POINTS = 5.0
PRINTED = {  # token states, reservation, internal, external and others; percent
    "orca-max": (20.4, 13.3, 57.3, 8.9),
    "orca-pow2": (26.8, 17.9, 13.6, 41.6),
    "orca-oracle": (38.2, 25.2, 0.0, 36.6),
}


@pytest.fixture(scope="module")
def requests_that_wait():
    return Requests.draw(SHAREGPT, np.random.default_rng(0), 600, max_model_len=2048)


def shares_of(name, requests):
    run = simulate(make_reservation(name, NUM_SLOTS, 2048), requests, StepTime(fixed=1.0))
    shares = {cause: 100 * share for cause, share in run.use.shares().items()}
    assert shares["free"] == 0
    return shares


@pytest.mark.parametrize("name", PRINTED)
def test_contiguous_memory_goes_where_figure_2_says(name, requests_that_wait):
    shares = shares_of(name, requests_that_wait)
    for cause, printed in zip(shares, PRINTED[name], strict=False):
        assert shares[cause] == pytest.approx(printed, abs=POINTS), cause


def test_paged_memory_holds_tokens(requests_that_wait):
    assert shares_of("paged", requests_that_wait)["token_states"] == pytest.approx(96.3, abs=POINTS)
