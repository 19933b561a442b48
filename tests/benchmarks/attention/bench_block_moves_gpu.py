"""Copying blocks of 32 layers on a GPU, and swapping them with the host.

A block is 16 tokens of 8 KV heads of size 128 in bfloat16: 64 KiB a layer. A swap's time is the
host's, until all is there; its limit is one large copy of page-locked memory.
"""

import importlib
import inspect

import numpy as np
import pytest
import torch

from pagedattn import BlockCopies, KVCache
from pagedattn.benchmarking import (
    CaseTiming,
    HostWork,
    LaunchGraph,
    StopRule,
    require_cold,
    rotation_size,
)
from pagedattn.benchmarking.roofs import measure_bus
from pagedattn.kv_swap import BlockSwapper, HostKVCache
from pagedattn.peers import register_kernels

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

register_kernels()

NUM_LAYERS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 32, 8, 128, 16
BLOCK_BYTES = 2 * NUM_KV_HEADS * BLOCK_SIZE * HEAD_SIZE * 2  # of a layer
RULE = StopRule(least=10, most=40, seconds=0.3)


def vllm_operations():
    """VLLM's operations; PyTorch keeps its cuDNN attention, which vLLM switches off."""
    allowed = torch.backends.cuda.cudnn_sdp_enabled()
    operations = importlib.import_module("vllm._custom_ops")
    torch.backends.cuda.enable_cudnn_sdp(allowed)
    return operations


def made(num_blocks):
    cache = KVCache(
        num_layers=NUM_LAYERS, num_blocks=num_blocks, block_size=BLOCK_SIZE,
        num_kv_heads=NUM_KV_HEADS, head_size=HEAD_SIZE, dtype=torch.bfloat16, device="cuda",
    )  # fmt: skip
    cache.storage.normal_()
    return cache


class CopyCase:
    """Pairs of blocks of one cache, `count` lists of them that have no block in common."""

    def __init__(self, num_pairs):
        self.num_pairs = num_pairs
        self.workload = f"block-copy-{num_pairs}x{NUM_LAYERS}"
        self.moved = 2 * num_pairs * NUM_LAYERS * BLOCK_BYTES
        self.count = rotation_size(self.moved)
        require_cold(self.moved, self.count)
        num_blocks = 2 * self.count * num_pairs
        self.cache = made(num_blocks)
        blocks = torch.randperm(num_blocks, device="cuda")
        self.pairs = blocks.view(self.count, 2, num_pairs).to(torch.int32)

    def launches(self, name):
        if name == "triton":
            return self.cache, [lambda p=p: self.cache.copy_block_pairs(p) for p in self.pairs]
        if name == "index_put":
            storage = self.cache.storage

            def launch(sources, destinations):
                storage[:, destinations] = storage[:, sources]

            return self.cache, [lambda p=p: launch(p[0], p[1]) for p in self.pairs.long()]
        copy_blocks = getattr(vllm_operations(), "copy_blocks", None)
        if copy_blocks is None or not hasattr(torch.ops._C_cache_ops, "copy_blocks"):
            pytest.skip("this vLLM has no copy_blocks")
        # it takes K and V of a layer as two contiguous tensors
        keys, values = (
            [layer[:, part].contiguous() for layer in self.cache.storage] for part in range(2)
        )
        moves = [p.long().T.contiguous() for p in self.pairs]
        return (keys, values), [lambda m=m: copy_blocks(keys, values, m) for m in moves]

    def ready(self, name):
        kept, launches = self.launches(name)
        launches[0]()
        sources, destinations = self.pairs[0].long()
        if name == "vllm_cuda":
            for layer in (tensor for tensors in kept for tensor in tensors):
                assert torch.equal(layer[destinations], layer[sources])
        else:
            storage = kept.storage
            assert torch.equal(storage[:, destinations], storage[:, sources])
        return LaunchGraph(launches)


