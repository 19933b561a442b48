"""The CUDA decode kernel: what can be checked without a GPU, and how it is cut on one."""

import ctypes
import dataclasses
import itertools
from functools import partial

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
    launcher_of,
    prefill,
)

from .bounds import with_bound


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PAGEDATTN_CACHE", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


def shape(**changes):
    values = {"num_query_heads": 8, "num_kv_heads": 2, "head_size": 128, "block_size": 16}
    return AttentionShape("test", (1, 1), (7, 40), **(values | {"dtype": "float16"} | changes))


@pytest.mark.usefixtures("cache_folder", "nvrtc")
@pytest.mark.parametrize(
    ("head_size", "kv_bytes", "columns", "many"),
    [
        *((head_size, 2, 4, True) for head_size in decode_calls.HEAD_SIZES),
        *((64, 2, 4, False), (64, 1, 4, False), (96, 1, 4, False), (256, 1, 16, False)),
        *((128, 2, 16, True), (128, 2, 32, False), (128, 1, 32, False)),
    ],
)
def test_every_cut_compiles_and_fits_shared_memory(head_size, kv_bytes, columns, many):
    config = decode_config.choose_config(head_size, kv_bytes, columns, programs=2 if many else 1)
    macros = decode_config.macros_of(
        config, head_size=head_size, kv_bytes=kv_bytes, group=4, bf16=True, block_size=16
    )
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
    config = decode_config.choose_config(128, 2, 4, block_size=block_size, programs=programs)
    assert config.programs == programs
    macros = decode_config.macros_of(
        config,
        head_size=128, kv_bytes=2, group=4, bf16=False, block_size=block_size, features=features,
        out_f32="not_causal" in features, among_longer="among_longer" in features,
    )  # fmt: skip
    cubin = compiler.compile_kernel("decode.cu", dict(macros))
    (path,) = cache_folder.iterdir()
    assert path.read_bytes() == cubin


