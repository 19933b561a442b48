"""Writing a step's K and V into random slots on a GPU: as they are, quantised, and turned before.

A workload is `kv-write-TOKENS`, `kv-write-fp8-TOKENS` into a cache of fp8, `kv-write-rotary-TOKENS`
with the rotary embedding of 32 heads of Q and 8 of K (in place for Q), or both. What does not turn
and write in one launch does it in two or more.
"""

import functools
import importlib
import importlib.util

import pytest
import torch

from pagedattn.attention import (
    Rotary,
    UnsupportedError,
    get_implementation,
    rotary_write_kv,
    rotate,
    write_kv,
)
from pagedattn.benchmarking import CaseTiming, LaunchGraph, StopRule, require_cold, rotation_size
from pagedattn.benchmarking.attention_rows import peak_memory
from pagedattn.kv_cache import FP8, KVCache
from pagedattn.peers import IndexPut

# all implementations are made ready in the first one's row; vLLM and what it imports warn of
# their own affairs
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

NUM_QUERY_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 32, 8, 128, 16
NUM_POSITIONS = 8192
RULE = StopRule(least=10, most=60, seconds=0.2)
WORKLOADS = [
    f"kv-write-{kind}{num_tokens}"
    for kind in ("", "fp8-", "rotary-", "rotary-fp8-")
    for num_tokens in (256, 8192)
]
PLAIN = ("triton", "index_put", "vllm_cuda")
FP8_WRITE = ("triton", "vllm_cuda")
TURNED = ("triton", "pytorch_and_triton", "vllm_cuda", "flashinfer")
TURNED_FP8 = ("triton", "pytorch_and_triton", "vllm_cuda")


def rows(named):
    for workload in WORKLOADS:
        fp8, turned = "fp8" in workload, "rotary" in workload
        usual = (TURNED_FP8 if fp8 else TURNED) if turned else (FP8_WRITE if fp8 else PLAIN)
        for name in dict.fromkeys([*named, *usual]):
            marks = [pytest.mark.vllm] if name == "vllm_cuda" else []
            yield pytest.param(workload, name, marks=marks, id=f"{workload}-{name}")


def pytest_generate_tests(metafunc):
    """Rows of each workload on those that --impl names, and on the usual ones."""
    named = metafunc.config.option.impl or ()
    metafunc.parametrize(("case", "implementation"), list(rows(named)), indirect=["case"])


