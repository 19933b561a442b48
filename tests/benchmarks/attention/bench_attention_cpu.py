"""Attention on the CPU at a small scale: what the page table costs beside contiguous memory."""

import pytest

from pagedattn.benchmarking import CaseTiming, HostWork, StopRule
from pagedattn.benchmarking.attention_rows import AttentionCase
from pagedattn.workloads import CPU_DECODE, CPU_PREFILL, find_shape

IMPLEMENTATIONS = ["torch", "reference", "sdpa_contiguous"]
RULE = StopRule(least=20, most=200, seconds=0.5)


@pytest.fixture(scope="module")
def case(request):
    return AttentionCase.of(find_shape(request.param), "cpu")


@pytest.fixture(scope="module")
def ready(case):
    """Function of a name: check the result; its error is kept in `errors`."""

    def make(name):
        if reason := case.unsupported(name):
            pytest.skip(f"{name}: {reason}")
        (launch,) = case.launches(name)
        make.errors[name] = case.error(launch())
        return HostWork(launch)

    make.errors = {}
    return make


@pytest.fixture(scope="module")
def timing(case, ready, selected):
    return CaseTiming(selected("case", case.shape.name), ready, RULE)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "case", [shape.name for shape in (*CPU_DECODE, *CPU_PREFILL)], indirect=True
)
def bench_attention(benchmark, report_rounds, case, ready, timing, implementation):
    benchmark.group = case.shape.name
    if benchmark.disabled:
        benchmark(ready(implementation).replay)
        return
    median = report_rounds(timing.of(implementation))
    error = ready.errors[implementation]
    benchmark.extra_info.update(case.describe(implementation, error, median, None))
