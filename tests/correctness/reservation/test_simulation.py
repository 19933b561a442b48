"""The discrete-event run, on streams small enough to be followed by hand, and by its laws."""

import dataclasses

import numpy as np
import pytest

from pagedattn.config import ModelConfig
from pagedattn.reservation import (
    KVUse,
    RequestError,
    Requests,
    StepTime,
    fill,
    make_reservation,
    reservation_names,
    simulate,
)
from pagedattn.workloads import ALPACA, SHAREGPT, Request

NAMES = reservation_names()
SECOND = StepTime(fixed=1.0)


def stream(*rows):
    arrivals, prompts, outputs = np.array(rows, dtype=np.float64).T
    return Requests(arrivals, prompts.astype(np.int64), outputs.astype(np.int64))


def test_a_run_can_be_followed_by_hand():
    system = make_reservation("orca-oracle", 32, 32)
    # the first two fill the memory; the third waits until the first has ended, at 2 s
    run = simulate(system, stream((0, 14, 2), (0, 12, 4), (1.5, 5, 3)), SECOND)
    assert run.num_steps == 5
    assert run.peak_running == 2
    assert run.requests_per_s == pytest.approx(3 / 5)
    assert run.tokens_per_s == pytest.approx(9 / 5)
    # ended after 2, 4 and 5 s; 2 / 2, 4 / 4 and (5 - 1.5) / 3 seconds a token
    assert run.normalised_latency_s == pytest.approx((1 + 1 + 3.5 / 3) / 3)
    # measured while requests still come or wait: two steps with both
    assert run.mean_running == 2
    assert run.queued_tokens_per_s == 2
    assert run.use == KVUse((26 + 28) / 2, (6 + 4) / 2, 0, 0, 0)
    assert run.peak_tokens == 28
    assert system.use().free == 32


def test_a_run_that_is_stopped_counts_what_was_done_by_then():
    waiting = stream((0, 14, 2), (0, 12, 4), (1.5, 5, 3))
    run = simulate(make_reservation("orca-oracle", 32, 32), waiting, SECOND, max_steps=2)
    assert run.num_steps == 2
    assert run.requests_per_s == pytest.approx(1 / 2)
    assert run.tokens_per_s == pytest.approx(4 / 2)
    assert run.normalised_latency_s == pytest.approx(2 / 2)
    one = simulate(make_reservation("orca-oracle", 32, 32), waiting, SECOND, max_steps=1)
    assert one.tokens_per_s == 2
    assert np.isnan(one.normalised_latency_s)
    with pytest.raises(ValueError, match="max_steps is 0"):
        simulate(make_reservation("paged", 64, 32), waiting, SECOND, max_steps=0)


def test_a_static_batch_takes_in_nobody_until_it_ends():
    lengths = stream((0, 4, 2), (0, 4, 6), (0, 4, 3))
    static = simulate(make_reservation("fastertransformer", 40, 20), lengths, SECOND)
    other = simulate(make_reservation("orca-max", 64, 20), lengths, SECOND)
    assert static.num_steps == 6 + 3
    assert other.num_steps == 6  # the third enters when the first ends


def test_the_time_of_a_step_is_the_sum_of_what_it_does():
    step = StepTime(
        1, per_sequence=10, per_token=100, per_stored_token=1000, per_offloaded_slot=1e4
    )
    assert step.seconds(2, 3, 4, 5) == 1 + 20 + 300 + 4000 + 50_000
    run = simulate(make_reservation("orca-oracle", 64, 64), stream((0, 5, 2)), step)
    first = 1 + 10 + 600 + 5000  # the prompt's 5 tokens are computed, and the output's first
    second = 1 + 10 + 100 + 6000
    assert run.tokens_per_s == pytest.approx(2 / (first + second))


