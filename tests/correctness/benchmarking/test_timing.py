"""The GPU's clock, rounds, roofs, and rows that are too good to be true."""

import dataclasses
import statistics
import time
from types import SimpleNamespace

import pytest
import torch

from pagedattn.attention import get_implementation
from pagedattn.benchmarking import DeviceClock, LaunchGraph, Roofs, rotation_size
from pagedattn.benchmarking import roofs as timed_roofs
from pagedattn.benchmarking.attention_rows import AttentionCase
from pagedattn.benchmarking.roofs import STRETCH_BYTES, ways_to_read
from pagedattn.testing import ErrorBudget
from pagedattn.workloads import AttentionShape

SHAPE = AttentionShape("tiny", (1, 1), (16, 32), 4, 2, 64, 16, "float32")
ROOFS = Roofs(read_gb_per_s=1000.0, copy_gb_per_s=900.0, matmul_tflop_per_s=100.0)


def test_the_device_clock_moves_only_when_it_is_told():
    clock = DeviceClock()
    begin = clock()
    time.sleep(0.01)
    assert clock() == begin
    clock.advance(2.5e-6)
    assert clock() - begin == 2.5e-6


def test_the_limit_is_the_slower_of_memory_and_arithmetic():
    assert ROOFS.limit_seconds(10**9, 0) == pytest.approx(1e-3)
    assert ROOFS.limit_seconds(0, 10**12) == pytest.approx(1e-2)
    assert ROOFS.limit_seconds(10**9, 10**12) == pytest.approx(1e-2)


def test_a_row_faster_than_its_limit_is_refused():
    case = AttentionCase.of(SHAPE, "cpu")
    case.roofs = ROOFS
    row = case.describe("torch", ErrorBudget(0.0, 0.0), 1e-3, None)
    moved = (16 + 32) * 2 * 2 * 64 * 4 + 2 * (2 * 4 * 64 * 4)
    assert row["bytes"] == moved
    assert row["limit_us"] == pytest.approx(moved / 1000e9 * 1e6)
    assert row["gb_per_s"] == pytest.approx(moved / 1e-3 * 1e-9)
    assert row["share_of_bandwidth"] == pytest.approx(row["gb_per_s"] / 1000)
    with pytest.raises(AssertionError, match="is less than the limit"):
        case.describe("torch", ErrorBudget(0.0, 0.0), 1e-9, None)


OPTIONS = {"window": 10, "soft_cap": 5.0, "alibi": True, "sinks": True}


def test_a_row_has_columns_of_the_options_that_its_layer_has():
    error = ErrorBudget(0.0, 0.0)
    plain = AttentionCase.of(SHAPE, "cpu").describe("torch", error, 1e-3, None)
    columns = {"window": 10, "soft_cap": 5.0, "alibi": 4, "sinks": 4}
    assert not plain.keys() & columns.keys()
    for option, value in OPTIONS.items():
        case = AttentionCase.of(dataclasses.replace(SHAPE, **{option: value}), "cpu")
        row = case.describe("torch", error, 1e-3, None)
        assert {name: row[name] for name in row.keys() - plain.keys()} == {option: columns[option]}


def test_the_limit_under_a_window_is_of_the_keys_that_are_seen():
    case = AttentionCase.of(dataclasses.replace(SHAPE, window=10), "cpu")
    case.roofs = ROOFS
    row = case.describe("torch", ErrorBudget(0.0, 0.0), 1e-3, None)
    assert row["bytes"] == (10 + 10) * 2 * 2 * 64 * 4 + 2 * (2 * 4 * 64 * 4)
    assert row["flops"] == 4 * 64 * 4 * (10 + 10)
    assert row["limit_us"] == pytest.approx(row["bytes"] / 1000e9 * 1e6)


