"""How the prefill kernel is cut: tiles, shares of keys, heads that are worked on together."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pagedattn.attention.cuda import prefill_estimate
from pagedattn.attention.cuda.decode_config import SHARED_BYTES
from pagedattn.attention.cuda.decode_fits import H200
from pagedattn.attention.cuda.prefill import HEAD_SIZES
from pagedattn.attention.cuda.prefill_choice import (
    MOST_SHARED_BYTES,
    SPLITS,
    cut_of,
    head_parts_of,
    way_of,
    ways_to_divide,
)
from pagedattn.attention.cuda.prefill_config import (
    Cut,
    section_heads,
    shared_bytes_of,
    usual_cut,
)
from pagedattn.attention.cuda.prefill_estimate import (
    Estimate,
    Items,
    Work,
    prices_of,
    share_tiles_of,
)
from pagedattn.attention.known_lengths import KnownLengths


@pytest.fixture(autouse=True)
def on_an_h200(monkeypatch):
    monkeypatch.setattr(prefill_estimate, "fit_for", lambda _: H200)


def call_of(
    queries,
    kv_lengths,
    *,
    heads=(32, 8),
    head_size=128,
    dtype=torch.bfloat16,
    knows=True,
    **options,
):
    """A call whose tensors have no memory; `kv_lengths` are each sequence's, or of all of them."""
    if isinstance(kv_lengths, int):
        kv_lengths = (kv_lengths,) * len(queries)
    known = KnownLengths.of(np.array(queries), np.array(kv_lengths))
    query = torch.empty((sum(queries), heads[0], head_size), device="meta")
    return SimpleNamespace(
        query=query,
        out=query,
        cache=SimpleNamespace(head_size=head_size, num_kv_heads=heads[1], dtype=dtype),
        batch=SimpleNamespace(
            num_sequences=len(queries),
            max_query_length=max(queries),
            expected_kv_length=int(max(kv_lengths)),
            known_lengths=known if knows else None,
        ),
        **{"causal": True, "window": None} | options,
    )


def work_of(*args, **options):
    return Work.of(call_of(*args, **options))


@pytest.mark.parametrize(
    ("queries", "kv_lengths", "options", "splits"),
    [
        ((512,), 8192, {}, 1),  # an item for each of 128 programs
        ((128,), 16_384, {}, 4),
        ((128,), 16_384, {"window": 300}, 1),  # few tiles of keys
        ((128,), 16_384, {"causal": False}, 1),  # a part of shared blocks
        ((256,), 256, {}, 1),  # a prompt
        ((64,) * 64, 8192, {}, 1),  # who is done first takes what is left
        ((8,) * 4, 8192, {}, 4),
        # prompts and short decodes, none of which keeps the last programs waiting
        ((2048, 2048, *(1,) * 60), (2048, 2048, *(600,) * 60), {}, 1),
    ],
)
def test_keys_are_shared_out_where_query_tiles_are_few(queries, kv_lengths, options, splits):
    assert way_of(work_of(queries, kv_lengths, **options)).splits == splits


def test_the_longest_of_many_sequences_is_shared_out():
    drafts = (4,) * 40
    assert way_of(work_of(drafts, 1000)).splits == 1
    assert way_of(work_of(drafts, (9000, *(1000,) * 39))).splits > 1


@pytest.mark.parametrize("knows", [True, False])
def test_shares_take_no_more_memory_than_there_is_for_them(knows):
    queries = (1024,) * 16
    call = call_of(queries, 100_000, heads=(8, 1), knows=knows)
    call.out = torch.empty((200_000, 64, 128), device="meta")
    assert way_of(Work.of(call)).splits == 1


@pytest.mark.parametrize(
    ("queries", "kv_length", "heads", "parts"),
    [
        ((64,), 28_291, (48, 1), 2),  # tiles of 120 rows, where there would be of 96
        ((20,), 9000, (32, 8), 1),
    ],
)
def test_heads_are_divided_as_suits_the_shares_of_keys(queries, kv_length, heads, parts):
    way = way_of(work_of(queries, kv_length, heads=heads))
    assert way.splits > 1
    assert way.cut.head_parts == parts


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
        ((512,), 4096, OF_64 | {"heads": (32, 32), "window": 128}, (2, 64)),  # four, or two
        ((0, 0), 0, {}, (2, 128)),  # no tokens
        ((512,), 8, {}, (2, 64)),  # fewer keys than the queries are likely
        ((300,), 300, OF_64 | {"heads": (160, 1)}, (3, 128, 5)),  # six tokens of 32 heads
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
    assert cut_of(work_of(queries, kv_length, **options)).cut == Cut(*cut)


