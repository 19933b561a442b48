"""Decode with a shared prefix on a GPU: read once, and for each sequence; which one is chosen.

Prefix by batch, 256 tokens of each sequence's own. A row fails if the way that is chosen where
nothing is asked for loses to the other one.
"""

import dataclasses
import statistics

import numpy as np
import pytest

from pagedattn.attention import AttentionBatch, get_implementation
from pagedattn.attention.api import choose_implementation
from pagedattn.attention.cascade import plan_of
from pagedattn.benchmarking import CaseTiming, LaunchGraph, StopRule, require_cold
from pagedattn.benchmarking.attention_rows import AttentionCase, peak_memory
from pagedattn.testing import check_attention, last_queries, page_table_of
from pagedattn.workloads import AttentionShape

pytestmark = pytest.mark.gpu

OWN = 256
PREFIXES = (512, 1024, 2048, 4096, 16384)
BATCHES = (8, 32, 128, 256)
WAYS = ("each_sequence", "read_once")
RULE = StopRule(least=10, most=20, seconds=0.05)
MOST_LOST = 0.03
MOST_MISSED = 0.15  # of the time; to share less than would pay is the careful side
CHECKED = 8  # sequences that are compared with float64


def shape_of(prefix, batch):
    return AttentionShape(
        f"shared-{prefix}-B{batch}", (1,) * batch, (prefix + OWN,) * batch, shared_prefix=prefix
    )


CASES = {shape.name: shape for shape in (shape_of(p, b) for p in PREFIXES for b in BATCHES)}


class Case:
    """A prefix and a batch, both ways."""

    def __init__(self, shape, roofs):
        self.case = case = AttentionCase.of(shape, "cuda", roofs)
        require_cold(shape.kv_bytes, len(case.rotation))
        first = case.rotation[0]
        self.implementation = choose_implementation(None, first.cache).name
        self.shares = plan_of(get_implementation(self.implementation), first.call()) is not None
        some = np.unique(np.linspace(0, shape.num_sequences - 1, CHECKED).astype(int))
        self.checked, self.some = last_queries(first, some, 1)
        self.columns = {}

    def ready(self, way):
        """Check the result and make the graph."""
        rotation = [dataclasses.replace(x, batch=_batch(x, way)) for x in self.case.rotation]
        case = dataclasses.replace(self.case, rotation=rotation)
        launches = case.launches(self.implementation)
        plan = plan_of(get_implementation(self.implementation), rotation[0].call())
        assert (plan is not None) == (way == "read_once")
        out = launches[0]()
        error, budget = check_attention(out[self.some], self.checked)
        self.case.budgets[None, False] = budget
        peak_bytes = peak_memory(launches[0])
        graph = LaunchGraph([launch.run for launch in launches])
        more = {
            "host_us": graph.host_seconds * 1e6,
            "rotation": graph.num_inputs,
            "launches_per_replay": graph.num_launches,
            **case.planning_columns(self.implementation, launches[0]),
        }
        self.columns[way] = error, peak_bytes, more
        return graph

    def describe(self, way, median):
        error, peak_bytes, more = self.columns[way]
        row = self.case.describe(self.implementation, error, median, peak_bytes)
        names = {"area": "shared_prefix", "implementation": way}
        return row | names | more | {"shares_automatically": self.shares}

    def check_choice(self, medians):
        """Fail if the way that is chosen takes longer than the other one."""
        chosen, other = medians[WAYS[self.shares]], medians[WAYS[not self.shares]]
        most = MOST_LOST if self.shares else MOST_MISSED
        assert chosen <= (1 + most) * other, (
            f"{WAYS[self.shares]} is chosen and takes {chosen * 1e6:.1f} µs, "
            f"the other way {other * 1e6:.1f} µs"
        )


def _batch(inputs, way):
    if way == "each_sequence":
        return inputs.batch.without_sharing()
    table = page_table_of(inputs.batch, inputs.cache.block_size)
    return AttentionBatch.of(table, device="cuda", share=True)


@pytest.fixture(scope="module")
def case(request, roofs, give_back):
    made = Case(CASES[request.param], roofs)
    yield made
    del made
    give_back()


@pytest.fixture(scope="module")
def timing(case, selected, clock_probe):
    return CaseTiming(selected("case", case.case.shape.name), case.ready, RULE, clock_probe)


@pytest.mark.parametrize("implementation", WAYS)
@pytest.mark.parametrize("case", CASES, indirect=True)
def bench_shared_prefix(benchmark, report_rounds, case, selected, timing, implementation):
    benchmark.group = case.case.shape.name
    if benchmark.disabled:
        benchmark(case.ready(implementation).replay)
        return
    median = report_rounds(timing.of(implementation))
    benchmark.extra_info.update(case.describe(implementation, median))
    if implementation == WAYS[-1] and set(selected("case", case.case.shape.name)) == set(WAYS):
        case.check_choice({way: statistics.median(timing.of(way).seconds) for way in WAYS})
