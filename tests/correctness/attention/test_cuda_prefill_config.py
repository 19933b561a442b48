"""How the prefill kernel is cut: tiles, shares of keys, heads that are worked on together."""

from types import SimpleNamespace

import pytest
import torch

from pagedattn.attention.cuda.decode_config import SHARED_BYTES
from pagedattn.attention.cuda.prefill import HEAD_SIZES
from pagedattn.attention.cuda.prefill_choice import (
    Items,
    cut_of,
    divided,
    head_parts_of,
    prices_of,
    splits_of,
)
from pagedattn.attention.cuda.prefill_config import (
    Cut,
    section_heads,
    shared_bytes_of,
    usual_cut,
)


def call_of(queries, kv_length, *, heads=(32, 8), head_size=128, dtype=torch.bfloat16, **options):
    inputs = SimpleNamespace(
        query=torch.empty((sum(queries), heads[0], head_size), device="meta"),
        cache=SimpleNamespace(head_size=head_size, num_kv_heads=heads[1], dtype=dtype),
        batch=SimpleNamespace(
            num_sequences=len(queries),
            max_query_length=max(queries),
            expected_kv_length=kv_length,
        ),
    )
    call = SimpleNamespace(**vars(inputs), out=inputs.query, causal=True, window=None)
    vars(call).update(options)
    return call


@pytest.mark.parametrize(
    ("queries", "kv_length", "options", "splits"),
    [
        ((512,), 8192, {}, 1),  # an item for each of 128 programs
        ((544,), 8192, {}, 4),  # a few more
        ((256,), 32_768, {}, 2),
        ((128,), 16_384, {}, 4),
        ((128,), 16_384, {"window": 300}, 1),  # few tiles of keys
        ((128,), 16_384, {"causal": False}, 1),  # a part of shared blocks
        ((256,), 256, {}, 1),  # a prompt
        ((64,) * 64, 8192, {}, 1),  # who is done first takes what is left
        ((8,) * 4, 8192, {}, 4),
    ],
)
def test_keys_are_shared_out_where_query_tiles_are_few(queries, kv_length, options, splits):
    assert splits_of(call_of(queries, kv_length, **options), num_programs=132) == splits


@pytest.mark.parametrize(
    ("queries", "kv_length", "heads", "splits", "parts"),
    [
        ((64,), 28_291, (48, 1), 5, 2),  # 26 tiles of 120 rows, where 32 of 96 would be
        ((7,), 28_238, (48, 1), 37, 3),  # three of 112, where four of 96 would be
        ((20,), 9000, (32, 8), 15, 1),
    ],
)
def test_heads_are_divided_as_suits_the_shares_of_keys(queries, kv_length, heads, splits, parts):
    call = call_of(queries, kv_length, heads=heads)
    assert splits_of(call, 132) == splits
    cut, _ = divided(call, 132, None, usual_cut(call), splits=splits)
    assert cut.head_parts == parts


OF_64 = {"heads": (64, 8), "head_size": 64}
FP8 = {"dtype": torch.float8_e4m3fn}


@pytest.mark.parametrize(
    ("queries", "kv_length", "options", "cut"),
    [
        ((8192,), 8192, {}, (2, 128)),
        ((8192,), 8192, FP8, (2, 128)),
        ((8192,), 8192, {"window": 4096}, (2, 128)),
        ((8192,), 8192, {"window": 128}, (2, 64)),  # 32 queries see two tiles of 128, or three
        ((8192,), 8192, {"window": 128} | FP8, (2, 64)),
        ((256,) * 32, 256, {}, (2, 64)),  # of four tiles of keys two and a half are seen
        ((512,), 8192, {}, (2, 128)),
        ((8192,), 8192, {"head_size": 256, "heads": (16, 8)}, (2, 64)),
        ((8192,), 8192, {"head_size": 256, "heads": (16, 8), "window": 128}, (2, 64)),
        ((256,) * 32, 256, {"causal": False}, (2, 128)),  # parts of shared blocks
        ((8192,), 8192, OF_64, (3, 128)),
        ((8192,), 8192, OF_64 | FP8, (2, 128)),
        ((8192,), 8192, OF_64 | {"window": 128}, (3, 64)),
        ((512,), 16_384, OF_64 | {"window": 128}, (2, 64)),  # 176 items or 256, for 132 programs
        ((512,), 4096, OF_64 | {"heads": (32, 8)}, (2, 128)),  # 88 or 128
        # 128 queries that begin with a tile of keys see two of 128
        ((512,), 4096, OF_64 | {"heads": (32, 32), "window": 128}, (2, 128)),
        ((0, 0), 0, {}, (2, 64)),  # no tokens
        ((512,), 8, {}, (2, 64)),  # fewer keys than the queries are likely
        ((300,), 300, OF_64 | {"heads": (160, 1)}, (3, 64, 5)),  # six tokens of 32 heads
        # where tokens of all heads would not fill a tile
        ((8192,), 8192, {"heads": (48, 1)}, (2, 128, 3)),
        ((8192,), 8192, {"heads": (96, 8), "head_size": 192}, (2, 64, 3)),
        ((8192,), 8192, OF_64 | {"heads": (71, 1)}, (3, 128, 3)),
        ((8192,), 8192, {"heads": (300, 1)}, (2, 128, 75)),  # nor one of them a tile
        ((8192,), 8192, {"heads": (28, 4)}, (2, 128, 7)),  # 18 of 7 heads are 126 of 128 rows,
        ((2048,), 16_384, {"heads": (28, 4)}, (2, 128)),  # an item more for some, or for others
        ((40, *(1,) * 300), 8192, {"heads": (48, 1)}, (2, 128)),  # most have one token
        ((20,), 8192, {"heads": (48, 1)}, (2, 128)),  # an item a program whatever is done
    ],
)
def test_tiles_are_of_the_size_that_takes_the_least_time(queries, kv_length, options, cut):
    assert cut_of(call_of(queries, kv_length, **options), num_programs=132) == Cut(*cut)