def test_a_mixed_batch_s_long_queries_are_cut_by_themselves():
    call = call_of((256,) * 4 + (1,) * 500, (256,) * 4 + (16_384,) * 500, **OF_64)
    assert cut_of(Work.of(call)).cut == Cut(3, 128)
    assert cut_of(Work.of(call, long_only=True)).cut == Cut(2, 64)


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


def counted(call, queries, kv_lengths, cut):
    """Of each item the tiles of keys that it sees, as programs find them."""
    tokens = cut.tokens(call.query.shape[1] // call.cache.num_kv_heads)
    found = []
    for count, length in zip(queries, kv_lengths, strict=True):
        for first in range(length - count, length, tokens):
            begin = 0 if call.window is None else max(0, first + 1 - call.window)
            found.append(-(-min(first + tokens, length) // cut.kv_tile) - begin // cut.kv_tile)
    return np.repeat(found, call.cache.num_kv_heads)


@pytest.mark.parametrize("kv_tile", [64, 128])
@pytest.mark.parametrize("heads", [(32, 32), (32, 8), (9, 3), (64, 1)])
@pytest.mark.parametrize("window", [None, 300, 3000])
@pytest.mark.parametrize("kind", ["drafts", "chunks", "prompts", "mixed"])
def test_items_and_their_tiles_of_keys_are_about_as_many_as_programs_find(
    kind, window, heads, kv_tile
):
    rng = np.random.default_rng(1)
    size = 30
    queries = {
        "drafts": np.full(size, 5),
        "chunks": np.full(size, 256),
        "prompts": rng.integers(200, 4000, size),
        "mixed": rng.permutation([1] * 20 + [700] * 10),
    }[kind]
    kv_lengths = queries + (0 if kind == "prompts" else rng.integers(500, 6000, size))
    call = call_of(queries, kv_lengths, heads=heads, window=window)
    cut = Cut(2, kv_tile)
    found = counted(call, queries, kv_lengths, cut)
    work = Work.of(call)
    items = [Items.of(work, cut, each) for each in work.sequences]
    tiles = sum(each.count * each.mean_kv_tiles for each in items)
    assert sum(each.count for each in items) == pytest.approx(found.size, rel=0.05)
    assert tiles == pytest.approx(found.sum(), rel=0.2)
    assert max(each.most_kv_tiles for each in items) == pytest.approx(found.max(), rel=0.05, abs=1)


def test_what_all_programs_wait_for_is_estimated():
    """One item alone, all at once, one more than there are programs, and the memory."""
    cut = Cut(2, 128)

    def seconds(count, kv_length, splits=1):
        work = work_of((1024 // 8,) * count, kv_length, heads=(8, 1))
        return Estimate(work, cut).seconds(splits)

    one, all_at_once, one_more = (seconds(count, 64_000) for count in (1, 16, 17))
    assert all_at_once == pytest.approx(one, rel=0.01)  # 8 items of 16 tokens each
    assert one_more == pytest.approx(2 * one, rel=0.02)
    assert seconds(1, 64_000, splits=16) < one / 8
    assert seconds(16, 64_000, splits=2) > all_at_once  # nobody has been waiting
    read = 2 * 2 * 128 * 8192 * 1000 / H200.read_rate
    drafts = work_of((4,) * 1000, 8192, heads=(8, 1))
    assert read < Estimate(drafts, cut).seconds() < 1.2 * read


def test_a_batch_that_may_grow_has_as_many_shares_now():
    call = call_of((8,) * 4, (8192, 4096, 2048, 8000))
    call.batch.expected_kv_length = 128_000
    cut = Cut(2, 128)
    assert share_tiles_of(call, cut, 4) == 16
    call.batch.known_lengths = None
    assert share_tiles_of(call, cut, 4) == 250
    call.window = 1000
    assert share_tiles_of(call, cut, 4) == 3  # of nine tiles


def test_shares_are_cut_by_the_longest_sequence_that_has_queries():
    call = call_of((0, 12, 12), (100_000, 9000, 8000), heads=(8, 1))
    cut = Cut(2, 128)
    assert share_tiles_of(call, cut, 4) == pytest.approx(9000 / 128 / 4, rel=0.07)
    call.batch.known_lengths = None
    assert share_tiles_of(call, cut, 4) == pytest.approx(100_000 / 128 / 4, rel=0.01)


def test_one_tile_of_keys_is_not_shared_out():
    work = work_of((200,), (9000,), heads=(8, 1), window=60)
    estimate = Estimate(work, work.usual)
    assert estimate.most_kv_tiles == 1
    assert way_of(work, is_usual=True).splits == 1


def test_numbers_that_no_item_has_are_counted_where_sequences_are_not_sorted():
    def seconds(count, splits):
        work = work_of((4,) * count, (60_000, *(500,) * (count - 1)), heads=(8, 1))
        return Estimate(work, Cut(2, 128)).seconds(splits)

    assert seconds(193, 1) - seconds(192, 1) < 1e-6
    assert seconds(193, 32) - seconds(192, 32) > 30e-6


def test_shares_are_counted_by_each_sequence_s_keys():
    work = work_of((4,) * 10, (12_800, *(128,) * 9), heads=(8, 8))
    (items,) = (Items.of(work, Cut(2, 128), each) for each in work.sequences)
    mean, most = items.shares(share_tiles=10, splits=64)
    assert most == 10
    assert 1 <= mean < 2
    assert items.shares(share_tiles=10, splits=4) == (min(mean, 4), 4)
    alike = work_of((4,) * 10, 12_800, heads=(8, 8))
    (items,) = (Items.of(alike, Cut(2, 128), each) for each in alike.sequences)
    assert items.shares(share_tiles=30, splits=64) == (4, 4)


@pytest.mark.parametrize("options", [{}, OF_64], ids=str)
def test_other_tiles_have_to_save_much_of_a_long_launch(options):
    others = 0
    for length in range(64, 8192, 136):
        for count in (1, 3, 40):
            work = work_of((length,) * count, length, **options)
            usual = Estimate(work, work.usual).seconds()
            chosen = cut_of(work)
            saved = 1 - chosen.seconds / usual
            others += saved > 0
            assert saved >= 0
            assert saved == 0 or usual < 1e-4 or saved >= 0.07
    assert others


def drawn_works(count):
    """Of drafts, chunks and mixed batches of some heads."""
    rng = np.random.default_rng(3)
    for i in range(count):
        size = int(rng.integers(1, 60))
        queries = rng.choice([(1, 4), (5, 64), (1, 700)][i % 3], size)
        kv_lengths = queries + np.exp(rng.uniform(2, 10, size)).astype(int)
        heads = [(32, 8), (8, 1), (48, 1), (28, 4)][i // 3 % 4]
        yield work_of(
            tuple(queries.tolist()),
            tuple(kv_lengths.tolist()),
            heads=heads,
            head_size=(64, 128)[i % 2],
            window=(None, None, 2000, None, 60)[i % 5],
        )


def test_shares_that_are_not_looked_at_would_take_longer():
    shared = 0
    for work in drawn_works(200):
        found = [cut_of(work).seconds]
        bytes_of_share = 4 * work.num_tokens * work.num_kv_heads * work.group * work.head_size
        for cut in ways_to_divide(work, work.usual):
            estimate = Estimate(work, cut)
            most = MOST_SHARED_BYTES // bytes_of_share if estimate.most_kv_tiles > 1 else 0
            each = (n for n in SPLITS if n <= most)
            found += [estimate.seconds(splits) for splits in each]
        chosen = way_of(work)
        shared += chosen.splits > 1
        assert chosen.seconds == min(found)
    assert 20 < shared < 180


def test_a_batch_has_the_same_work_for_some_steps_of_drafts():
    lengths = np.array([4000, 900, 2500])
    steps = [work_of((4,) * 3, tuple(lengths + 3 * step)) for step in range(100)]
    assert len(set(steps)) < 12
    longest = max(each.most_kv for each in steps[-1].sequences)
    assert 4297 <= longest < 1.02 * 4297


def test_a_bound_may_be_a_number_of_numpy_s():
    call = call_of((40, 3), (400, 90))
    expected = Work.of(call)
    call.batch.expected_kv_length = np.int64(400)
    assert Work.of(call) == expected


def test_another_window_or_type_is_other_work():
    queries, kv_lengths = (300, 1), (3000, 400)
    options = ({}, {"window": 100}, FP8, {"heads": (64, 8)}, {"causal": False})
    assert len({work_of(queries, kv_lengths, **each) for each in options}) == len(options)


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
        for cut in (usual_cut(call), *prices_of(Work.of(call))):
            assert shared_bytes_of(call, cut, fp8_products=by_fp8) <= SHARED_BYTES
