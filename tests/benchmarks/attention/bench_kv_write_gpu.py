"""Writing a step's K and V into random slots on a GPU."""

import pytest
import torch

from pagedattn.attention import UnsupportedError, write_kv
from pagedattn.benchmarking import CaseTiming, LaunchGraph, StopRule, require_cold, rotation_size
from pagedattn.benchmarking.attention_rows import peak_memory
from pagedattn.kv_cache import KVCache
from pagedattn.peers import IndexPut

# all implementations are made ready in the first one's row; vLLM and what it imports warn of
# their own affairs
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 8, 128, 16
RULE = StopRule(least=10, most=60, seconds=0.2)


class Case:
    """Random K and V for random slots of one cache, `count` times."""

    def __init__(self, num_tokens):
        token_bytes = 2 * NUM_KV_HEADS * HEAD_SIZE * torch.bfloat16.itemsize
        self.num_tokens = num_tokens
        self.moved = num_tokens * (2 * token_bytes + 8)
        self.count = rotation_size(self.moved)
        require_cold(self.moved, self.count)
        self.cache = KVCache(
            num_layers=1,
            num_blocks=-(-self.count * num_tokens // BLOCK_SIZE),
            block_size=BLOCK_SIZE,
            num_kv_heads=NUM_KV_HEADS,
            head_size=HEAD_SIZE,
            dtype=torch.bfloat16,
            device="cuda",
        ).layer(0)
        self.new = torch.randn(
            (2, self.count, num_tokens, NUM_KV_HEADS, HEAD_SIZE),
            dtype=torch.bfloat16,
            device="cuda",
        )
        slots = torch.randperm(self.cache.num_slots, device="cuda")[: self.count * num_tokens]
        self.slots = slots.view(self.count, num_tokens)
        self.columns = {}

    def launch(self, name, number):
        key, value, slots = self.new[0, number], self.new[1, number], self.slots[number]
        if name == "index_put":
            return IndexPut().prepare(key, value, self.cache, slots)
        return lambda: write_kv(key, value, self.cache, slots, implementation=name)

    def ready(self, name):
        """Check that the first write puts each token in its slot and nothing elsewhere."""
        launches = [self.launch(name, number) for number in range(self.count)]
        self.cache.key.fill_(torch.nan)
        self.cache.value.fill_(torch.nan)
        try:
            peak_bytes = peak_memory(launches[0])
        except UnsupportedError as refusal:
            pytest.skip(f"{name}: {refusal}")
        blocks, offsets = self.slots[0] // BLOCK_SIZE, self.slots[0] % BLOCK_SIZE
        for part, new in ((self.cache.key, self.new[0, 0]), (self.cache.value, self.new[1, 0])):
            assert torch.equal(part[blocks, :, offsets], new)
            assert int(part.isnan().sum()) == part.numel() - new.numel()
        graph = LaunchGraph(launches)
        self.columns[name] = {
            "peak_memory_bytes": peak_bytes,
            "host_us": graph.host_seconds * 1e6,
            "launches_per_replay": graph.num_launches,
        }
        return graph


@pytest.fixture(scope="module")
def case(request):
    return Case(request.param)


@pytest.fixture(scope="module")
def timing(case, selected, clock_probe):
    return CaseTiming(selected("case", case.num_tokens), case.ready, RULE, clock_probe)


@pytest.mark.implementations("triton", "index_put", "vllm_cuda")
@pytest.mark.parametrize("case", [256, 8192], indirect=True)
def bench_kv_write(benchmark, report_rounds, case, timing, implementation, roofs):
    benchmark.group = f"kv-write-{case.num_tokens}"
    if benchmark.disabled:
        benchmark(case.ready(implementation).replay)
        return
    median = report_rounds(timing.of(implementation))
    rate = case.moved / median * 1e-9
    benchmark.extra_info.update(
        area="kv_write",
        implementation=implementation,
        workload=f"kv-write-{case.num_tokens}",
        device="cuda",
        num_tokens=case.num_tokens,
        num_kv_heads=NUM_KV_HEADS,
        head_size=HEAD_SIZE,
        block_size=BLOCK_SIZE,
        dtype="bfloat16",
        bytes=case.moved,
        limit_us=case.moved / roofs.copy_gb_per_s * 1e-3,
        error=0.0,
        error_budget=0.0,
        rotation=case.count,
        gb_per_s=rate,
        measured_read_gb_per_s=roofs.read_gb_per_s,
        share_of_bandwidth=rate / roofs.read_gb_per_s,
        **case.columns[implementation],
    )