class Case:
    """Random Q, K and V for random slots of one cache, `count` times."""

    def __init__(self, workload):
        self.workload, self.num_tokens = workload, int(workload.rpartition("-")[2])
        self.fp8, self.turned = "fp8" in workload, "rotary" in workload
        dtype = FP8 if self.fp8 else torch.bfloat16
        elements = NUM_KV_HEADS * HEAD_SIZE
        token_bytes = 2 * elements * (torch.bfloat16.itemsize + dtype.itemsize) + 8
        if self.turned:
            token_bytes += 2 * NUM_QUERY_HEADS * HEAD_SIZE * torch.bfloat16.itemsize
            token_bytes += HEAD_SIZE * torch.float32.itemsize + 8
        self.moved = self.num_tokens * token_bytes
        self.count = rotation_size(self.moved)
        require_cold(self.moved, self.count)
        self.cache = KVCache(
            num_layers=1,
            num_blocks=-(-self.count * self.num_tokens // BLOCK_SIZE),
            block_size=BLOCK_SIZE,
            num_kv_heads=NUM_KV_HEADS,
            head_size=HEAD_SIZE,
            dtype=dtype,
            device="cuda",
        ).layer(0)
        self.each = (self.count, self.num_tokens)
        self.new = self.random(2, *self.each, NUM_KV_HEADS, HEAD_SIZE)
        slots = torch.randperm(self.cache.num_slots, device="cuda")
        self.slots = slots[: self.count * self.num_tokens].view(self.each)
        if self.turned:
            self.queries = self.random(*self.each, NUM_QUERY_HEADS, HEAD_SIZE)
            self.positions = torch.randint(0, NUM_POSITIONS, self.each, device="cuda")
            rates = 10_000.0 ** (-torch.arange(0, HEAD_SIZE, 2, device="cuda") / HEAD_SIZE)
            self.rotary = Rotary.of(rates, NUM_POSITIONS)
        self.columns = {}

    @staticmethod
    def random(*shape):
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda")

    def launches(self, name):
        """One launch for each input, and the Q of the first that is turned in place."""
        parts = zip(*self.new, self.slots, strict=True)
        if not self.turned:
            if name == "index_put":
                return [IndexPut().prepare(k, v, self.cache, s) for k, v, s in parts], None
            return [
                lambda k=k, v=v, s=s: write_kv(k, v, self.cache, s, implementation=name)
                for k, v, s in parts
            ], None
        turn = {
            "pytorch_and_triton": self.steps,
            "vllm_cuda": self.vllm,
            "flashinfer": self.flashinfer,
        }.get(name, functools.partial(self.fused, name))
        queries = self.queries.clone()
        made = [
            turn(*given, positions)
            for given, positions in zip(
                zip(queries, *self.new, self.slots, strict=True), self.positions, strict=True
            )
        ]
        return made, queries[0]

    def fused(self, name, query, key, value, slots, positions):
        return lambda: rotary_write_kv(
            *(query, key, value, self.cache, slots, positions, self.rotary),
            out=query,
            implementation=name,
        )

    def steps(self, query, key, value, slots, positions):
        def launch():
            query.copy_(rotate(query, positions, self.rotary))
            turned = rotate(key, positions, self.rotary).to(key.dtype)
            write_kv(turned, value, self.cache, slots, implementation="triton")

        return launch

    def vllm(self, query, key, value, slots, positions):
        kernel = get_implementation("vllm_cuda")
        kernel.write_kv(key, value, self.cache, slots)  # imports vLLM's operations
        ops = importlib.import_module("vllm._custom_ops")
        key, table = key.clone(), self.rotary.cos_sin.to(query.dtype)

        def launch():
            ops.rotary_embedding(
                positions, query.flatten(1), key.flatten(1), HEAD_SIZE, table, True
            )
            kernel.write_kv(key, value, self.cache, slots)

        return launch

    def flashinfer(self, query, key, value, slots, positions):
        flashinfer = pytest.importorskip("flashinfer")
        key, table, count = key.clone(), self.rotary.cos_sin, self.num_tokens
        # each token is a sequence of one block
        sequences = torch.arange(count + 1, dtype=torch.int32, device="cuda")
        blocks, offsets = (slots // BLOCK_SIZE).int(), (slots % BLOCK_SIZE).int()
        full = torch.full_like(blocks, BLOCK_SIZE)

        def launch():
            flashinfer.apply_rope_with_cos_sin_cache_inplace(
                positions, query.flatten(1), key.flatten(1), HEAD_SIZE, table, is_neox=True
            )
            flashinfer.append_paged_kv_cache(
                *(key, value, sequences[:-1], offsets, (self.cache.key, self.cache.value)),
                *(blocks, sequences, full),
                kv_layout="HND",
            )

        return launch

    def ready(self, name):
        """Check that the first write puts each token in its slot and nothing elsewhere."""
        if name == "flashinfer" and importlib.util.find_spec("flashinfer") is None:
            pytest.skip("FlashInfer is not installed")
        launches, turned = self.launches(name)
        self.cache.key.fill_(torch.nan)
        self.cache.value.fill_(torch.nan)
        if turned is not None:
            turned.copy_(self.queries[0])  # what made the launches ready may have turned it
        try:
            peak_bytes = peak_memory(launches[0])
            error = self.check(turned)
            graph = LaunchGraph(launches)
        except UnsupportedError as refusal:
            pytest.skip(f"{name}: {refusal}")
        self.columns[name] = {
            "error": error,
            "peak_memory_bytes": peak_bytes,
            "host_us": graph.host_seconds * 1e6,
            "launches_per_replay": graph.num_launches,
        }
        return graph

    @property
    def budget(self):
        """Error allowed beside the largest number: of fp8, or of bfloat16 in all steps, or none."""
        return 2.0**-4 if self.fp8 else 2.0**-6 if self.turned else 0.0

    def check(self, turned):
        blocks, offsets = self.slots[0] // BLOCK_SIZE, self.slots[0] % BLOCK_SIZE
        key, value = self.new[0, 0].float(), self.new[1, 0].float()
        if self.turned:
            key = rotate(key, self.positions[0], self.rotary)
        wanted = [(self.cache.key, key), (self.cache.value, value)]
        pairs = [(part[blocks, :, offsets].float(), new) for part, new in wanted]
        if self.turned:
            pairs.append((turned.float(), rotate(self.queries[0], self.positions[0], self.rotary)))
        for part, new in wanted:
            assert int(part.float().isnan().sum()) == part.numel() - new.numel()
        error = max(float((got - new).abs().max() / new.abs().max()) for got, new in pairs)
        assert error <= self.budget, f"the error {error} is above {self.budget}"
        return error


@pytest.fixture(scope="module")
def case(request):
    return Case(request.param)


@pytest.fixture(scope="module")
def timing(case, selected, clock_probe):
    return CaseTiming(selected("case", case.workload), case.ready, RULE, clock_probe)


@pytest.mark.usefixtures("flashinfer_modules")  # compilers would disturb what is timed
def bench_kv_write(benchmark, report_rounds, case, timing, implementation, roofs):
    benchmark.group = case.workload
    if benchmark.disabled:
        benchmark(case.ready(implementation).replay)
        return
    median = report_rounds(timing.of(implementation))
    rate = case.moved / median * 1e-9
    benchmark.extra_info.update(
        area="kv_write",
        implementation=implementation,
        workload=case.workload,
        device="cuda",
        num_tokens=case.num_tokens,
        num_kv_heads=NUM_KV_HEADS,
        head_size=HEAD_SIZE,
        block_size=BLOCK_SIZE,
        dtype="float8_e4m3" if case.fp8 else "bfloat16",
        bytes=case.moved,
        limit_us=case.moved / roofs.copy_gb_per_s * 1e-3,
        error_budget=case.budget,
        rotation=case.count,
        gb_per_s=rate,
        measured_read_gb_per_s=roofs.read_gb_per_s,
        share_of_bandwidth=rate / roofs.read_gb_per_s,
        **case.columns[implementation],
    )
