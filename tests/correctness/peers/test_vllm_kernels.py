"""vLLM's kernels in a graph, what they leave to PyTorch, and their KV write."""

import subprocess
import sys

import pytest
import torch

from pagedattn.attention import attention, get_implementation, implementation_names, write_kv
from pagedattn.kv_cache import KVCache
from pagedattn.peers import VLLM_KERNELS, register_kernels
from pagedattn.testing import check_attention, make_inputs
from pagedattn.workloads import AttentionShape

register_kernels()

# vLLM and what it imports warn of their own affairs
REAL = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
LENGTHS = {
    "decode": ((1,) * 7, (1, 15, 16, 17, 37, 333, 1500)),
    "prefill": ((1, 15, 16, 17, 37, 333), (1, 15, 16, 17, 37, 333)),
    "mixed": ((1, 5, 1, 40, 3, 100), (1, 15, 16, 61, 333, 700)),
}


class TestOnAGpu:
    pytestmark = REAL

    @pytest.mark.parametrize("kind", LENGTHS)
    @pytest.mark.parametrize("kernel", VLLM_KERNELS)
    def test_a_prepared_launch_gives_the_same_bits_again_and_in_a_graph(self, kernel, kind):
        shape = AttentionShape("test", *LENGTHS[kind], 8, 2, 128, 16, "bfloat16")
        inputs = make_inputs(shape, device="cuda")
        implementation = get_implementation(kernel)
        if reason := implementation.unsupported(inputs.call()):
            pytest.skip(reason)
        launch = implementation.prepare(inputs.call())
        first = launch().clone()
        check_attention(first, inputs)
        if launch.plan is not None:
            launch.plan()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        launch.out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(launch.out, first)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("block_size", [1, 16, 64])
    def test_its_kv_write_puts_each_token_into_its_slot(self, block_size, dtype):
        cache = KVCache(
            num_layers=1, num_blocks=9, block_size=block_size, num_kv_heads=3, head_size=64,
            dtype=dtype, device="cuda",
        )  # fmt: skip
        ours = KVCache(
            num_layers=1, num_blocks=9, block_size=block_size, num_kv_heads=3, head_size=64,
            dtype=dtype, device="cuda",
        )  # fmt: skip
        cache.storage.fill_(torch.nan)
        ours.storage.fill_(torch.nan)
        slots = torch.randperm(9 * block_size, device="cuda")[:6]
        key, value = torch.randn((2, 6, 3, 64), dtype=dtype, device="cuda")
        write_kv(key, value, cache.layer(0), slots, implementation="vllm_cuda")
        write_kv(key, value, ours.layer(0), slots, implementation="torch")
        assert torch.equal(cache.storage.view(torch.int16), ours.storage.view(torch.int16))


def test_the_kernels_are_registered_once_and_say_what_they_need():
    register_kernels()
    assert [name for name in implementation_names() if name in VLLM_KERNELS] == list(VLLM_KERNELS)
    shape = AttentionShape("small", (1, 1), (7, 16), 4, 2, 64, 16, "float16")
    inputs = make_inputs(shape)
    for kernel in VLLM_KERNELS:
        with pytest.raises(ValueError, match=r"vLLM is not installed|need a CUDA GPU"):
            attention(inputs.query, inputs.cache, inputs.batch, implementation=kernel)


@pytest.mark.gpu
@pytest.mark.vllm
def test_pytorch_keeps_its_cudnn_attention_when_vllm_is_imported():
    code = """
import torch
from pagedattn.peers.vllm.common import imported
imported("vllm._custom_ops")
assert torch.backends.cuda.cudnn_sdp_enabled()
import vllm.platforms.cuda
assert torch.backends.cuda.cudnn_sdp_enabled()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
