"""The CUDA decode kernel: what can be checked without a GPU, and how it is cut on one."""

import ctypes
import dataclasses

import pytest
import torch

from pagedattn.testing import check_attention, make_inputs
from pagedattn.workloads import AttentionShape

pytest.importorskip("cuda.bindings.nvrtc")
pytest.importorskip("triton")

from pagedattn.attention.cuda import (
    compiler,
    decode,
    decode_calls,
    decode_config,
    decode_map,
    launcher_of,
    prefill,
)
from pagedattn.attention.cuda.decode_fits import H100

from .bounds import with_bound


def shape(**changes):
    values = {"num_query_heads": 8, "num_kv_heads": 2, "head_size": 128, "block_size": 16}
    return AttentionShape("test", (1, 1), (7, 40), **(values | {"dtype": "float16"} | changes))


@pytest.mark.usefixtures("cache_folder", "nvrtc")
@pytest.mark.parametrize(
    ("head_size", "kv_bytes", "columns", "many", "lines"),
    [
        *((head_size, 2, 4, True, False) for head_size in decode_calls.HEAD_SIZES),
        *((64, 2, 4, False, False), (64, 1, 4, False, False), (96, 1, 4, False, False)),
        *((256, 1, 16, False, False), (128, 2, 16, True, False), (128, 2, 32, False, False)),
        *((128, 1, 32, False, False), (80, 2, 4, True, True), (96, 1, 4, False, True)),
    ],
)
def test_every_cut_compiles_and_fits_shared_memory(head_size, kv_bytes, columns, many, lines):
    config = decode_config.choose_config(
        head_size, kv_bytes, columns, programs=2 if many else 1, fit=H100
    )
    macros = decode_config.macros_of(
        config, head_size=head_size, kv_bytes=kv_bytes, group=4, bf16=True, block_size=16,
        lines=lines,
    )  # fmt: skip
    # shared memory that is too small is a failed assertion of the source
    assert compiler.compile_kernel("decode.cu", dict(macros)).startswith(b"\x7fELF")


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize(
    ("block_size", "features", "programs"),
    [
        *((1, (), 1), (1, ("lse",), 2), (2, (), 2), (4, decode_config.SWITCHES, 1)),
        *((256, (), 1), (16, ("lse", "not_causal"), 1), (16, ("among_longer",), 2)),
        *((8, (name,), 1) for name in decode_config.SWITCHES),
    ],
    ids=str,
)
def test_features_and_block_sizes_compile(cache_folder, block_size, features, programs):
    config = decode_config.choose_config(
        128, 2, 4, block_size=block_size, programs=programs, fit=H100
    )
    assert config.programs == programs
    macros = decode_config.macros_of(
        config,
        head_size=128, kv_bytes=2, group=4, bf16=False, block_size=block_size, features=features,
        out_f32="not_causal" in features, among_longer="among_longer" in features,
    )  # fmt: skip
    cubin = compiler.compile_kernel("decode.cu", dict(macros))
    (path,) = cache_folder.iterdir()
    assert path.read_bytes() == cubin


@pytest.mark.usefixtures("nvrtc")
def test_a_compiled_kernel_is_read_from_the_cache(cache_folder):
    macros = decode_config.macros_of(
        decode_config.choose_config(64, 2, 4, fit=H100),
        head_size=64, kv_bytes=2, group=1, bf16=True, block_size=16,
    )  # fmt: skip
    compiler.compile_kernel("decode.cu", dict(macros))
    (path,) = cache_folder.iterdir()
    path.write_bytes(b"what was compiled before")
    assert compiler.compile_kernel("decode.cu", dict(macros)) == b"what was compiled before"
    other = {**dict(macros), "BF16": 0}
    assert compiler.compile_kernel("decode.cu", other) != b"what was compiled before"


@pytest.mark.usefixtures("nvrtc")
def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PAGEDATTN_CACHE", str(tmp_path / "file" / "kernels"))
    macros = decode_config.macros_of(
        decode_config.choose_config(64, 2, 4, fit=H100),
        head_size=64, kv_bytes=2, group=1, bf16=True, block_size=16,
    )  # fmt: skip
    assert compiler.compile_kernel("decode.cu", dict(macros)).startswith(b"\x7fELF")