def test_a_roofline_is_worked_out_from_the_model():
    model = ModelConfig.preset("opt-13b")
    step = StepTime.roofline(model, bandwidth=1e12, flops=1e14, bus_bandwidth=1e10, efficiency=0.5)
    assert step.fixed == pytest.approx(2 * model.num_parameters / 0.5e12)
    assert step.per_token == pytest.approx(2 * model.num_parameters / 0.5e14)
    assert step.per_stored_token == pytest.approx(819_200 / 0.5e12)
    assert step.per_offloaded_slot == pytest.approx(819_200 / 0.5e10)
    quantised = dataclasses.replace(model, num_weight_bytes=10**9)
    assert StepTime.roofline(quantised, bandwidth=1e12, flops=1e14).fixed == pytest.approx(1e-3)
    unknown = ModelConfig("x", 1, 1, 1, 8, 8, 8, "float16")
    with pytest.raises(ValueError, match="of x is not known"):
        StepTime.roofline(unknown, bandwidth=1, flops=1)


@pytest.mark.parametrize("name", NAMES)
def test_every_system_serves_every_request_and_is_empty_again(name):
    rng = np.random.default_rng(0)
    requests = Requests.draw(ALPACA, rng, 200, rate=50.0, max_model_len=512)
    system = make_reservation(name, 4096, 512)
    seen = []
    step = StepTime(0.01, per_offloaded_slot=1e-6)
    run = simulate(system, requests, step, lambda done, of: seen.append((done, of)))
    assert system.use() == KVUse(0, 0, 0, 0, system.num_slots)
    assert run.requests_per_s * requests.output_tokens.mean() == pytest.approx(run.tokens_per_s)
    assert sum(run.use.shares().values()) == pytest.approx(1)
    assert run.use.num_slots == pytest.approx(system.num_slots)
    assert 1 <= run.mean_running <= run.peak_running
    assert len(seen) == run.num_steps // 1000
    again = simulate(system, requests, step)
    assert again == run


def test_littles_law_holds_where_nobody_waits_and_the_load_is_even():
    rng = np.random.default_rng(1)
    requests = Requests.draw(ALPACA, rng, 4000, rate=20.0, max_model_len=2048)
    run = simulate(make_reservation("paged", 1 << 20, 2048), requests, StepTime(0.05))
    assert run.num_preempted == 0
    rate = len(requests) / requests.arrival_s[-1]
    assert run.mean_waiting < 2  # those that came during a step
    assert run.mean_running == pytest.approx(rate * requests.output_tokens.mean() * 0.05, rel=0.03)


def test_what_had_to_go_is_computed_again():
    system = make_reservation("paged", 4 * 16, 64)
    run = simulate(system, stream((0, 16, 20), (0, 16, 20)), StepTime(0, per_token=1))
    # the second goes in the 17th step, and comes back with 32 tokens when the first has ended
    assert (run.num_preempted, run.num_steps) == (1, 24)
    assert run.tokens_per_s == pytest.approx(40 / (34 + 15 * 2 + 2 + 3 + 33 + 3))


def test_what_had_to_go_comes_back_before_those_that_wait():
    system = make_reservation("paged", 4 * 16, 64)
    run = simulate(system, stream(*4 * [(0, 16, 2)], (0, 48, 1)), SECOND)
    # two go in the first step and end after 4 s; only then the large one has room
    assert run.num_preempted == 2
    assert run.normalised_latency_s == pytest.approx((1 + 1 + 2 + 2 + 5) / 5)


def test_a_request_that_had_to_go_comes_back_with_what_it_has():
    system = make_reservation("paged", 8 * 16, 128)
    # 4 blocks of 8 each at the end: both do not fit; the second goes, and is computed again
    run = simulate(system, stream((0, 40, 60), (0, 40, 60)), SECOND)
    assert run.num_preempted >= 1
    assert run.num_steps < 120  # what the second had was not generated again
    assert run.tokens_per_s * run.num_steps == pytest.approx(120)


def test_a_request_that_can_never_fit_is_refused():
    with pytest.raises(RequestError, match="in 64 slots"):
        simulate(make_reservation("orca-oracle", 64, 2048), stream((0, 60, 10)), SECOND)
    with pytest.raises(ValueError, match="at least 1 request"):
        simulate(
            make_reservation("paged", 64, 32),
            Requests(*3 * [np.empty(0)]),
            SECOND,
        )


