"""Which calls the Hopper prefill kernel takes, and that it compiles for them: without a GPU."""

import dataclasses

import pytest
import torch

from pagedattn.attention import cuda
from pagedattn.attention.cuda.compiler import compile_kernel
from pagedattn.attention.cuda.prefill import HEAD_SIZES, not_taken
from pagedattn.attention.cuda.prefill_config import Cut, macros_of

from .prefill_inputs import CACHES, FEATURES, HEADS, RAGGED, inputs_of


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"dtype": "float32"}, "queries of torch.float32"),
        ({"kv_dtype": None, "dtype": "float32"}, "queries of torch.float32"),
        ({"head_size": 72}, "head_size 72"),
        ({"block_size": 12}, "block_size 12"),
        ({"block_size": 48}, "block_size 48"),
    ],
    ids=str,
)
def test_what_the_kernel_cannot_take_over_fp8_is_told(changes, phrase):
    options = {"kv_dtype": CACHES["fp8"], "device": "cpu", **changes}
    assert phrase in not_taken(inputs_of(RAGGED, **options).call())


def test_parts_of_shared_blocks_are_not_taken_of_more_heads_than_a_tile_has_rows(monkeypatch):
    monkeypatch.setitem(HEADS, "group129", (129, 1))
    call = inputs_of(RAGGED, "group129", device="cpu").call()
    assert not_taken(call) is None
    assert "129 query heads a KV head" in not_taken(dataclasses.replace(call, causal=False))


@pytest.mark.parametrize(
    ("queries", "head_size", "kv_dtype", "phrase"),
    [
        ((1, 1), 80, CACHES["fp8"], "short queries, which wait for memory"),
        ((1, 1), 128, CACHES["fp8"], "short queries, which wait for memory"),
        ((300, 1), 80, CACHES["fp8"], None),
        ((300, 1), 80, None, "which is not multiplied in fp8"),
    ],
)
def test_products_of_fp8_are_for_prompts_and_chunks_over_fp8(
    queries, head_size, kv_dtype, phrase, monkeypatch
):
    monkeypatch.setattr(cuda, "unavailable", lambda _: None)
    lengths = (queries, (300, 40))
    call = inputs_of(lengths, head_size=head_size, kv_dtype=kv_dtype, device="cpu").call()
    refused = cuda.CudaFp8Implementation().unsupported(call)
    assert refused is None if phrase is None else phrase in refused


@pytest.mark.parametrize(
    ("queries", "heads", "kv_dtype", "taken"),
    [
        ((1, 1), "mqa", CACHES["fp8"], False),
        ((16, 1), "gqa", CACHES["fp8"], False),
        ((17, 1), "gqa", CACHES["fp8"], True),
        ((1, 1), "mqa", None, True),
    ],
)
def test_short_parts_over_fp8_go_to_who_reads_them_with_all_programs(
    queries, heads, kv_dtype, taken
):
    lengths = (queries, (300, 40))
    call = inputs_of(lengths, heads, head_size=80, kv_dtype=kv_dtype, device="cpu").call()
    assert not_taken(call) is None  # whose keys are shared out
    part = dataclasses.replace(call, causal=False)
    assert (not_taken(part) is None) is taken


def test_a_cache_of_the_other_16_bits_is_not_taken():
    call = inputs_of(RAGGED, device="cpu").call()
    assert "a cache of torch.bfloat16" in not_taken(
        dataclasses.replace(call, query=call.query.half(), out=call.out.half())
    )


@pytest.fixture
def compiles(request):
    """Function of macros that compiles the kernel anew, and says whether machine code came out."""
    pytest.importorskip("cuda.bindings.nvrtc")
    for name in ("nvrtc", "cache_folder"):
        request.getfixturevalue(name)

    def compile_anew(macros, source="prefill.cu"):
        return compile_kernel(source, dict(macros)).startswith(b"\x7fELF")

    return compile_anew


CUTS = [(head_size, kv_dtype) for head_size in (80, 128, 256) for kv_dtype in CACHES.values()]


@pytest.mark.parametrize(
    ("head_size", "kv_dtype", "features"),
    [
        *((*cut, "plain") for cut in CUTS),
        *((head_size, CACHES["fp8"], "plain") for head_size in (64, 96, 192)),
        *(
            pytest.param(*cut, features, marks=() if cut[0] == 128 else pytest.mark.nightly)
            for cut in CUTS
            for features in ("all", "part")
        ),
    ],
)
def test_the_kernel_compiles(head_size, kv_dtype, features, compiles):
    options = {"causal": False, "soft_cap": 2.0} if features == "part" else FEATURES[features]
    call = inputs_of(RAGGED, head_size=head_size, kv_dtype=kv_dtype, device="cpu", **options).call()
    if features == "part":
        call = dataclasses.replace(
            call, out=call.out.float(), lse=torch.empty(call.query.shape[:2])
        )
    assert not_taken(call) is None
    assert compiles(macros_of(call))
    if features == "all":
        assert compiles(macros_of(call, is_split=True))
    if features == "part":  # what is each sequence's own, beside it
        assert compiles(macros_of(dataclasses.replace(call, causal=True), is_split=True))
    if kv_dtype is not None:
        assert compiles(macros_of(call, fp8_products=True))


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_what_merges_shares_compiles(head_size, compiles):
    sizes = (("HEAD_SIZE", head_size), ("KV_TILE", 128))
    for is_on in (0, 1):
        options = ((name, is_on) for name in ("BF16", "OUT_F32", "SINKS", "LSE"))
        assert compiles((*sizes, *options), "prefill_merge.cu")


@pytest.mark.parametrize(
    ("head_size", "cut"),
    [
        (64, Cut(3, 64)),
        (128, Cut(2, 64, 2)),
        pytest.param(64, Cut(2, 64), marks=pytest.mark.nightly),
        pytest.param(64, Cut(2, 128), marks=pytest.mark.nightly),
    ],
)
def test_tiles_of_every_size_compile(head_size, cut, compiles):
    call = inputs_of(RAGGED, head_size=head_size, device="cpu", window=150).call()
    assert compiles(macros_of(call, cut))