def test_a_case_checks_each_option_and_a_control_says_which_it_lacks():
    lacks = {
        "window": "it does not do a sliding window",
        "soft_cap": "it does not do a soft cap",
        "alibi": "it does not do ALiBi slopes",
        "sinks": "it does not do attention sinks",
    }
    plain = dataclasses.replace(SHAPE, kv_lengths=(32, 32))
    without = AttentionCase.of(plain, "cpu").exact
    for option, value in OPTIONS.items():
        case = AttentionCase.of(dataclasses.replace(plain, **{option: value}), "cpu")
        assert case.unsupported("sdpa_contiguous") == lacks[option]
        (launch,) = case.launches("torch")
        case.error("torch", launch())
        with pytest.raises(AssertionError, match="above the budget"):
            case.error("torch", without.float())


def test_each_way_to_read_sees_the_first_and_the_last_element():
    pytest.importorskip("triton")
    source = torch.zeros(3 * STRETCH_BYTES // 4)
    for at in (0, STRETCH_BYTES // 4, -1):
        source[at] = 1.0
        assert all(way().max() == 1 for way in ways_to_read(source))
        source[at] = 0.0
    assert not any(way().any() for way in ways_to_read(source))


@pytest.mark.parametrize("of_ways", [(5.0, 3.0), (3.0, 5.0)], ids=str)
def test_the_read_bandwidth_is_that_of_the_faster_way(of_ways, monkeypatch):
    pytest.importorskip("triton")
    seconds = iter([9.0, *of_ways])
    monkeypatch.setattr(timed_roofs, "_median_seconds", lambda _: next(seconds))
    assert timed_roofs._read_and_copy_seconds(2 * STRETCH_BYTES, "cpu") == (3.0, 9.0)


def test_a_product_is_timed_after_rests(monkeypatch):
    events = []
    graph = SimpleNamespace(replay=lambda: events.append("replay") or 1.0)
    monkeypatch.setattr(timed_roofs, "LaunchGraph", lambda _: graph)
    monkeypatch.setattr(timed_roofs.time, "sleep", events.append)
    monkeypatch.setattr(timed_roofs, "MATRIX_SIZE", 2)
    assert timed_roofs._matmul_seconds("cpu") == 1.0
    assert events == [timed_roofs.REST, "replay"] * timed_roofs.REPLAYS


def test_without_triton_pytorch_s_sum_is_the_way_to_read(monkeypatch):
    monkeypatch.setattr(timed_roofs.importlib.util, "find_spec", lambda _: None)
    (way,) = ways_to_read(torch.ones(STRETCH_BYTES // 4))
    assert way() == STRETCH_BYTES // 4


def test_who_rounds_to_fp8_multiplies_at_twice_the_rate_and_moves_as_many_bytes():
    assert ROOFS.limit_seconds(0, 10**12, in_fp8=True) == pytest.approx(5e-3)
    assert ROOFS.limit_seconds(10**9, 0, in_fp8=True) == pytest.approx(1e-3)


def test_a_rows_limit_is_of_the_products_that_the_implementation_says_it_does(monkeypatch):
    narrow = dataclasses.replace(SHAPE, dtype="float16", kv_dtype="float8_e4m3")
    case = AttentionCase.of(narrow, "cpu")
    case.roofs = dataclasses.replace(ROOFS, matmul_tflop_per_s=1e-3)  # arithmetic is the limit
    error = ErrorBudget(0.0, 0.0)
    widened = case.describe("torch", error, 1.0, None)["limit_us"]
    assert widened == pytest.approx(narrow.flops / 1e9 * 1e6)
    torch_implementation = type(get_implementation("torch"))
    rounds_to = staticmethod(lambda _: torch.float8_e4m3fn)
    monkeypatch.setattr(torch_implementation, "rounds_to", rounds_to, raising=False)
    assert case.describe("torch", error, 1.0, None)["limit_us"] == pytest.approx(widened / 2)


@pytest.mark.parametrize("name", ["torch", "reference", "sdpa_contiguous"])
def test_a_case_runs_and_checks_each_implementation(name):
    lengths = (32, 32) if name == "sdpa_contiguous" else (16, 32)
    case = AttentionCase.of(AttentionShape("tiny", (1, 1), lengths, 4, 2, 64, 16, "float32"), "cpu")
    assert case.unsupported(name) is None
    (launch,) = case.launches(name)
    result = launch()
    assert case.budget(name).covers(case.error(name, result))
    with pytest.raises(AssertionError, match="above the budget"):
        case.error(name, result + 0.01)


@pytest.mark.parametrize(
    ("query_lengths", "kv_lengths"), [((20, 20), (20, 20)), ((4, 4), (30, 30)), ((1,), (1,))]
)
def test_the_contiguous_control_is_causal_as_the_paged_ones(query_lengths, kv_lengths):
    shape = AttentionShape("dense", query_lengths, kv_lengths, 4, 2, 64, 16, "float32")
    case = AttentionCase.of(shape, "cpu")
    (launch,) = case.launches("sdpa_contiguous")
    case.error("sdpa_contiguous", launch())


def test_a_dense_control_refuses_ragged_lengths():
    case = AttentionCase.of(SHAPE, "cpu")
    assert "differ in length" in case.unsupported("sdpa_contiguous")


@pytest.mark.gpu
@pytest.mark.undisturbed
def test_a_copy_of_known_bytes_takes_the_time_that_its_bandwidth_says(roofs):
    torch.cuda.empty_cache()  # memory of its own, not what earlier tests left in pieces
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    graph = LaunchGraph([lambda: torch.abs(source, out=target)])
    seconds = statistics.median(graph.replay() for _ in range(20))
    assert 2 * source.nbytes / seconds * 1e-9 == pytest.approx(roofs.copy_gb_per_s, rel=0.05)


@pytest.mark.gpu
def test_a_rotation_is_larger_than_twice_the_l2():
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    for bytes_each in (1, 4 << 20, l2_bytes, 1 << 40):
        assert rotation_size(bytes_each) * bytes_each > 2 * l2_bytes
    assert rotation_size(1 << 40) == 1


@pytest.mark.gpu
def test_a_long_launch_is_rotated_only_to_be_cold():
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    assert rotation_size(l2_bytes, least_seconds=9e-5) == 16
    assert rotation_size(l2_bytes, least_seconds=1e-4) == 3


@pytest.mark.gpu
def test_a_graph_keeps_the_memory_that_it_writes():
    def make():
        out = torch.zeros(1 << 20, device="cuda")
        return LaunchGraph([lambda: out.add_(1)]), out.data_ptr()

    graph, address = make()
    torch.cuda.empty_cache()
    others = [torch.zeros(1 << 20, device="cuda") for _ in range(50)]
    assert address not in [other.data_ptr() for other in others]
    graph.replay()
    assert not any(other.any() for other in others)


def launches_of(cycles, host_seconds, calls):
    def launch(number):
        calls.append(number)
        time.sleep(host_seconds)
        torch.cuda._sleep(cycles)

    return [lambda number=number: launch(number) for number in range(4)]


@pytest.mark.gpu
def test_of_launches_that_an_l2_is_nothing_to_one_is_captured():
    calls = []
    graph = LaunchGraph(launches_of(40_000_000, 0.0, calls))  # 20 ms at 2 GHz
    assert (graph.num_inputs, graph.num_launches) == (1, 1)
    assert len(calls) < 15  # each once, the host's, the captured one
    assert calls[-1] == 0


@pytest.mark.gpu
def test_launches_that_take_the_host_long_and_the_gpu_little_are_rotated():
    graph = LaunchGraph(launches_of(1_000_000, 6e-3, []))
    assert (graph.num_inputs, graph.num_launches % 4) == (4, 0)
    assert graph.host_seconds == pytest.approx(6e-3, rel=0.2)


@pytest.mark.gpu
def test_all_inputs_of_a_rotation_are_launched_equally_often():
    counts = torch.zeros(3, device="cuda")
    graph = LaunchGraph([lambda i=i: counts[i].add_(1) for i in range(3)])
    counts.zero_()
    graph.replay()
    replays = counts[0].item() * 3 / graph.num_launches
    assert counts.tolist() == [counts[0].item()] * 3
    assert replays == int(replays) > 0  # one that the host was late for is done again
