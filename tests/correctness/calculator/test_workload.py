"""Lengths of requests: scaled to a mean, cut to the model's maximum, drawn by seed."""

import numpy as np
import pytest

from pagedattn.calculator.workload import Workload, fill_with, workload_names
from pagedattn.config import ConfigError
from pagedattn.reservation import RequestError, make_reservation
from pagedattn.workloads import TraceError

TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{i:02d}.0000000,{prompt},{output}\n"
    for i, (prompt, output) in enumerate([(10, 20), (100, 4), (3000, 50)])
)


@pytest.mark.parametrize("name", workload_names())
@pytest.mark.parametrize(("mean", "most"), [(471, 2048), (512, 2048), (20, 2048), (100, 256)])
def test_a_running_request_holds_the_mean_that_was_asked_for(name, mean, most):
    workload = Workload.named(name, most, seed=3).scaled_to(mean)
    assert workload.mean_tokens == pytest.approx(mean, rel=2e-3)
    requests = workload.draw(np.random.default_rng(0), 5000)
    assert (requests.prompt_tokens + requests.output_tokens).max() <= most
    assert min(requests.prompt_tokens.min(), requests.output_tokens.min()) >= 1
    held = workload.held_tokens(np.random.default_rng(0), 20_000)
    assert held.mean() == pytest.approx(mean, rel=0.03)


@pytest.mark.parametrize("mean", [0, 1, -3, 2048, 1e9])
def test_a_mean_that_lengths_cannot_have_is_refused(mean):
    with pytest.raises(ConfigError, match=r"mean tokens must be above 1.5 and below 1536 .* not"):
        Workload.named("sharegpt", 2048, seed=0).scaled_to(mean)


def test_scaling_keeps_the_proportion_of_prompt_and_output():
    plain = Workload.named("sharegpt", 10**6, seed=0)
    prompt, output = plain.mean_lengths
    more_prompt, more_output = plain.scaled_to(2 * plain.mean_tokens).mean_lengths
    assert more_prompt / more_output == pytest.approx(prompt / output, rel=0.01)


def test_the_same_seed_draws_the_same_requests():
    one, other = (Workload.named("alpaca", 2048, seed=5) for _ in range(2))
    assert (one.prompts == other.prompts).all()
    assert (one.prompts != Workload.named("alpaca", 2048, seed=6).prompts).any()


def test_an_unknown_workload_is_refused():
    with pytest.raises(ConfigError, match="workload must be one of sharegpt, alpaca, azure"):
        Workload.named("chat", 2048, seed=0)


def test_a_trace_keeps_its_lengths_but_for_those_beyond_the_maximum(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    workload = Workload.of_trace(path, 2048)
    requests = workload.draw(np.random.default_rng(0), 200)
    pairs = set(zip(requests.prompt_tokens.tolist(), requests.output_tokens.tolist(), strict=True))
    assert pairs == {(10, 20), (100, 4), (1024, 50)}
    assert workload.mean_tokens == pytest.approx((20 + 102 + 1049) / 3)
    assert workload.num_cut == 1


@pytest.mark.parametrize(("most", "num_cut"), [(3050, 0), (3049, 1), (104, 1), (103, 2), (29, 3)])
def test_a_request_is_cut_from_one_token_above_the_maximum_on(tmp_path, most, num_cut):
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    workload = Workload.of_trace(path, most)
    kept = workload.draw(np.random.default_rng(0), 200)
    pairs = set(zip(kept.prompt_tokens.tolist(), kept.output_tokens.tolist(), strict=True))
    assert len({(10, 20), (100, 4), (3000, 50)} - pairs) == workload.num_cut == num_cut


def test_a_trace_that_is_none_is_refused(tmp_path):
    with pytest.raises(TraceError):
        Workload.of_trace(tmp_path / "absent.csv", 2048)


def test_a_memory_is_filled_however_many_requests_that_takes():
    # requests of 2 tokens where 1000 were expected to be 1000 tokens long
    short = Workload("short", np.ones(1), np.ones(1), 2048)
    long = Workload("long", np.full(1, 500.0), np.full(1, 500.0), 2048)
    mixed = Workload("mixed", np.array([1.0]), np.array([1.0]), 2048)
    for workload in (short, long, mixed):
        filled = fill_with(
            lambda: make_reservation("orca-oracle", 4096, 2048), workload, 16, seed=0
        )
        assert filled.num_requests == (4 if workload is long else 2048)


def test_a_request_that_does_not_fit_alone_is_told():
    workload = Workload("long", np.full(1, 1000.0), np.full(1, 1000.0), 2048)
    with pytest.raises(RequestError):
        fill_with(lambda: make_reservation("orca-max", 1024, 2048), workload, 1024, seed=0)
