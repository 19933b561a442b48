"""What the adapters to vLLM's kernels refuse and hand over, with vLLM itself replaced."""

import dataclasses
import sys
from types import ModuleType

import pytest
import torch

from pagedattn.attention import write_kv
from pagedattn.attention.reference import reference_attention
from pagedattn.kv_cache import KVCache
from pagedattn.peers import register_kernels
from pagedattn.peers.vllm import VllmCuda, VllmFlashAttention3, VllmTriton
from pagedattn.peers.vllm import common as vllm_common
from pagedattn.testing import lse_budget, make_inputs
from pagedattn.workloads import AttentionShape

register_kernels()


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    """Modules in the place of vLLM's, on the CPU, which is said to be a Hopper GPU."""
    ops = ModuleType("vllm._custom_ops")

    def reshape_and_cache_flash(key, value, key_cache, value_cache, slots, *_):
        assert len(slots), "CUDA error: invalid argument"
        blocks, offsets = slots // key_cache.shape[1], slots % key_cache.shape[1]
        key_cache[blocks, offsets], value_cache[blocks, offsets] = key, value

    ops.reshape_and_cache_flash = reshape_and_cache_flash
    for module in (ops, ModuleType("vllm.platforms.cuda")):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(vllm_common.VllmKernel, "missing", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


def inputs_of(query_lengths, kv_lengths, **options):
    shape = AttentionShape("small", query_lengths, kv_lengths, 4, 2, 64, 4, "float16")
    return make_inputs(shape, **options)


@pytest.mark.parametrize(
    ("queries", "sequences", "splits"),
    [(1, 3, True), (1, 64, True), (1, 65, False), (2, 3, False)],
)
def test_triton_refuses_sequences_without_tokens_where_it_splits_keys(queries, sequences, splits):
    inputs = inputs_of((queries,) * sequences, (7,) * sequences)
    assert VllmTriton().unsupported(inputs.call()) is None
    inputs.batch.kv_lengths[1] = 0
    refused = VllmTriton().unsupported(inputs.call())
    if splits:
        assert refused == "where it splits keys it gives NaN for sequences without tokens"
    else:
        assert refused is None


@pytest.mark.parametrize(
    ("largest", "with_lse", "refused"),
    [(88.0, True, False), (89.0, True, True), (1000.0, True, True), (1000.0, False, False)],
)
def test_flash_attention_3_refuses_sinks_that_its_log_sum_exp_overflows_with(
    largest, with_lse, refused
):
    inputs = inputs_of((1, 2), (7, 9))
    sinks = torch.tensor([-torch.inf, -1000.0, 0.0, largest])
    lse = torch.empty(3, 4) if with_lse else None
    call = dataclasses.replace(inputs, sinks=sinks).call(lse=lse)
    phrase = "its log-sum-exp may overflow with sinks above 88"
    assert VllmFlashAttention3().unsupported(call) == (phrase if refused else None)


@pytest.mark.parametrize(("with_sinks", "with_lse"), [(True, True), (True, False), (False, True)])
def test_flash_attention_3_refuses_sinks_that_its_log_sum_exp_leaves_out(with_sinks, with_lse):
    inputs = inputs_of((1, 2), (7, 9), sinks=with_sinks)
    call = inputs.call(lse=torch.empty(3, 4) if with_lse else None)
    assert VllmFlashAttention3().unsupported(call) is None
    inputs.batch.kv_lengths[0] = 0
    refused = VllmFlashAttention3().unsupported(call)
    phrase = "its log-sum-exp of a sequence without keys leaves sinks out"
    assert refused == (phrase if with_sinks and with_lse else None)


def test_flash_attention_3_may_be_off_by_its_approximate_soft_cap_in_the_log_sum_exp():
    for soft_cap, error in ((None, 0.0), (2.0, 2.0**-10), (50.0, 50 * 2.0**-11)):
        inputs = inputs_of((1, 2), (7, 9), soft_cap=soft_cap)
        assert VllmFlashAttention3().lse_error(inputs.call()) == error
        _, exact = reference_attention(inputs.call(), torch.float64)
        usual = lse_budget(inputs, exact)
        found = lse_budget(inputs, exact, "vllm_flash_attention_3")
        assert found == pytest.approx(usual + error)


@pytest.mark.parametrize("kernel", [VllmCuda, VllmTriton, VllmFlashAttention3])
@pytest.mark.parametrize("num_tokens", [0, 3])
def test_a_kv_write_hands_tokens_over_unless_there_are_none(kernel, num_tokens):
    cache, expected = (
        KVCache(
            num_layers=1, num_blocks=5, block_size=4, num_kv_heads=2, head_size=8,
            dtype=torch.float16, device="cpu",
        )
        for _ in range(2)
    )  # fmt: skip
    cache.storage.zero_()
    expected.storage.zero_()
    key, value = torch.randn((2, num_tokens, 2, 8)).half()
    slots = torch.tensor([9, 0, 18])[:num_tokens]
    kernel().write_kv(key, value, cache.layer(0), slots)
    write_kv(key, value, expected.layer(0), slots, implementation="torch")
    assert torch.equal(cache.storage, expected.storage)
