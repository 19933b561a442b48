"""Clients of an engine whose steps take known times see those times."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from pagedattn.serving.clients import run_clients
from pagedattn.serving.load import ServingRequest
from pagedattn.serving.measures import is_saturated, percentiles

spec = importlib.util.spec_from_file_location("engines", Path(__file__).parent / "engines.py")
engines = importlib.util.module_from_spec(spec)
spec.loader.exec_module(engines)


def requests(*sizes):
    return [ServingRequest(np.arange(prompt), output) for prompt, output in sizes]


def run(sizes, users, **options):
    clock = engines.Clock()
    engine = engines.SteppedEngine(clock, **options)
    return run_clients(engine, requests(*sizes), users, clock=clock), engine


def test_one_user_waits_for_the_prompt_and_then_for_each_token():
    seen, engine = run([(5, 3), (7, 2)], users=1)
    assert seen.first_token_s == [4.0, 4.0]
    assert seen.inter_token_s == [1.0, 1.0, 1.0]
    assert seen.latency_s == [6.0, 5.0]
    assert seen.seconds == 11.0
    assert (seen.completed, seen.prompt_tokens, seen.output_tokens) == (2, 12, 5)
    assert seen.per_second(seen.output_tokens) == pytest.approx(5 / 11)
    assert engine.most_at_once == 1


@pytest.mark.parametrize("users", [1, 2, 3, 8])
def test_no_more_requests_than_users_are_ever_in_the_engine(users):
    seen, engine = run([(4, 3)] * 8, users)
    assert engine.most_at_once == users
    assert seen.completed == 8


def test_a_request_that_waits_in_the_engine_waits_longer_for_its_first_token():
    seen, _ = run([(4, 2), (4, 2)], users=2, most=1)
    assert seen.first_token_s == [4.0, 9.0]


def test_tokens_of_one_step_came_at_once():
    seen, _ = run([(4, 5)], users=1, tokens_a_step=2)
    assert sorted(seen.inter_token_s) == [0.0, 0.0, 1.0, 1.0]
    assert seen.output_tokens == 5


def test_an_interrupted_run_keeps_what_it_received_and_leaves_the_engine_empty():
    seen, engine = run([(4, 2), (4, 9)], users=2, interrupt_at=4)
    assert seen.interrupted
    assert (seen.completed, seen.output_tokens) == (1, 5)
    assert seen.seconds == 6.0
    assert engine.aborted == [1]


def test_no_users_are_refused():
    with pytest.raises(ValueError, match="users must be 1 or more"):
        run([(1, 1)], users=0)


def test_percentiles_are_interpolated_and_absent_of_nothing():
    assert percentiles([]) is None
    assert percentiles([1.0, 2.0, 3.0]) == pytest.approx({50: 2.0, 90: 2.8, 99: 2.98})


@pytest.mark.parametrize(
    ("rates", "expected"),
    [([10, 20], False), ([10, 20, 20.5], False), ([10, 20, 20.5, 21], True), ([10, 9, 20], False)],
)
def test_a_sweep_is_saturated_after_two_steps_that_bring_nothing(rates, expected):
    runs = [type("Run", (), {"output_tokens": r, "per_second": lambda _, c: c})() for r in rates]
    assert is_saturated(runs) is expected