def shared_bytes_of(config, head_size, kv_bytes, block_size):
    """Bytes of `Shared` of decode_work.cuh, and 1024 to align it, at most."""
    blocks = max(1, config.tile // block_size)
    producers = decode_config.producers_of(
        config, head_size=head_size, kv_bytes=kv_bytes, block_size=block_size
    )
    return (
        config.stages * 2 * config.tile * head_size * kv_bytes
        + decode_config.WARPS * 8 * (head_size + 4) * 4  # sums
        + 2 * 2 * decode_config.WARPS * config.columns * 4  # peaks and totals
        + producers * max(32, 16 * blocks) * 4  # the block table
        + 24 * (1 if config.programs == 2 else config.columns * head_size // 4 + 32)  # sent
        + decode_config.WARPS * 2 * 36  # cuts
        + config.stages * 2 * 8  # barriers
        + 2 * 1024
    )


@pytest.mark.parametrize("block_size", [2**i for i in range(9)])
@pytest.mark.parametrize("head_size", decode_calls.HEAD_SIZES)
def test_every_cut_of_every_block_size_is_one_that_the_kernel_takes(head_size, block_size):
    for kv_bytes, columns, programs, tokens_a_program, max_kv_length in itertools.product(
        (1, 2), range(1, 33), (1, 2), (0, 64, 1000, 1 << 30), (1, 100, 1 << 30)
    ):
        if min(block_size, 16) * head_size * kv_bytes % 128:
            continue  # not taken
        if columns * head_size > decode_config.MAX_ACCUMULATORS:
            continue  # not taken
        config = decode_config.choose_config(
            head_size, kv_bytes, columns,
            block_size=block_size, programs=programs,
            tokens_a_program=tokens_a_program, max_kv_length=max_kv_length,
        )  # fmt: skip
        assert columns <= config.columns
        assert config.tile in (16, 32, 64)
        assert config.programs in (1, programs)
        assert 0 < config.stages <= decode_config.MAX_STAGES
        assert config.stages % decode_config.WARPS == 0
        # a lane of the producer has a block, and a tile is not asked for by too many instructions
        assert block_size == 1 or config.tile <= decode_config.MAX_BOXES * block_size
        assert min(config.tile, block_size) * head_size * kv_bytes % 128 == 0 or block_size == 1
        assert shared_bytes_of(config, head_size, kv_bytes, block_size) <= config.shared_bytes


PROGRAMS = {
    "short, of one length": ((8, 40, 64, True), 2),
    "for one on each": ((33, 4, 64, True), 1),
    "two for one of them": ((133, 1, 64, True), 2),
    "not that short": ((8, 40, 129, True), 1),
    "short, of any length": ((32, 8, 128, False), 2),
    "fewer of any length": ((51, 5, 128, False), 1),
    "longer, of any length": ((33, 8, 129, False), 1),
    "long, of any length": ((40, 8, 500, False), 2),
    "few long ones": ((24, 8, 4000, True), 1),
    "many that are not long": ((128, 8, 130, False), 2),
    "even for both": ((64, 8, 4000, True), 2),
    "even for neither": ((40, 8, 1000, True), 2),
    "even for one program alone": ((24, 16, 1000, True), 1),
    "if they differ": ((24, 16, 1000, False), 2),
    "not even where five heads are read side by side": ((79, 5, 1000, True), 2),
    "even for one program alone, of very many": ((1152, 1, 800, True), 1),
    "even for both, of very many": ((1280, 1, 800, True), 2),
}
"""Sequences, KV heads, tokens of a sequence, whether they are even; programs of each of 132
multiprocessors, over 16-bit heads of 128."""


def programs_for(case, **kinds):
    num_sequences, num_kv_heads, tokens, is_even = case
    return decode_config.programs_for(
        num_sequences, num_kv_heads, 132,
        row_bytes=tokens * 2 * 128 * 2,
        tokens_a_program=num_sequences * num_kv_heads * tokens // 132,
        is_even=is_even,
        **kinds,
    )  # fmt: skip


@pytest.mark.parametrize("case", PROGRAMS)
def test_rows_that_are_many_or_short_take_two_programs_on_a_multiprocessor(case):
    of, expected = PROGRAMS[case]
    assert programs_for(of) == expected
    if case.startswith(("short", "two")):
        assert programs_for(of, ends_fast=False) == 1


@pytest.mark.parametrize(
    ("head_size", "columns", "block_size", "expected"),
    [
        *((128, 8, 16, True), (192, 8, 2, True), (256, 8, 16, False), (128, 9, 16, False)),
        *((96, 16, 16, True), (96, 17, 16, False), (128, 8, 1, False)),
    ],
)
def test_two_programs_end_rows_fast_where_registers_suffice(
    head_size, columns, block_size, expected
):
    assert decode_config.ends_rows_fast(head_size, columns, block_size) == expected


def test_more_is_in_flight_over_heads_of_64_where_a_multiprocessor_has_one_program():
    assert decode_config.choose_config(64, 2, 4) == decode_config.DecodeConfig(8, 64, 12, 1)
    assert decode_config.choose_config(64, 2, 4, programs=2) == decode_config.DecodeConfig(
        8, 64, 4, 2
    )
    assert decode_config.choose_config(128, 2, 4) == decode_config.DecodeConfig(8, 64, 4, 1)


@pytest.mark.parametrize(
    ("columns", "head_size", "kv_bytes", "programs", "copying"),
    [
        (4, 128, 2, 2, 4),
        (16, 128, 2, 2, 2),  # whose sums need more registers, as the following
        (4, 192, 2, 2, 2),
        (4, 128, 1, 2, 2),
        (16, 128, 2, 1, 4),
    ],
)
def test_warps_that_copy_blocks_of_one_leave_registers_to_those_that_multiply(
    columns, head_size, kv_bytes, programs, copying
):
    config = decode_config.choose_config(
        head_size, kv_bytes, columns, block_size=1, programs=programs
    )
    assert config.programs == programs
    for block_size, expected in ((1, copying), (2, 1), (16, 1)):
        assert expected == decode_config.producers_of(
            config, head_size=head_size, kv_bytes=kv_bytes, block_size=block_size
        )


def test_less_is_in_flight_over_heads_of_128_where_some_multiprocessors_share_a_path():
    choose = partial(decode_config.choose_config, 128, 2, 4, max_kv_length=2048)
    assert choose(shares_paths=True) == decode_config.DecodeConfig(8, 16, 8, 1)
    assert choose(shares_paths=False) == decode_config.DecodeConfig(8, 64, 4, 1)
    assert choose(shares_paths=True, block_size=1) == choose(block_size=1)
    many = partial(choose, programs=2)
    assert many(shares_paths=True) == many()
    for head_size, kv_bytes in ((64, 2), (96, 2), (256, 2), (128, 1), (256, 1)):
        other = partial(decode_config.choose_config, head_size, kv_bytes, 4)
        assert other(shares_paths=True) == other()


@pytest.mark.usefixtures("nvrtc")
def test_a_compiled_kernel_is_read_from_the_cache(cache_folder):
    macros = decode_config.macros_of(
        decode_config.choose_config(64, 2, 4),
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
        decode_config.choose_config(64, 2, 4),
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


@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 5, 8, 12, 40])
@pytest.mark.parametrize("num_programs", [114, 132, 264])
def test_heads_go_to_neighbouring_programs_where_few_are_left_without_work(
    num_kv_heads, num_programs
):
    parallel = decode_config.heads_in_parallel(num_kv_heads, num_programs)
    assert num_kv_heads % parallel == 0
    assert num_programs % parallel <= num_programs / 20


@pytest.mark.parametrize(
    ("num_kv_heads", "num_programs", "parallel"),
    [(8, 132, 8), (3, 132, 3), (12, 132, 12), (40, 132, 10), (40, 264, 20), (52, 132, 26)],
)
def test_as_many_heads_as_possible_are_read_side_by_side(num_kv_heads, num_programs, parallel):
    assert decode_config.heads_in_parallel(num_kv_heads, num_programs) == parallel


def ranges_of(num_sequences, num_kv_heads, kv_length, num_programs=132):
    heads = decode_config.heads_in_parallel(num_kv_heads, num_programs)
    rows = num_sequences * num_kv_heads // heads
    row_bytes = 2 * kv_length * 128 * 2
    return decode_config.ranges_of(rows, heads, num_programs, kv_length, row_bytes), rows, heads


@pytest.mark.parametrize("num_programs", [114, 132])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 4, 5, 8, 40])
@pytest.mark.parametrize("num_sequences", [1, 2, 3, 7, 200])
def test_few_rows_are_cut_into_no_more_parts_than_are_merged_at_once_nor_into_tiny_ones(
    num_sequences, num_kv_heads, num_programs
):
    for kv_length in (1, 95, 300, 1000, 5000, 40_000, 10**6):
        ranges, rows, heads = ranges_of(num_sequences, num_kv_heads, kv_length, num_programs)
        all_ranges = num_programs // heads
        assert 1 <= ranges <= all_ranges
        if ranges == all_ranges:
            continue
        assert ranges <= decode_config.MOST_PARTS * rows
        assert ranges == rows or kv_length * rows >= decode_config.LEAST_OF_PART * ranges
        # who works must not take much longer to read
        paths = ranges * heads * decode_config.PATH_RATE
        slower = rows * heads * 512 * kv_length / paths
        assert paths >= decode_config.READ_RATE or slower < 4e-6