@pytest.mark.usefixtures("cache_folder", "nvrtc")
def test_what_the_compiler_says_is_told():
    with pytest.raises(compiler.CompileError, match=r"decode\.cu does not compile"):
        compiler.compile_kernel("decode.cu", {"HEAD_SIZE": 128})


def test_the_parameters_are_as_large_as_the_kernel_takes_them():
    assert ctypes.sizeof(decode._Parameters) % 64 == 0


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"dtype": "float32"}, "queries of torch.float32"),
        ({"head_size": 72}, "head_size 72"),
        ({"block_size": 24}, "block_size 24, which is no power of two"),
        ({"head_size": 80, "block_size": 1}, "block_size 1 with rows of 160 bytes"),
        ({"num_query_heads": 80}, "40 queries and heads of a group together"),
        ({"num_query_heads": 64, "head_size": 256}, "32 queries and heads of a group together"),
    ],
    ids=str,
)
def test_what_the_kernel_cannot_take_is_told(changes, phrase):
    assert phrase in decode_calls.not_taken(make_inputs(shape(**changes)).call())


def test_what_the_kernel_can_take_is_taken():
    assert decode_calls.not_taken(make_inputs(shape()).call()) is None
    strided = make_inputs(shape())
    query = torch.zeros(2, 9, 130, dtype=torch.float16)[:, 1:, 1:129]
    call = dataclasses.replace(strided.call(), query=query)
    assert "multiples of 4 elements" in decode_calls.not_taken(call)


SHORT, ALIKE, RAGGED = (90, 40), (9000, 9000), (9000, 700)


@pytest.mark.parametrize(
    ("queries", "kv_lengths", "changes", "launcher"),
    [
        (2, RAGGED, {}, decode.DecodeLaunch),  # 8 columns
        (4, SHORT, {}, decode.DecodeLaunch),
        (4, ALIKE, {}, decode.DecodeLaunch),
        (4, RAGGED, {}, prefill.PrefillLaunch),
        (2, RAGGED, {"head_size": 256}, decode.DecodeLaunch),
        (3, RAGGED, {"head_size": 256}, prefill.PrefillLaunch),
        (6, ALIKE, {"head_size": 64}, decode.DecodeLaunch),
        (6, SHORT, {"head_size": 64}, prefill.PrefillLaunch),
        (6, ALIKE, {}, prefill.PrefillLaunch),
    ],
    ids=str,
)
def test_drafts_go_to_the_faster_kernel(queries, kv_lengths, changes, launcher):
    values = {"head_size": 128, "block_size": 16, "dtype": "bfloat16"} | changes
    call = make_inputs(AttentionShape("test", (queries,) * 2, kv_lengths, 8, 2, **values)).call()
    assert launcher_of(call) is launcher


def test_drafts_whose_lengths_nobody_knows_go_to_decode_if_their_sums_fit():
    shape = AttentionShape("test", (4, 4), RAGGED, 8, 2, head_size=128, dtype="bfloat16")
    call = make_inputs(shape).call()
    unknown = dataclasses.replace(call.batch, known_lengths=None)
    assert launcher_of(dataclasses.replace(call, batch=unknown)) is decode.DecodeLaunch


