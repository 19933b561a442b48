"""Attention on the CPU at a small scale: what the page table costs beside contiguous memory.

All rows are timed by turns, over all cases, since a shared machine is slow for a second at a time.
"""

from functools import cache

import pytest

from pagedattn.benchmarking import CaseTiming, HostWork, StopRule
from pagedattn.benchmarking.attention_rows import AttentionCase
from pagedattn.workloads import CPU_DECODE, CPU_PREFILL, find_shape

RULE = StopRule(least=30, most=100, seconds=1.0)


@pytest.fixture(scope="module")
def case_of():
    """Function of a workload's name: its inputs, made once."""
    return cache(lambda name: AttentionCase.of(find_shape(name), "cpu"))


@pytest.fixture(scope="module")
def ready(case_of, slowed):
    """Function of a row's key: check the result; its error is kept in `errors`."""

    def make(key):
        name, implementation = key
        case = case_of(name)
        if reason := case.unsupported(implementation):
            pytest.skip(f"{implementation}: {reason}")
        (launch,) = case.launches(implementation)
        make.errors[key] = case.error(implementation, launch())
        (timed,) = slowed(f"{name}-{implementation}", [launch.run])
        return HostWork(timed)

    make.errors = {}
    return make


@pytest.fixture(scope="module")
def timing(request, ready):
    params = [item.callspec.params for item in request.session.items if item.path == request.path]
    return CaseTiming([(p["case"], p["implementation"]) for p in params], ready, RULE, turn=3)


@pytest.mark.implementations("torch", "reference", "sdpa_contiguous")
@pytest.mark.parametrize("case", [shape.name for shape in (*CPU_DECODE, *CPU_PREFILL)])
def bench_attention(benchmark, report_rounds, case_of, ready, timing, case, implementation):
    benchmark.group = case
    key = case, implementation
    if benchmark.disabled:
        benchmark(ready(key).replay)
        return
    median = report_rounds(timing.of(key))
    row = case_of(case).describe(implementation, ready.errors[key], median, None)
    benchmark.extra_info.update(row)
