"""Attention on the CPU at a small scale: what the page table costs beside contiguous memory."""

import pytest

from pagedattn.benchmarking.attention_rows import AttentionCase
from pagedattn.benchmarking.rounds import rounds_within
from pagedattn.workloads import CPU_DECODE, CPU_PREFILL, find_shape

IMPLEMENTATIONS = ["torch", "reference", "sdpa_contiguous"]


@pytest.fixture(scope="module")
def case(request):
    return AttentionCase.of(find_shape(request.param), "cpu")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "case", [shape.name for shape in (*CPU_DECODE, *CPU_PREFILL)], indirect=True
)
def bench_attention(benchmark, case, implementation):
    reason = case.unsupported(implementation)
    if reason:
        pytest.skip(f"{implementation}: {reason}")
    benchmark.group = case.shape.name
    (launch,) = case.launches(implementation)
    error = case.error(launch())
    rounds = rounds_within(launch) if benchmark.enabled else 1
    benchmark.pedantic(launch, rounds=rounds, warmup_rounds=3)
    seconds = benchmark.stats.stats.median if benchmark.enabled else None
    benchmark.extra_info.update(case.describe(implementation, error, seconds, None))