@pytest.mark.parametrize(
    ("queries", "heads", "changes", "launcher"),
    [
        (1, (8, 2), {}, decode.DecodeLaunch),
        (4, (8, 2), {}, decode.DecodeLaunch),
        (5, (8, 2), {}, prefill.PrefillLaunch),
        (5, (8, 2), {"block_size": 4}, decode.DecodeLaunch),  # which prefill does not take
        (5, (8, 2), {"kv_dtype": "float8_e4m3"}, prefill.PrefillLaunch),
        (1, (8, 2), {"kv_dtype": "float8_e4m3", "head_size": 80}, prefill.PrefillLaunch),
        (9, (8, 2), {}, prefill.PrefillLaunch),
        (9, (8, 2), {"block_size": 4}, None),
    ],
    ids=str,
)
def test_queries_whose_sums_do_not_fit_in_registers_are_prefill_s_if_it_takes_them(
    queries, heads, changes, launcher
):
    values = {"head_size": 128, "block_size": 16, "dtype": "bfloat16"} | changes
    call = make_inputs(AttentionShape("test", (queries,) * 2, (90, 40), *heads, **values)).call()
    assert launcher_of(call) is launcher
    if launcher is prefill.PrefillLaunch and queries == 5:
        assert launcher_of(dataclasses.replace(call, causal=False)) is decode.DecodeLaunch


@pytest.mark.parametrize(
    ("head_size", "kv_dtype", "block_size", "row", "rows"),
    [
        *((80, None, 16, 128, 20), (80, None, 4, 128, 5), (96, "float8_e4m3", 16, 128, 12)),
        *((80, None, 64, 128, 40), (96, None, 16, 64, 16), (128, None, 16, 128, 16)),
    ],
)
def test_boxes_are_whole_lines_but_where_a_swizzle_spans_half_a_line(
    head_size, kv_dtype, block_size, row, rows, monkeypatch
):
    boxes = []

    def note(address, itemsize, sizes, strides, box, swizzle, fetched_bytes):
        del address, sizes, strides, swizzle, fetched_bytes
        boxes.append((box[0] * itemsize, box[1]))

    monkeypatch.setattr(decode_map, "tensor_map", note)
    cut = {"head_size": head_size, "kv_dtype": kv_dtype, "block_size": block_size}
    decode_map.map_of(make_inputs(shape(**cut)).cache.key, 32)
    assert boxes == [(row, rows)]


@pytest.mark.gpu
@pytest.mark.pairs(
    kv_lengths={
        "one": (60_000,),
        "300 of 1": (1,) * 300,
        "one and 59": (40_000, *range(1, 60)),
        "64": (513,) * 64,
    },
    heads=[(8, 1), (8, 2), (6, 3), (16, 16), (40, 40)],
    programs=[1, 2],
)
def test_rows_cut_between_any_number_of_programs_agree_with_float64(kv_lengths, heads, programs):
    inputs = make_inputs(
        AttentionShape("test", (1,) * len(kv_lengths), kv_lengths, *heads, 64), device="cuda"
    )
    call = inputs.call()
    config = decode_config.choose_config(64, 2, heads[0] // heads[1], programs=programs, fit=H100)
    assert config.programs == programs
    for _ in range(2):  # the counters are left as they were found
        call.out.fill_(torch.nan)
        decode.DecodeLaunch(call, config)(call)
        check_attention(call.out, inputs)
    assert not inputs.batch.arrivals.any()


@pytest.mark.gpu
@pytest.mark.parametrize("bound", [None, 4096], ids=["of the longest", "far above"])
@pytest.mark.parametrize("block_size", [8, 16, 64, 256])
@pytest.mark.parametrize(
    "kv_lengths",
    [(1024,) * 8, (2048,) * 4, (130,) * 40, (1, 2000, 64, 77, 1024), (500,) * 39 + (17,)],
    ids=["whole", "cut", "many", "ragged", "one shorter"],
)
def test_what_is_asked_for_before_lengths_are_known_changes_no_result(
    kv_lengths, block_size, bound
):
    shape = AttentionShape("test", (1,) * len(kv_lengths), kv_lengths, 32, 8, 128, block_size)
    inputs = make_inputs(shape, device="cuda", extra_columns=1)
    inputs = with_bound(inputs, max(kv_lengths) if bound is None else bound)
    call = inputs.call()
    for programs in (1, 2):
        config = decode_config.choose_config(128, 2, 4, programs=programs, fit=H100)
        assert config.programs == programs
        launch = decode.DecodeLaunch(call, config)
        for _ in range(2):
            call.out.fill_(torch.nan)
            launch(call)
            check_attention(call.out, inputs)
