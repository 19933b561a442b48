"""Attention shapes: their bytes, their operations and their names."""

import dataclasses

import pytest

from pagedattn.config import ConfigError
from pagedattn.workloads import (
    ALL_SHAPES,
    CONTIGUOUS,
    CPU_DECODE,
    CPU_PREFILL,
    DECODE,
    FP8,
    HEAD_SIZES,
    MIXED,
    PAGED,
    PREFILL,
    SHARED,
    AttentionShape,
    find_shape,
    shape_of_name,
)

BY_NAME = {shape.name: shape for shape in ALL_SHAPES}


def shape_of(query_lengths, kv_lengths, **changes):
    return AttentionShape("any", tuple(query_lengths), tuple(kv_lengths), **changes)


def test_names_are_unique_and_find_their_shape():
    assert len(BY_NAME) == len(ALL_SHAPES)
    for name, shape in BY_NAME.items():
        assert find_shape(name) is shape
    with pytest.raises(ValueError, match=r"shape must be one of .*decode-B64-4k.*, not 'decode'"):
        find_shape("decode")


def test_what_a_name_says_is_its_shape():
    said = {name: shape_of_name(name) for name in BY_NAME}
    assert [name for name, shape in said.items() if shape not in (None, BY_NAME[name])] == []
    unsaid = {name for name, shape in said.items() if shape is None}
    ours = {name for name in unsaid if "cpu" not in name and "figure18a" not in name}
    # lengths that differ, what is shared, and controls without paging
    odd = ("uniform", "ragged", "mixed", "shared", "contiguous")
    assert all(any(word in name for word in odd) for name in ours)
    assert len(unsaid) < len(said) / 2


@pytest.mark.parametrize(
    ("name", "queries", "context", "changes"),
    [
        ("decode-B3-700-h28x4", (1,) * 3, 700, {"num_query_heads": 28, "num_kv_heads": 4}),
        ("verify5-B2-1k-d64-block32", (5,) * 2, 1024, {"head_size": 64, "block_size": 32}),
        ("prefill-2x300-fp8", (300,) * 2, 300, {"kv_dtype": "float8_e4m3"}),
        ("chunk-1k-over-3000", (1024,), 3000, {}),
        ("prefill-300-window1k", (300,), 300, {"window": 1024}),
        ("verify2-B1-1k-cap50", (2,), 1024, {"soft_cap": 50.0}),
        ("chunk-1-over-9-alibi", (1,), 9, {"alibi": True}),
        (
            "decode-B2-8k-h64x8-d64-block32-window128-cap30-alibi-sinks-fp8",
            (1,) * 2,
            8192,
            {
                "num_query_heads": 64,
                "head_size": 64,
                "block_size": 32,
                "window": 128,
                "soft_cap": 30.0,
                "alibi": True,
                "sinks": True,
                "kv_dtype": "float8_e4m3",
            },
        ),
    ],
)
def test_any_shape_has_a_name(name, queries, context, changes):
    expected = shape_of(queries, (context,) * len(queries), **changes)
    assert find_shape(name) == dataclasses.replace(expected, name=name)


@pytest.mark.parametrize(
    "name",
    [
        *("decode-B0-1k", "decode-B2-1K", "decode-2k", "prefill-1x", "chunk-2k", "decode-B1-1k-d0"),
        *("prefill-1k-window0", "prefill-1k-window", "prefill-1k-cap0", "prefill-1k-cap2.5"),
        # in another order
        *("prefill-1k-fp8-sinks", "prefill-1k-cap50-window1k", "prefill-1k-sinks-alibi"),
        "prefill-1k-window1k-block32",
    ],
)
def test_a_name_that_says_no_shape_is_refused(name):
    assert shape_of_name(name) is None
    with pytest.raises(ValueError, match=r"or be named like decode-B16-2k, verify4"):
        find_shape(name)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("decode-B1-1k-h10x4", "multiple"), ("chunk-2k-over-1k", "at most kv_lengths")],
)
def test_a_name_that_says_what_cannot_be_is_told_why(name, sentence):
    with pytest.raises(ConfigError, match=sentence):
        find_shape(name)


@pytest.mark.parametrize(
    ("query_lengths", "kv_lengths", "kind"),
    [
        ((1, 1), (1, 7), "decode"),
        ((1,), (1,), "decode"),
        ((7, 1), (7, 1), "prefill"),
        ((4,), (7,), "mixed"),
        ((7, 1), (7, 2), "mixed"),
    ],
)
def test_the_kind_follows_from_the_lengths(query_lengths, kv_lengths, kind):
    assert shape_of(query_lengths, kv_lengths).kind == kind


@pytest.mark.parametrize(
    ("shapes", "kind"),
    [
        (DECODE, "decode"),
        (CPU_DECODE, "decode"),
        (PREFILL, "prefill"),
        (CPU_PREFILL, "prefill"),
        (MIXED, "mixed"),
        (SHARED, "decode"),
        (PAGED, "decode"),
    ],
    ids=["DECODE", "CPU_DECODE", "PREFILL", "CPU_PREFILL", "MIXED", "SHARED", "PAGED"],
)
def test_each_list_holds_its_kind(shapes, kind):
    assert {shape.kind for shape in shapes} == {kind}


