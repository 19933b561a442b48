"""The harness against GPU work whose time is known: a copy of known bytes, known cycles."""

import statistics
import time

import pytest
import torch

from pagedattn.benchmarking import LaunchGraph, StopRule, require_cold, time_interleaved

pytestmark = [pytest.mark.gpu, pytest.mark.undisturbed]

RULE = StopRule(least=20, most=60, seconds=1.0)


def spinning(cycles):
    return LaunchGraph([lambda: torch.cuda._sleep(cycles)])


def median(rounds):
    return statistics.median(rounds.seconds)


def test_a_copy_of_known_bytes_runs_at_the_measured_bandwidth(roofs, clock_probe):
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copy = LaunchGraph([lambda: torch.neg(source, out=target)])
    rounds = time_interleaved({"copy": copy}, RULE, clock_probe)["copy"]
    rate = 2 * source.nbytes / median(rounds) * 1e-9
    assert rate == pytest.approx(roofs.copy_gb_per_s, rel=0.03)


def test_cycles_more_take_the_time_that_the_clock_says(clock_probe):
    cycles = 100_000
    works = {"once": spinning(cycles), "twice": spinning(2 * cycles)}
    found = time_interleaved(works, RULE, clock_probe)
    clock = found["once"].clock_hz
    assert median(found["twice"]) - median(found["once"]) == pytest.approx(cycles / clock, rel=0.02)
    # what a launch costs besides: between two nodes of a graph
    assert 0 <= median(found["once"]) - cycles / clock < 5e-6


def test_a_kernel_that_takes_five_percent_longer_is_seen_as_that(clock_probe):
    works = {"usual": spinning(100_000), "slower": spinning(105_000)}
    found = time_interleaved(works, RULE, clock_probe)
    assert median(found["slower"]) / median(found["usual"]) == pytest.approx(1.05, abs=0.005)


def test_the_probe_tells_a_clock_that_the_gpu_can_have(clock_probe):
    clocks = [clock_probe() for _ in range(20)]
    assert statistics.median(clocks) == pytest.approx(1.5e9, rel=0.5)
    middle = sorted(clocks)[5:15]
    assert middle[-1] / middle[0] < 1.05


def test_a_round_costs_little_besides_what_it_measures(clock_probe):
    graph, rounds = spinning(20_000), StopRule(least=50, most=50)

    def unmeasured():
        begin = time.perf_counter()
        timed = time_interleaved({"it": graph}, rounds, clock_probe)["it"]
        whole = time.perf_counter() - begin
        return whole - sum(timed.seconds) * graph.num_launches * 53 / 50

    # the probe's 0.2 ms, as much to cover the host, events; the host may be interrupted meanwhile
    assert min(unmeasured() for _ in range(3)) < 53 * 0.8e-3


def replay_after(seconds, monkeypatch):
    replay = torch.cuda.CUDAGraph.replay

    def late(graph):
        time.sleep(seconds)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", late)


def test_what_the_host_needs_to_enqueue_a_graph_is_not_counted(monkeypatch):
    graph = spinning(20_000)
    usual = statistics.median(graph.replay() for _ in range(20))
    replay_after(1e-3, monkeypatch)
    assert statistics.median(graph.replay() for _ in range(20)) == pytest.approx(usual, rel=0.01)


def test_a_host_that_never_enqueues_in_time_is_an_error(monkeypatch):
    graph = spinning(20_000)
    replay_after(0.1, monkeypatch)
    with pytest.raises(RuntimeError, match="too slow or too busy"):
        graph.replay()


def test_inputs_that_the_l2_would_keep_are_refused():
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    with pytest.raises(ValueError, match="would not be cold"):
        require_cold(l2_bytes, 2)
    require_cold(l2_bytes + 1, 2)
