"""Attention on a GPU: the time of one launch, with cold K and V, beside other kernels."""

import pytest
import torch

from pagedattn.attention import UnsupportedError
from pagedattn.benchmarking import CaseTiming, LaunchGraph, StopRule, require_cold
from pagedattn.benchmarking.attention_rows import AttentionCase, peak_memory
from pagedattn.peers import PEERS
from pagedattn.workloads import GPU_SHAPES, find_shape

# all implementations are made ready in the first one's row; peers and what they import warn of
# their own affairs
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("flashinfer_modules"),  # compilers would disturb what is timed
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.implementations("cuda", "cuda_fp8", "triton", "torch", *PEERS),
]

RULE = StopRule(least=10, most=40, seconds=0.1)


@pytest.fixture(scope="module")
def case(request, roofs, give_back):
    made = AttentionCase.of(find_shape(request.param), "cuda", roofs)
    require_cold(made.shape.kv_bytes, len(made.rotation))
    yield made
    del made
    give_back()


@pytest.fixture(scope="module")
def ready(case, slowed):
    """Function of a name: check the result and make the graph; its columns are kept in `rows`."""

    def make(name):
        if reason := case.unsupported(name):
            pytest.skip(f"{name}: {reason}")
        try:
            launches = case.launches(name)
            peak_bytes = peak_memory(launches[0])
            error = case.error(name, launches[0]())
            runs = slowed(f"{case.shape.name}-{name}", [launch.run for launch in launches])
            graph = LaunchGraph(runs)
        except torch.OutOfMemoryError:
            pytest.skip(f"{name} needs more memory than this GPU has free")
        except UnsupportedError as refusal:
            pytest.skip(f"{name}: {refusal}")
        columns = {
            "host_us": graph.host_seconds * 1e6,
            "rotation": graph.num_inputs,
            "launches_per_replay": graph.num_launches,
            **case.planning_columns(name, launches[0]),
        }
        make.rows[name] = error, peak_bytes, columns
        return graph

    make.rows = {}
    return make


@pytest.fixture(scope="module")
def timing(case, ready, selected, clock_probe):
    return CaseTiming(selected("case", case.shape.name), ready, RULE, clock_probe)


def pytest_generate_tests(metafunc):
    """Make the rows of all shapes, or of those that --shape names."""
    names = metafunc.config.option.shape or [shape.name for shape in GPU_SHAPES]
    metafunc.parametrize("case", names, indirect=True)


def bench_attention(benchmark, report_rounds, case, ready, timing, implementation):
    benchmark.group = case.shape.name
    if benchmark.disabled:
        benchmark(ready(implementation).replay)
        return
    median = report_rounds(timing.of(implementation))
    error, peak_bytes, columns = ready.rows[implementation]
    benchmark.extra_info.update(case.describe(implementation, error, median, peak_bytes))
    benchmark.extra_info.update(columns)
