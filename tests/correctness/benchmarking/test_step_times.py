"""Steps that are timed before their launches are steps of decode in which all sequences grow."""

import dataclasses
import itertools

import numpy as np
import pytest

from pagedattn.attention import AttentionBatch, get_implementation
from pagedattn.attention.cascade import plan_of
from pagedattn.benchmarking import step_times
from pagedattn.benchmarking.attention_rows import AttentionCase
from pagedattn.benchmarking.step_times import growing_tables, time_steps
from pagedattn.shared_prefix import find_shared_blocks
from pagedattn.testing import make_inputs
from pagedattn.workloads import AttentionShape


def shape_of(lengths=(100,) * 40, prefix=0):
    queries = (1,) * len(lengths)
    return AttentionShape("steps", queries, lengths, 4, 2, 64, 16, "float32", shared_prefix=prefix)


@pytest.mark.parametrize(
    ("lengths", "prefix"), [((100,) * 40, 64), ((7, 90, 16, 33), 0), ((65, 80), 64)], ids=str
)
def test_the_tables_grow_by_a_token_and_share_what_the_shape_says(lengths, prefix):
    tables = list(growing_tables(shape_of(lengths, prefix), 20))
    for before, after in itertools.pairwise(tables):
        assert (after.num_tokens == before.num_tokens + 1).all()
        assert before.lineage.goes_on_in(after.lineage)
    first, last = tables[0].num_tokens, tables[-1].num_tokens
    assert (first <= lengths).all()
    assert (first > np.array(lengths) - 16).all()
    assert (last >= lengths).all()
    nodes = [(node.begin, node.end, node.members.size) for node in find_shared_blocks(tables[-1])]
    assert nodes == ([(0, prefix // 16, len(lengths))] if prefix else [])


def test_in_each_step_as_large_a_part_of_the_sequences_gets_a_block():
    tables = list(growing_tables(shape_of((100,) * 32, 64), 33))
    for before, after in itertools.pairwise(tables):
        assert (after.num_blocks() - before.num_blocks()).sum() == 2


@pytest.mark.parametrize("shares", [True, False])
def test_a_plan_is_timed_where_there_is_one(shares):
    shape, torch_impl = shape_of(prefix=64), get_implementation("torch")
    call = make_inputs(shape).call()
    if shares:
        table = next(growing_tables(shape, 1))
        call = dataclasses.replace(call, batch=AttentionBatch.of(table, share=True))
    assert (plan_of(torch_impl, call) is not None) == shares
    times = time_steps(shape, call, torch_impl)
    assert 0 < times.batch < 0.1
    assert (times.plan is not None) == shares


def test_what_a_plan_adds_is_the_median_difference_of_the_faster_half_of_the_steps(monkeypatch):
    shape, torch_impl = shape_of(prefix=64), get_implementation("torch")
    table = next(growing_tables(shape, 1))
    call = dataclasses.replace(
        make_inputs(shape).call(), batch=AttentionBatch.of(table, share=True)
    )
    rng, clock, costs = np.random.default_rng(0), [0.0], {False: [], True: []}

    def advance(batch, _):
        shares = batch.sharing is not None
        costs[shares].append(rng.integers(1, 1_000_000))
        clock[0] += float(costs[shares][-1])

    monkeypatch.setattr(AttentionBatch, "advance", advance)
    monkeypatch.setattr(step_times.time, "perf_counter", lambda: clock[0])
    times = time_steps(shape, call, torch_impl)
    steps = np.array([costs[shares][step_times.WARM_UP :] for shares in (False, True)])
    assert steps.shape == (2, step_times.STEPS)
    faster = np.argsort(steps.sum(0), kind="stable")[: step_times.STEPS // 2]
    plain, sharing = steps[:, faster]
    assert times.batch == np.median(plain)
    assert times.plan == np.median(sharing - plain)
    assert times.plan != np.median(sharing) - np.median(plain)


def test_steps_of_a_layer_with_a_window_are_timed_without_a_plan():
    case = AttentionCase.of(dataclasses.replace(shape_of((100, 100)), window=20), "cpu")
    (launch,) = case.launches("torch")
    columns = case.planning_columns("torch", launch)
    assert columns.keys() == {"batch_us"}
    assert columns["batch_us"] > 0


def test_columns_are_those_of_decode_and_of_launches_with_a_plan():
    case = AttentionCase.of(shape_of((32, 32)), "cpu")
    (launch,) = case.launches("torch")
    assert case.planning_columns("torch", launch).keys() == {"batch_us"}
    (launch,) = case.launches("sdpa_contiguous")
    assert case.planning_columns("sdpa_contiguous", launch) == {}
    prefill = AttentionShape("prefill", (32, 32), (32, 32), 4, 2, 64, 16, "float32")
    case = AttentionCase.of(prefill, "cpu")
    (launch,) = case.launches("torch")
    assert case.planning_columns("torch", launch) == {}
