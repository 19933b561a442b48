"""Attention on a GPU: the time of one launch, with cold K and V, beside contiguous SDPA."""

import gc

import pytest
import torch

from pagedattn.benchmarking import DEVICE_CLOCK, LaunchGraph
from pagedattn.benchmarking.attention_rows import AttentionCase, peak_memory
from pagedattn.benchmarking.rounds import rounds_within
from pagedattn.peers import VLLM_KERNELS, register_kernels
from pagedattn.workloads import DECODE, MIXED, PREFILL, find_shape

pytestmark = [pytest.mark.gpu, pytest.mark.benchmark(timer=DEVICE_CLOCK)]

register_kernels()

# vLLM and what it imports warn of their own affairs
VLLM = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
IMPLEMENTATIONS = [
    *("triton", "torch", "sdpa_contiguous"),
    *(pytest.param(name, marks=VLLM) for name in VLLM_KERNELS),
]


@pytest.fixture(scope="module")
def case(request, roofs):
    # one after the other, the implementations share inputs, exact result and state of the GPU
    made = AttentionCase.of(find_shape(request.param), "cuda", roofs)
    yield made
    del made
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "case", [shape.name for shape in (*DECODE, *PREFILL, *MIXED)], indirect=True
)
def bench_attention(benchmark, case, implementation):
    reason = case.unsupported(implementation)
    if reason:
        pytest.skip(f"{implementation}: {reason}")
    benchmark.group = case.shape.name
    try:
        launches = case.launches(implementation)
        peak_bytes = peak_memory(launches[0])
        error = case.error(launches[0]())
        graph = LaunchGraph(launches)
    except torch.OutOfMemoryError:
        pytest.skip(f"{implementation} needs more memory than this GPU has free")
    rounds = rounds_within(graph.replay, seconds=0.2, least=10, most=30)
    benchmark.pedantic(lambda: DEVICE_CLOCK.advance(graph.replay()), rounds=rounds, warmup_rounds=3)
    seconds = benchmark.stats.stats.median if benchmark.enabled else None
    benchmark.extra_info.update(case.describe(implementation, error, seconds, peak_bytes))
    benchmark.extra_info["host_us"] = graph.host_seconds * 1e6
    benchmark.extra_info["rotation"] = len(launches)
    benchmark.extra_info["launches_per_replay"] = graph.num_launches