def test_a_mixed_batch_is_cut_by_its_long_queries():
    mixture = SimpleNamespace(
        num_long=4, most_long_queries=256, long_query_tokens=1024, longest_long_kv=256
    )
    call = call_of((256,) * 4 + (1,) * 500, 16_384, **OF_64)
    assert cut_of(call, 132) == Cut(2, 128)
    assert cut_of(call, 132, mixture) == Cut(3, 64)


@pytest.mark.parametrize(
    ("group", "rows", "parts"),
    [
        (4, 128, (1,)),
        (7, 128, (1, 7)),  # 18 tokens of 7 heads are 126
        (48, 128, (1, 2, 3)),  # 2 tokens are 96, 5 of 24 heads 120
        (71, 192, (1, 2, 3, 71)),  # of 71 heads 24, 24 and 23
        (71, 128, (1, 2, 3, 4, 9, 71)),
        (128, 128, (1,)),
        (300, 128, (3, 5, 12, 19, 75)),
    ],
)
def test_each_way_to_divide_heads_fills_tiles_better_and_leaves_no_part_empty(group, rows, parts):
    assert head_parts_of(group, rows) == parts
    for each in parts:
        cut = Cut(rows // 64, 128, each)
        assert (each - 1) * cut.heads(group) < group <= each * cut.heads(group)
        assert cut.heads(group) * cut.tokens(group) <= rows


@pytest.mark.parametrize("kv_tile", [64, 128])
@pytest.mark.parametrize("heads", [(32, 32), (32, 8), (9, 3), (64, 1)])
@pytest.mark.parametrize(
    ("queries", "kv_length", "window"),
    [
        *((2048, 2048, None), (512, 4096, None), (2048, 2048, 300), (512, 4096, 100)),
        *((64, 64, 300), (1, 1, None), (200, 200, None), (8192, 8192, 128), (300, 1001, 1)),
    ],
)
def test_tiles_of_keys_are_counted_as_programs_find_them(
    queries, kv_length, window, heads, kv_tile
):
    call = call_of((queries,), kv_length, heads=heads, window=window)
    items = Items.of(call, 132, None, Cut(2, kv_tile))
    tokens = 2 * 64 // (heads[0] // heads[1])
    seen = []
    for first in range(kv_length - queries, kv_length, tokens):
        begin = 0 if window is None else max(0, first + 1 - window)
        seen.append(-(-min(first + tokens, kv_length) // kv_tile) - begin // kv_tile)
    assert items.mean_kv_tiles == pytest.approx(sum(seen) / len(seen))
    assert max(seen) - 1 <= items.kv_tiles <= max(seen) + 1


@pytest.mark.parametrize("options", [{}, OF_64, {"window": 700}, OF_64 | {"window": 300}], ids=str)
def test_other_tiles_have_to_save_more_than_estimates_are_off(options):
    others = 0
    for length in range(64, 8192, 136):
        for count in (1, 3, 40):
            call = call_of((length,) * count, length, **options)
            usual, chosen = (
                Items.of(call, 132, None, cut).seconds_at(prices_of(call)[cut])
                for cut in (usual_cut(call), cut_of(call, 132))
            )
            saved = 1 - chosen / usual
            others += saved > 0
            assert saved == 0 or saved >= (0.03 if usual < 1e-4 else 0.07)
    assert others > 10


@pytest.mark.parametrize("window", [None, 1000, 3000])
def test_long_prompts_are_cut_as_usual_whatever_their_length(window):
    for length in range(2048, 9000, 64):
        call = call_of((length,), length, window=window, **OF_64)
        assert cut_of(call, 132) == usual_cut(call)


@pytest.mark.parametrize(
    ("num_kv_heads", "head_bytes", "heads"),
    [(8, 4 << 20, 8), (8, 16 << 20, 4), (6, 16 << 20, 3), (8, 1 << 30, 1), (7, 16 << 20, 1)],
)
def test_as_many_heads_are_worked_on_together_as_fit_and_divide(num_kv_heads, head_bytes, heads):
    assert section_heads(num_kv_heads, head_bytes) == heads


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_a_program_fits_in_a_multiprocessors_shared_memory(head_size):
    for dtype, by_fp8 in ((torch.bfloat16, False), *((FP8["dtype"], by) for by in (False, True))):
        call = call_of((512,), 1024, head_size=head_size, dtype=dtype)
        for cut in (usual_cut(call), *prices_of(call)):
            assert shared_bytes_of(call, cut, fp8_products=by_fp8) <= SHARED_BYTES