def test_each_kind_is_there_over_fp8_too_with_its_operations_and_half_its_bytes():
    assert {shape.kind for shape in FP8} == {"decode", "prefill", "mixed"}
    for narrow in FP8:
        wide = BY_NAME[narrow.name.removesuffix("-fp8")]
        assert dataclasses.replace(narrow, name=wide.name, kv_dtype=None) == wide
        assert (narrow.flops, 2 * narrow.kv_bytes) == (wide.flops, wide.kv_bytes)


@pytest.mark.parametrize("query_length", [1, 2, 5])
@pytest.mark.parametrize("kv_length", [5, 8])
def test_operations_count_the_keys_that_each_query_sees(query_length, kv_length):
    first = kv_length - query_length
    keys_seen = sum(
        1 for query in range(first, kv_length) for key in range(kv_length) if key <= query
    )
    shape = shape_of(
        (query_length, 1), (kv_length, 3), num_query_heads=4, num_kv_heads=2, head_size=32
    )
    assert shape.flops == 4 * 32 * 4 * (keys_seen + 3)


@pytest.mark.parametrize("window", [1, 2, 5, 7, 8, 9])
@pytest.mark.parametrize("lengths", [(1, 8), (3, 8), (8, 8), (1, 1), (2, 5)], ids=str)
def test_under_a_window_bytes_and_operations_count_what_queries_see(lengths, window):
    query_length, kv_length = lengths
    seen = [
        (query, key)
        for query in range(kv_length - query_length, kv_length)
        for key in range(kv_length)
        if query - window < key <= query
    ]
    shape = shape_of((query_length, 1), (kv_length, 20), window=window)
    tokens = len({key for _, key in seen}) + window
    assert shape.kv_bytes == tokens * 2 * 8 * 128 * 2
    assert shape.flops == 4 * 128 * 32 * (len(seen) + window)


def test_a_window_that_hides_nothing_and_other_options_change_neither_bytes_nor_operations():
    plain = shape_of((1, 4), (9, 7))
    for options in ({"window": 9}, {"soft_cap": 50, "alibi": True, "sinks": True}):
        shape = dataclasses.replace(plain, **options)
        assert (shape.kv_bytes, shape.flops) == (plain.kv_bytes, plain.flops)


@pytest.mark.parametrize(
    ("dtype", "item_bytes"), [("bfloat16", 2), ("float32", 4), ("float8_e4m3", 1)]
)
def test_bytes_count_each_tokens_k_and_v_once_whatever_the_block(dtype, item_bytes):
    for block_size in (1, 256):
        shape = shape_of((1, 2), (5, 6), dtype=dtype, block_size=block_size)
        assert shape.kv_bytes == 11 * 2 * 8 * 128 * item_bytes


@pytest.mark.parametrize(("shared", "tokens"), [(0, 120), (16, 88), (32, 56)])
def test_bytes_count_a_shared_prefix_once(shared, tokens):
    shape = shape_of((1,) * 3, (40,) * 3, shared_prefix=shared)
    assert shape.kv_bytes == tokens * 2 * 8 * 128 * 2


def test_keys_and_values_may_be_fp8_beside_queries_that_are_not():
    shape = shape_of((1, 2), (5, 6), dtype="float16", kv_dtype="float8_e4m3")
    assert shape.cache_dtype == "float8_e4m3"
    assert shape.kv_bytes == 11 * 2 * 8 * 128
    assert shape_of((1,), (5,), dtype="float16").cache_dtype == "float16"
    with pytest.raises(ConfigError, match="kv_dtype must be one of float16, float8_e4m3, not 'fl"):
        shape_of((1,), (5,), dtype="float16", kv_dtype="float32")


def test_each_head_size_has_a_decode_step_and_a_prompt():
    kinds = [(shape.head_size, shape.kind) for shape in HEAD_SIZES]
    assert kinds == [
        (size, kind) for size in (64, 80, 96, 192, 256) for kind in ("decode", "prefill")
    ]


def test_a_contiguous_twin_differs_from_its_shape_in_the_block_alone():
    for twin in CONTIGUOUS:
        shape = BY_NAME[twin.name.removesuffix("-contiguous")]
        assert shape.block_size == 16
        assert twin.block_size == max(shape.kv_lengths)
        assert dataclasses.replace(twin, name=shape.name, block_size=16) == shape
    assert {twin.name for twin in CONTIGUOUS} > {f"{shape.name}-contiguous" for shape in PAGED}


def test_counts_follow_from_the_lengths():
    shape = find_shape("mixed-2k-at-8k+63x4k")
    assert shape.num_sequences == 64
    assert shape.num_query_tokens == 2048 + 63
    assert max(shape.kv_lengths) == 8192


