"""Kernels that note when their programs come to named moments: no trace of it where not asked."""

import re

import numpy as np
import pytest
import torch

from pagedattn.testing import make_inputs
from pagedattn.workloads import AttentionShape

pytest.importorskip("cuda.bindings.nvrtc")
pytest.importorskip("triton")

from pagedattn.attention.cuda import compiler, decode_config, launching, prefill
from pagedattn.attention.cuda.decode_fits import H100
from pagedattn.benchmarking.launch_trace import MOMENTS, LaunchTrace
from pagedattn.benchmarking.tracing import launch_of

pytestmark = pytest.mark.usefixtures("cache_folder")

TRACE = compiler._FOLDER / "trace.cuh"
NAMES = list(MOMENTS)


def macros_of_decode(head_size, kv_bytes, columns, block_size=16, features=()):
    config = decode_config.choose_config(
        head_size, kv_bytes, columns, block_size=block_size, fit=H100
    )
    return decode_config.macros_of(
        config, head_size=head_size, kv_bytes=kv_bytes, group=min(4, columns), bf16=True,
        block_size=block_size, features=features,
    )  # fmt: skip


def macros_of_prefill(heads, head_size, kv_dtype=None):
    shape = AttentionShape("test", (40,), (60,), *heads, head_size, kv_dtype=kv_dtype)
    return prefill.macros_of(make_inputs(shape).call())


CUTS = {
    "decode-128": ("decode.cu", macros_of_decode(128, 2, 4)),
    "decode-128-block1": ("decode.cu", macros_of_decode(128, 2, 4, block_size=1)),
    "decode-64-fp8": ("decode.cu", macros_of_decode(64, 1, 4, features=("lse", "window"))),
    "decode-64-block256": ("decode.cu", macros_of_decode(64, 2, 16, block_size=256)),
    "prefill-64": ("prefill.cu", macros_of_prefill((8, 1), 64)),
    "prefill-128": ("prefill.cu", macros_of_prefill((8, 2), 128)),
    "prefill-128-fp8": ("prefill.cu", macros_of_prefill((8, 2), 128, "float8_e4m3")),
}
cuts = pytest.mark.parametrize(("source", "macros"), CUTS.values(), ids=CUTS)


@pytest.mark.usefixtures("nvrtc")
@cuts
def test_a_kernel_has_marks_where_asked_and_no_trace_of_them_where_not(source, macros, monkeypatch):
    traced = compiler.compile_kernel(source, dict(macros + launching.macros_of_trace(132)))
    assert b"marks" in traced
    plain = compiler.compile_kernel(source, dict(macros))
    # as the same sources without a line about moments
    texts = [
        re.sub(r"mark\(Moment::\w+\);", ";", text).replace('"trace.cuh"', '"hopper.cuh"')
        for text in compiler._texts(source)
    ]
    assert not any("mark(" in text for text in texts if text != TRACE.read_text(encoding="utf-8"))
    monkeypatch.setattr(compiler, "_texts", lambda _: tuple(texts))
    assert plain == compiler.compile_kernel(source, dict(macros))


def test_moments_are_called_what_the_kernels_call_them():
    text = re.sub(r"//.*", "", TRACE.read_text(encoding="utf-8"))
    names = re.search(r"enum class Moment \{(.*?)\}", text, re.DOTALL)[1].replace(",", " ").split()
    assert [name.lower() for name in names] == NAMES
    for name in ("MOST_WARPS", "MOST_MOMENTS"):
        (number,) = re.findall(rf"{name} = (\d+)", text)
        assert int(number) == getattr(launching, name)


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [({"dtype": "float32"}, "queries of torch.float32"), ({"block_size": 24}, "block_size 24")],
)
def test_what_no_cuda_kernel_takes_cannot_be_traced(changes, phrase):
    values = {"block_size": 16, "dtype": "float16", **changes}
    shape = AttentionShape("test", (1, 1), (7, 40), 8, 2, 128, **values)
    with pytest.raises(ValueError, match=phrase):
        launch_of(make_inputs(shape).call(), trace=True)


def test_a_batch_for_both_kernels_cannot_be_traced():
    values = {"dtype": "bfloat16", "kv_dtype": "float8_e4m3"}
    queries, kv_lengths = (512, *(1,) * 4), (1024, *(2048,) * 3, 16_384)
    shape = AttentionShape("test", queries, kv_lengths, 32, 8, 128, **values)
    with pytest.raises(ValueError, match="this mixed batch is two launches"):
        launch_of(make_inputs(shape).call())


LAUNCHES = {
    "decode": ((1,) * 16, (513,) * 16, (8, 2), 128, 16),
    "decode-cut": ((1,) * 3, (40_000, 1, 700), (8, 1), 128, 16),
    "decode-many-bundles": ((1,), (90_000,), (8, 1), 64, 16),
    "decode-two-a-multiprocessor": ((1,) * 256, (2500,) * 256, (8, 8), 128, 16),
    "decode-less-work-than-programs": ((1,), (100,), (8, 2), 64, 1),
    "prefill": ((700, 1, 130), (700, 1500, 999), (8, 2), 128, 16),
    "prefill-64": ((700,), (1400,), (8, 1), 64, 16),
    "prefill-fp8": ((700, 1, 130), (700, 1500, 999), (8, 2), 128, 16, "bfloat16", "float8_e4m3"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
def test_a_traced_launch_gives_the_same_bits_and_moments_in_order(launch):
    queries, lengths, heads, *others = launch
    shape = AttentionShape("test", queries, lengths, *heads, *others)
    inputs = make_inputs(shape, device="cuda")
    call = inputs.call()
    launch_of(call)(call)
    traced, expected = launch_of(call, trace=True), call.out.clone()
    for _ in range(2):  # the second finds the marks of the first
        call.out.fill_(torch.nan)
        traced(call)
        assert torch.equal(call.out, expected)
        marks = traced.marks()[:, :, : len(NAMES)]
        check_order_of_a_warp(marks)
        check_order_of_a_program(LaunchTrace.of_marks(marks))


def check_order_of_a_warp(marks):
    """Each moment that a warp came to is not before those above it in the list."""
    ordered = np.delete(marks, NAMES.index("first_asked"), axis=-1)  # may be before lengths_known
    is_there = ordered > 0
    latest = np.maximum.accumulate(np.where(is_there, ordered, 0), axis=-1)
    assert (latest[is_there] == ordered[is_there]).all()
    assert is_there[:, :, 0].any(axis=1).all()
    assert (is_there[:, :, 0] == is_there[:, :, -1]).all()


def check_order_of_a_program(trace):
    # who has drawn a share without keys, as of a prompt's first tile, writes and asks for none
    asked, written = trace.of("first_asked"), trace.of("written")
    works = ~np.isnan(asked) & ~np.isnan(written)
    assert (trace.of("started")[works] <= asked[works]).all()
    assert (asked[works] <= trace.of("first_there")[works]).all()
    boundaries = trace.boundaries()
    assert len(boundaries) == works.sum() > 0
    assert (np.diff(boundaries) >= 0).all()
    assert (boundaries >= 0).all()
