"""Cases for the CUDA kernels on the host, and the launches that they are checked through."""

import dataclasses
from unittest import mock

import pytest
import torch

from pagedattn.attention.batch_memory import NUM_ARRIVALS, BatchMemory
from pagedattn.testing import check_attention, make_inputs
from pagedattn.workloads import AttentionShape

pytest.importorskip("triton")

from pagedattn.attention.cuda import decode, decode_calls, decode_config, prefill
from pagedattn.testing.emulator import emulation

ALL = {"window": 70, "soft_cap": 3.0, "alibi": True, "sinks": True}
nightly = pytest.mark.nightly


def inputs_of(
    kv_lengths,
    queries=1,
    *,
    heads=(8, 2),
    head_size=64,
    block_size=16,
    dtype="float16",
    fp8=False,
    causal=True,
    **options,
):
    """Inputs whose batch has counters, as it has on a GPU; `queries` of each sequence or of all."""
    if isinstance(queries, int):
        queries = (queries,) * len(kv_lengths)
    shape = AttentionShape(
        *("test", queries, kv_lengths, *heads, head_size, block_size, dtype),
        "float8_e4m3" if fp8 else None,
    )
    inputs = make_inputs(shape, **options)
    arrivals = torch.zeros(NUM_ARRIVALS, dtype=torch.int32)
    batch = dataclasses.replace(inputs.batch, arrivals=arrivals)
    return dataclasses.replace(inputs, batch=batch, causal=causal)


def check(inputs, launch_of, *, multiprocessors=6, lse=False, seeds=(0, 1), rounded_to=None):
    """Launch twice by each seed, and compare with float64; `rounded_to` as in `error_budget`."""
    out = torch.empty_like(inputs.query)
    if not inputs.causal:  # parts of shared blocks are merged in float32
        out = out.float()
    call = inputs.call(out, torch.empty(out.shape[:2]) if lse else None)
    zeros, make_zeros = [], BatchMemory.zeros

    def note_zeros(memory, count):
        zeros.append(make_zeros(memory, count))
        return zeros[-1]

    for seed in seeds:
        with emulation(multiprocessors, seed), mock.patch.object(BatchMemory, "zeros", note_zeros):
            launch = launch_of(call)
            for _ in range(2):
                for written in filter(lambda tensor: tensor is not None, (out, call.lse)):
                    written.fill_(torch.nan)
                launch(call)
                check_attention(out, inputs, call.lse, rounded_to=rounded_to)
                assert not inputs.batch.arrivals.any()
                assert not any(kept.any() for kept in zeros)


def small_tiles(call, programs=1, cluster=1, **options):
    """Cut for small tiles and few stages, so that short sequences go round them."""
    assert decode_calls.not_taken(call) is None
    columns = call.query.shape[1] // call.cache.num_kv_heads * call.batch.max_query_length
    padded = decode_config.padded_columns(columns)
    config = decode_config.DecodeConfig(padded, 16, 4, programs, cluster, **options)
    return decode.DecodeLaunch(call, config)


def two_programs(call):
    """The same, for two programs on a multiprocessor."""
    return small_tiles(call, programs=2)


def whole_rows(call):
    """The same, without cutting rows."""
    return small_tiles(call, keeps_whole=True)


def two_with_whole_rows(call):
    """The same, for two programs on a multiprocessor."""
    return small_tiles(call, programs=2, keeps_whole=True)


def aligned_rows(call):
    """The same, where each row may begin with a range."""
    return small_tiles(call, aligns=True)


def two_with_aligned_rows(call):
    """The same, for two programs on a multiprocessor."""
    return small_tiles(call, programs=2, aligns=True)


def clusters_of(size):
    """The same, for clusters of so many programs."""
    return lambda call: small_tiles(call, cluster=size)


def prefill_of(call):
    assert prefill.not_taken(call) is None
    return prefill.PrefillLaunch(call)


def by_fp8(call):
    """Prefill whose products are of fp8."""
    assert prefill.not_taken(call) is None
    return prefill.PrefillLaunch(call, fp8_products=True)


def skip_small_boxes(bytes_of_block):
    if bytes_of_block % 128:
        pytest.skip("a head's part of a block has to be a multiple of 128 bytes")
