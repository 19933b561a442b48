"""SOSP '23, Figure 13: how many requests are batched on average, OPT-13B on an A100 of 40 GB.

The paper prints no time of a step. Two numbers of `STEP` were chosen so that vLLM, which hardly
waits for memory here, has the figure's batches by Little's law: 45 ms at 30 requests and 2 requests
of 338 tokens a second, 75 ms at 132 and 30 of 58. The batches of the three Orcas do not depend on
them: their memory is full.
"""

import numpy as np
import pytest

from pagedattn.config import ModelConfig
from pagedattn.memory import kv_bytes_per_token
from pagedattn.reservation import Requests, StepTime, make_reservation, simulate
from pagedattn.workloads import ALPACA, SHAREGPT

OPT = ModelConfig.preset("opt-13b")
STEP = StepTime(
    fixed=0.034,
    per_sequence=0.2e-3,
    per_token=2 * OPT.num_parameters / 312e12,  # the A100's dense float16 rate
    per_stored_token=kv_bytes_per_token(OPT) / 1.555e12,  # and its bandwidth
)
PRINTED = {
    ("sharegpt", "orca-max"): 7.00,
    ("sharegpt", "orca-pow2"): 9.81,
    ("sharegpt", "orca-oracle"): 13.62,
    ("sharegpt", "paged"): 30.42,
    ("alpaca", "orca-max"): 7.00,
    ("alpaca", "orca-pow2"): 43.24,
    ("alpaca", "orca-oracle"): 72.75,
    ("alpaca", "paged"): 132.44,
}
LOADS = {"sharegpt": (SHAREGPT, 2.0, 1000), "alpaca": (ALPACA, 30.0, 4000)}


@pytest.mark.parametrize(("workload", "name"), PRINTED)
def test_mean_batches_are_those_of_figure_13(workload, name):
    lengths, rate, count = LOADS[workload]
    rng = np.random.default_rng(0)
    requests = Requests.draw(lengths, rng, count, rate=rate, max_model_len=2048)
    run = simulate(make_reservation(name, 15_728, 2048), requests, STEP)
    assert run.mean_running == pytest.approx(PRINTED[workload, name], rel=0.25)