@pytest.mark.parametrize(
    ("name", "num_bytes"),
    [
        ("decode-B1-1k", 4_194_304),
        ("decode-B16-512", 33_554_432),
        ("decode-B64-4k", 1_073_741_824),
        ("decode-B64-4k-block256", 1_073_741_824),
        ("decode-B16-2k-h40x40", 671_088_640),
        ("decode-B64-1k-h12x12-d64", 201_326_592),
        ("decode-B64-2k-h9x3-d64", 100_663_296),
        ("decode-B64-2k-h64x8", 536_870_912),
        ("decode-ragged-64k+127x512", 534_773_760),
        ("decode-B1-128k-h8x1", 67_108_864),
        ("decode-B4-8k-h8x1", 16_777_216),
        ("decode-B16-8k-h8x1", 67_108_864),
        ("verify4-B32-8k", 1_073_741_824),
        ("decode-B64-4k-fp8", 536_870_912),
        ("decode-B8-8k-fp8", 134_217_728),
        ("prefill-8k-fp8", 16_777_216),
        ("chunk-2k-over-16k-fp8", 33_554_432),
        ("shared-16k-B128", (16384 + 128 * 256) * 4096),
        ("shared-512-B8", (512 + 8 * 256) * 4096),
        ("shared-2k-B256", (2048 + 256 * 128) * 4096),
        ("figure18a-B32-256", 32 * 256 * 2 * 40 * 128 * 2),
    ],
)
def test_a_named_shape_reads_the_bytes_that_its_name_says(name, num_bytes):
    assert BY_NAME[name].kv_bytes == num_bytes


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [("prefill-8k", 0.549823), ("prefill-16x1k", 0.137573), ("chunk-2k-over-16k", 0.515413)],
)
def test_a_named_shape_does_the_operations_that_its_name_says(name, teraflops):
    assert BY_NAME[name].flops / 1e12 == pytest.approx(teraflops, rel=1e-5)


def test_block_size_heads_and_head_size_are_in_the_name_where_they_are_not_the_default():
    for shape in DECODE:
        assert (f"-block{shape.block_size}" in shape.name) == (shape.block_size != 16)
        assert (f"-d{shape.head_size}" in shape.name) == (shape.head_size != 128)
        heads = (shape.num_query_heads, shape.num_kv_heads)
        assert (f"-h{heads[0]}x{heads[1]}" in shape.name) == (heads != (32, 8))


def test_uniform_lengths_are_ragged_and_the_same_each_time():
    shape = find_shape("decode-B64-uniform-8k")
    assert len(set(shape.kv_lengths)) > 50
    assert 1 <= min(shape.kv_lengths) < 1000
    assert 7000 < max(shape.kv_lengths) <= 8192
    assert sum(shape.kv_lengths) == 267327
    short = find_shape("decode-B32-uniform-512")
    assert len(set(short.kv_lengths)) > 25
    assert 450 < max(short.kv_lengths) <= 512


def test_cpu_shapes_are_small_and_in_float32():
    for shape in CPU_DECODE + CPU_PREFILL:
        assert shape.dtype == "float32"
        assert shape.kv_bytes < 20e6
        assert shape.flops < 1e9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_lengths": (8,), "kv_lengths": (7,)}, "at most kv_lengths, not 8 for 7"),
        ({"query_lengths": (1, 1)}, "same sequences, 1 or more, not 2 and 1"),
        ({"query_lengths": (), "kv_lengths": ()}, "same sequences, 1 or more, not 0 and 0"),
        ({"kv_lengths": (True,)}, "each of kv_lengths must be a positive integer, not True"),
        ({"query_lengths": (0,)}, "each of query_lengths must be a positive integer, not 0"),
        ({"num_kv_heads": 3}, "num_query_heads must be a multiple of num_kv_heads, not 32 for 3"),
        ({"block_size": 0}, "block_size must be a positive integer, not 0"),
        ({"shared_prefix": 8}, "shared_prefix must be whole blocks of 16 tokens, not 8"),
        ({"shared_prefix": -16}, "shared_prefix must be whole blocks of 16 tokens, not -16"),
        ({"shared_prefix": True}, "shared_prefix must be whole blocks of 16 tokens, not True"),
        ({"shared_prefix": 16}, "leave each sequence its query tokens, at most 6 here, not 16"),
        ({"dtype": "int8"}, "dtype must be one of .* not 'int8'"),
        ({"window": 0}, "window must be a positive integer, not 0"),
        ({"window": 2.0}, "window must be a positive integer, not 2.0"),
        ({"soft_cap": 0.0}, "soft_cap must be a finite number above 0, not 0.0"),
        ({"soft_cap": float("inf")}, "soft_cap must be a finite number above 0, not inf"),
        ({"soft_cap": float("nan")}, "soft_cap must be a finite number above 0, not nan"),
        ({"soft_cap": True}, "soft_cap must be a finite number above 0, not True"),
        ({"soft_cap": "50"}, "soft_cap must be a finite number above 0, not '50'"),
        (
            {"kv_lengths": (40,), "shared_prefix": 16, "window": 8},
            "shared_prefix must be 0 where there is a window, not 16",
        ),
    ],
    ids=repr,
)
def test_a_shape_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(shape_of((1,), (7,)), **changes)