class SwapCase:
    """Blocks anywhere in a device's cache, and anywhere in the host's."""

    def __init__(self, workload):
        self.workload = workload
        self.outwards = workload.startswith("swap-out")
        num_blocks = int(workload.rpartition("-")[2].partition("x")[0])
        self.moved = num_blocks * NUM_LAYERS * BLOCK_BYTES
        self.cache = made(2 * num_blocks)
        self.host = HostKVCache(self.cache, 2 * num_blocks)
        self.host.blocks.zero_()
        rng = np.random.default_rng(0)
        on_device, on_host = (
            rng.permutation(2 * num_blocks)[:num_blocks].astype(np.int32) for _ in range(2)
        )
        pair = (on_device, on_host) if self.outwards else (on_host, on_device)
        self.copies = BlockCopies(*pair)
        self.on_device, self.on_host = (torch.from_numpy(b).long() for b in (on_device, on_host))

    def swapper(self):
        swapper = BlockSwapper(self.cache, self.host)
        move = swapper.swap_out if self.outwards else swapper.swap_in

        def swap():
            move(self.copies)
            swapper.synchronize()

        return swap, self.host.storage

    def index_copy(self):
        host = torch.empty(self.host.storage.shape, dtype=torch.bfloat16, pin_memory=True)
        on_device = self.on_device.cuda()

        def swap():
            for mine, theirs in zip(self.cache.storage, host, strict=True):
                if self.outwards:
                    theirs[self.on_host] = mine[on_device].cpu()
                else:
                    mine[on_device] = theirs[self.on_host].cuda()
            torch.cuda.synchronize()

        return swap, host

    def vllm_cuda(self):
        swap_blocks = vllm_operations().swap_blocks
        host = torch.empty(self.host.storage.shape, dtype=torch.bfloat16, pin_memory=True)
        blocks = torch.stack([self.on_device, self.on_host], dim=1)
        if not self.outwards:
            blocks = blocks.flip(1).contiguous()
        size = (BLOCK_BYTES,) if len(inspect.signature(swap_blocks).parameters) == 4 else ()

        def swap():
            for mine, theirs in zip(self.cache.storage, host, strict=True):
                ends = (mine, theirs) if self.outwards else (theirs, mine)
                swap_blocks(*ends, *size, blocks)
            torch.cuda.synchronize()

        return swap, host

    def ready(self, name):
        made_ready = {"triton": self.swapper, "vllm_cuda": self.vllm_cuda}
        swap, host = made_ready.get(name, self.index_copy)()
        host.zero_()
        if not self.outwards:
            shape = host[:, self.on_host].shape
            numbers = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
            host[:, self.on_host] = numbers.cpu()
        swap()
        on_device = self.cache.storage[:, self.on_device.cuda()].cpu()
        assert torch.equal(host[:, self.on_host], on_device)
        return HostWork(swap, torch.cuda.synchronize)


def names(*implementations):
    for name in implementations:
        yield pytest.param(name, marks=[pytest.mark.vllm] if name == "vllm_cuda" else [])


@pytest.fixture(scope="module")
def case(request):
    return CopyCase(request.param) if isinstance(request.param, int) else SwapCase(request.param)


@pytest.fixture(scope="module")
def timing(case, selected, clock_probe):
    parameter = case.num_pairs if isinstance(case, CopyCase) else case.workload
    return CaseTiming(selected("case", parameter), case.ready, RULE, clock_probe)


@pytest.fixture(scope="module")
def bus():
    return measure_bus()


def columns(case, implementation, median, roof, **more):
    rate = case.moved / median * 1e-9
    return {
        "area": "kv_cache",
        "implementation": implementation,
        "workload": case.workload,
        "device": "cuda",
        "num_kv_heads": NUM_KV_HEADS,
        "head_size": HEAD_SIZE,
        "block_size": BLOCK_SIZE,
        "dtype": "bfloat16",
        "bytes": case.moved,
        "limit_us": case.moved / roof * 1e-3,
        "error": 0.0,
        "error_budget": 0.0,
        "gb_per_s": rate,
        **more,
    }


@pytest.mark.parametrize("implementation", list(names("triton", "index_put", "vllm_cuda")))
@pytest.mark.parametrize("case", [1, 64], indirect=True)
def bench_block_copy(benchmark, report_rounds, case, timing, implementation, roofs):
    benchmark.group = case.workload
    if benchmark.disabled:
        benchmark(case.ready(implementation).replay)
        return
    median = report_rounds(timing.of(implementation))
    more = {
        "rotation": case.count,
        "measured_read_gb_per_s": roofs.read_gb_per_s,
        "share_of_bandwidth": case.moved / median * 1e-9 / roofs.read_gb_per_s,
    }
    row = columns(case, implementation, median, roofs.copy_gb_per_s, **more)
    benchmark.extra_info.update(row)


@pytest.mark.parametrize("implementation", list(names("triton", "index_put", "vllm_cuda")))
@pytest.mark.parametrize("case", ["swap-out-256x32", "swap-in-256x32"], indirect=True)
def bench_swap(benchmark, report_rounds, case, timing, implementation, bus):
    benchmark.group = case.workload
    if benchmark.disabled:
        benchmark(case.ready(implementation).replay)
        return
    median = report_rounds(timing.of(implementation))
    roof = bus.out_gb_per_s if case.outwards else bus.in_gb_per_s
    # the bandwidth of which a share is told is the bus's
    more = {
        "measured_read_gb_per_s": roof,
        "share_of_bandwidth": case.moved / median * 1e-9 / roof,
    }
    row = columns(case, implementation, median, roof, **more)
    benchmark.extra_info.update(row)