def test_a_memory_is_filled_until_one_does_not_fit():
    requests = Requests.draw(SHAREGPT, np.random.default_rng(0), 200, max_model_len=2048)
    filled = fill(make_reservation("orca-max", 15_728, 2048), requests, progress=0.5)
    assert filled.num_requests == 7
    first = slice(0, 7)
    half = requests.output_tokens[first] // 2
    stored = int((requests.prompt_tokens[first] + half).sum())
    kept = int((requests.output_tokens[first] - half).sum())
    lost = 15_728 - 7 * 2048
    assert filled.use == KVUse(stored, kept, 7 * 2048 - stored - kept, lost, 0)
    with pytest.raises(ValueError, match="all 200 requests fit"):
        fill(make_reservation("paged", 1 << 20, 2048), requests)


def test_paged_holds_more_than_anybody_else():
    requests = Requests.draw(SHAREGPT, np.random.default_rng(0), 2000, max_model_len=2048)
    held = {
        name: fill(make_reservation(name, 1 << 17, 2048), requests, seed=3).num_requests
        for name in NAMES
        if name != "flexgen"  # it has the host's memory, too
    }
    assert max(held, key=held.get) == "paged"
    assert held["paged"] > 1.5 * held["orca-oracle"]
    assert held["orca-oracle"] > held["orca-pow2"] > held["orca-max"] >= held["fastertransformer"]
    assert held["fastertransformer"] > held["transformers"]


@pytest.mark.parametrize("system", NAMES)
def test_waste_is_what_holds_no_token(system):
    requests = Requests.draw(SHAREGPT, np.random.default_rng(2), 2000, max_model_len=2048)
    use = fill(make_reservation(system, 1 << 16, 2048), requests).use
    assert use.waste == pytest.approx(1 - use.shares()["token_states"])
    assert KVUse(0, 0, 0, 0, 5).waste == 0


def test_requests_are_drawn_with_poisson_arrivals_and_fit_the_model():
    requests = Requests.draw(
        SHAREGPT, np.random.default_rng(0), 20_000, rate=4.0, max_model_len=1024
    )
    gaps = np.diff(requests.arrival_s)
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() == pytest.approx(0.25, rel=0.05)
    total = requests.prompt_tokens + requests.output_tokens
    assert total.max() == 1024
    assert requests.output_tokens.min() >= 1
    same = Requests.draw(SHAREGPT, np.random.default_rng(0), 20_000, rate=4.0, max_model_len=1024)
    assert np.array_equal(same.prompt_tokens, requests.prompt_tokens)
    at_once = Requests.draw(ALPACA, np.random.default_rng(0), 5, max_model_len=2048)
    assert at_once.arrival_s.tolist() == [0.0] * 5


def test_requests_of_a_trace_are_cut_to_the_model():
    trace = [Request(0.5, 10, 5), Request(0.5, 900, 200), Request(2.0, 4000, 7)]
    requests = Requests.of_trace(trace, max_model_len=1000)
    assert requests.arrival_s.tolist() == [0.5, 0.5, 2.0]
    assert requests.prompt_tokens.tolist() == [10, 500, 500]
    assert requests.output_tokens.tolist() == [5, 200, 7]


def test_streams_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="in order of arrival"):
        stream((1, 1, 1), (0, 1, 1))
    with pytest.raises(ValueError, match="at least 1 token"):
        stream((0, 1, 0))
    with pytest.raises(ValueError, match="2 arrivals were given for 1 prompts"):
        Requests(np.zeros(2), np.ones(1, int), np.ones(2, int))
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="rate is 0"):
        Requests.draw(ALPACA, rng, 5, rate=0, max_model_len=100)
    with pytest.raises(ValueError, match="max_model_len is 1"):
        Requests.draw(ALPACA, rng, 5, max_model_len=1)