@pytest.mark.parametrize(
    ("num_sequences", "num_kv_heads", "kv_length", "ranges"),
    [
        *((1, 8, 128, 1), (1, 8, 1024, 10), (1, 8, 8192, 16), (1, 4, 4096, 20), (2, 4, 8192, 33)),
        *((1, 1, 4096, 20), (1, 1, 131_072, 132), (64, 8, 64, 16)),
    ],
)
def test_few_rows_have_these_ranges_and_many_have_all(
    num_sequences, num_kv_heads, kv_length, ranges
):
    assert ranges_of(num_sequences, num_kv_heads, kv_length)[0] == ranges


@pytest.mark.parametrize(
    ("queries", "heads", "changes", "launcher"),
    [
        (1, (8, 2), {}, decode.DecodeLaunch),
        (4, (8, 2), {}, decode.DecodeLaunch),
        (5, (8, 2), {}, prefill.PrefillLaunch),
        (5, (8, 2), {"head_size": 64}, decode.DecodeLaunch),
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
    config = decode_config.choose_config(64, 2, heads[0] // heads[1], programs=programs)
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
        config = decode_config.choose_config(128, 2, 4, programs=programs)
        assert config.programs == programs
        launch = decode.DecodeLaunch(call, config)
        for _ in range(2):
            call.out.fill_(torch.nan)
            launch(call)
            check_attention(call.out, inputs)
