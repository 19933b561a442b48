"""The tests of an engine, on one whose behaviour is known, and what the report makes of them."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from pagedattn.config import ModelConfig
from pagedattn.report.results import load_run
from pagedattn.report.serving import engines as report_engines
from pagedattn.report.serving import serving_tables
from pagedattn.report.summary import summarise
from pagedattn.serving.benchmark import measure, predict
from pagedattn.serving.memory import EngineMemory
from pagedattn.serving.results import as_results
from pagedattn.serving.settings import (
    ON_A_CPU,
    POLICIES,
    TESTS,
    EngineSettings,
    LoadSettings,
    policies,
)

spec = importlib.util.spec_from_file_location("engines", Path(__file__).parent / "engines.py")
engines = importlib.util.module_from_spec(spec)
spec.loader.exec_module(engines)

SCALE = replace(
    ON_A_CPU, requests=10, prompt_tokens=(3, 12), output_tokens=(2, 9), users=(1, 2, 4, 8, 16)
)


def measured(tests=TESTS, scale=SCALE, **options):
    clock = engines.Clock()
    engine = engines.SteppedEngine(clock, **options)
    said = []
    result = measure(
        engine, "", tests, LoadSettings(), scale, 0, lambda *words: said.append(words), clock
    )
    return result, engine, said


def summary_of(result, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(as_results([result], "model", "cpu"), allow_nan=False))
    return summarise(load_run([path]).rows)


def test_only_what_was_asked_for_is_measured():
    result, _, _ = measured(("throughput",))
    assert result.throughput.completed == 10
    assert (result.sweep, result.memory) == ([], None)
    result, _, _ = measured(("memory",))
    assert result.throughput is None
    assert result.memory.run.completed == 10


@pytest.mark.parametrize("tokens_ahead", [0, 1])
@pytest.mark.parametrize("tokens_a_step", [1, 3])
def test_the_block_manager_holds_the_engines_blocks_at_every_step(tokens_ahead, tokens_a_step):
    said = EngineMemory(None, None, None, None, None, 101, 4, tokens_ahead)
    result, _, _ = measured(("memory",), memory=said, tokens_a_step=tokens_a_step)
    memory = result.memory
    assert len(memory.compared) == len(memory.samples)  # all prompts are computed in one step
    assert [s.blocks for s in memory.samples] == [s.mirrored for s in memory.samples]
    assert memory.largest_difference == 0
    assert memory.peak.blocks > 10


def test_samples_are_not_compared_while_requests_wait():
    result, _, _ = measured(("memory",), most=3)
    memory = result.memory
    assert 0 < len(memory.compared) < len(memory.samples)
    assert memory.largest_difference == 0


def test_an_engine_that_counts_otherwise_is_noticed():
    class Wasteful(engines.SteppedEngine):
        def usage(self):
            share, running, waiting = super().usage()
            return share + running / (self.memory.num_blocks - 1), running, waiting

    engine = Wasteful(engines.Clock())
    result = measure(engine, "", ("memory",), LoadSettings(), SCALE, 0, lambda *_: None)
    assert result.memory.largest_difference >= 1


def test_every_run_begins_with_an_empty_prefix_cache():
    result, engine, _ = measured()
    assert engine.num_resets == 1 + 1 + 1 + len(result.sweep)  # the first is the warm-up


def test_a_sweep_ends_when_more_users_bring_nothing():
    result, _, _ = measured(("scaling",), most=2)
    assert [run.users for run in result.sweep] == [1, 2, 4, 8]


def test_an_interrupt_keeps_what_was_measured():
    result, _, _ = measured(interrupt_at=40)
    assert result.interrupted
    assert result.throughput.completed == 10
    assert len(result.sweep) < 5


def test_progress_ends_with_all_requests_done():
    _, _, said = measured(("throughput",))
    assert said[-1] == ("throughput", 10, 10)


def test_weights_and_pool_are_calculated_from_the_device():
    model = ModelConfig.preset("smollm2-135m")
    said = EngineMemory(8 << 30, None, 1 << 30, None, None, 2912, 16)
    settings = EngineSettings("x", gpu_memory_utilization=0.5)
    engine = engines.SteppedEngine(engines.Clock(), settings=settings, model=model, memory=said)
    found = predict(engine)
    assert found.weights == model.weight_bytes
    assert found.kv_pool == (4 << 30) - model.weight_bytes
    assert found.blocks == found.kv_pool // (16 * 23040)
    assert found.blocks_of_pool == (1 << 30) // (16 * 23040)


def test_the_report_reads_what_was_measured(tmp_path):
    result, _, _ = measured()
    summary = summary_of(result, tmp_path)
    (engine,) = report_engines(summary)
    assert engine.throughput.output_tokens_per_s == pytest.approx(
        result.throughput.output_tokens / result.throughput.seconds
    )
    assert [row.num_users for row in engine.sweep] == [run.users for run in result.sweep]
    assert engine.memory.equal_steps == engine.memory.compared_steps > 0
    assert engine.memory.pool_over_time[-1].blocks == 0
    titles = [table.title for table in serving_tables(summary)]
    assert len(titles) == 3
    assert not summary.data
    assert not summary.bookkeeping


def test_the_knee_has_ninety_percent_of_the_most_tokens(tmp_path):
    result, _, _ = measured(("scaling",), most=4)
    (engine,) = report_engines(summary_of(result, tmp_path))
    rates = {row.num_users: row.output_tokens_per_s for row in engine.sweep}
    best = max(rates.values())
    assert rates[engine.knee.num_users] >= 0.9 * best
    assert all(rate < 0.9 * best for users, rate in rates.items() if users < engine.knee.num_users)


def test_a_sweep_that_ends_while_rates_rise_has_no_knee(tmp_path):
    result, _, _ = measured(("scaling",), replace(SCALE, users=(1, 2, 4)))
    rates = [run.per_second(run.output_tokens) for run in result.sweep]
    assert rates[-2] < 0.9 * rates[-1]
    summary = summary_of(result, tmp_path)
    (engine,) = report_engines(summary)
    assert engine.knee is None
    assert "ends before the knee" in serving_tables(summary)[0].title


def test_nothing_measured_gives_no_rows():
    result, _, _ = measured(interrupt_at=1)
    assert result.interrupted
    assert as_results([result], "model", "cpu")["benchmarks"] == []


def test_each_policy_changes_one_thing():
    base = EngineSettings("m", block_size=16)
    chosen = policies(base, POLICIES, block_sizes=(16, 32), gpu=True)
    assert [policy.name for policy in chosen] == [
        "prefix caching off",
        "prefix caching on",
        "blocks of 32",
        "eager",
    ]
    for policy in chosen:
        differing = [
            name
            for name in ("prefix_caching", "block_size", "enforce_eager", "model", "seed")
            if getattr(policy.settings, name) != getattr(base, name)
        ]
        assert len(differing) <= 1
    assert policies(base, (), block_sizes=(16,), gpu=True)[0].settings == base
    on_cpu = policies(base, ("cuda-graphs", "block-size"), block_sizes=(16, 32), gpu=False)
    assert [policy.name for policy in on_cpu] == ["blocks of 16", "blocks of 32"]
