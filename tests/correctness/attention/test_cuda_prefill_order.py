"""In which order the prefill kernel's programs draw query tiles, and that none is left out."""

import itertools

import numpy as np
import pytest
import torch

from pagedattn.attention.known_lengths import KnownLengths
from pagedattn.attention.reference import reference_attention

pytest.importorskip("triton")

from pagedattn.attention.cuda import prefill
from pagedattn.attention.cuda.prefill_config import Cut
from pagedattn.testing.emulator import emulation, unavailable

from .emulated import check, inputs_of, prefill_of

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"emulation: {unavailable()}")

TILE = 128  # tokens, of one head
CUT = Cut(2, 128)


def drawn(inputs, count, **options):
    """Query tokens of the first `count` items, each a list, in the order in which they are drawn.

    Where the counter says that some are drawn already, the only program leaves them out, but for
    number 0, with which it begins.
    """
    out, written = torch.empty_like(inputs.query), []
    with emulation(1):
        launch = prefill.PrefillLaunch(inputs.call(out), splits=1, cut=CUT, **options)
        for before in (*range(count), 1_000_000):
            out.fill_(torch.nan)
            inputs.batch.tickets()[0] = before
            launch(inputs.call(out))
            written.append(~out.isnan().any((1, 2)))
    items = [written[-1], *(more & ~less for more, less in itertools.pairwise(written[:-1]))]
    return [item.nonzero().flatten().tolist() for item in items]


def tokens_of(queries, sequence, tile=0):
    start, end = sum(queries[:sequence]), sum(queries[: sequence + 1])
    return list(range(start + tile * TILE, min(end, start + (tile + 1) * TILE)))


@pytest.mark.parametrize(
    ("queries", "kv_lengths", "options", "order"),
    [
        ((40, 40, 40), (100, 700, 300), {}, [(1, 0), (2, 0), (0, 0)]),
        ((40, 40, 40), (700, 100, 300), {}, [(0, 0), (2, 0), (1, 0)]),
        ((300, 20), (300, 310), {}, [(1, 0), (0, 2), (0, 1), (0, 0)]),
        # a prompt's first tile sees few keys, and goes after a chunk's
        ((20, 300), (200, 300), {}, [(0, 0), (1, 2), (1, 1), (1, 0)]),
        ((300, 140, 300), (300, 280, 350), {}, [(1, 1), (1, 0), (2, 2), (2, 1), (2, 0), (0, 2)]),
        # of prompts, whose first tiles see as many, the longest
        ((130, 300, 200), (130, 300, 200), {}, [(1, 2), (1, 1), (1, 0), (2, 1), (2, 0), (0, 1)]),
        ((20, 20, 20), (300, 100, 300), {}, [(2, 0), (0, 0), (1, 0)]),  # of as many, the last one
        # others have no queries
        ((0, 20, 0, 20, 0), (400, 300, 500, 90, 500), {}, [(1, 0), (3, 0)]),
        ((20, 20), (400, 300), {"window": 50}, [(1, 0), (0, 0)]),  # of which both see as many
        # which all see three tiles of keys
        ((20, 20, 20), (300, 280, 257), {}, [(2, 0), (1, 0), (0, 0)]),
        # more than 32
        ((9,) * 50, (*range(300, 349), 10), {}, [(48, 0), (47, 0), (46, 0)]),
        ((300, *(9,) * 31, 140), (600, *(10,) * 31, 700), {}, [(32, 1), (32, 0), (0, 2), (0, 1)]),
        # too many to be sorted: from the last one, or, of short and long ones, from both ends
        ((9,) * 193, (*(300,) * 192, 10), {}, [(192, 0), (191, 0), (190, 0)]),
        ((140, *(1,) * 191, 140), (300,) * 193, {}, [(192, 1), (0, 0), (192, 0), (0, 1)]),
    ],
)
def test_whose_first_tiles_see_the_most_keys_are_drawn_first(queries, kv_lengths, options, order):
    inputs = inputs_of(kv_lengths, [max(1, count) for count in queries], heads=(1, 1), **options)
    inputs.batch.query_starts[1:] = torch.tensor(queries).cumsum(0)
    assert drawn(inputs, len(order)) == [tokens_of(queries, *item) for item in order]


@pytest.mark.parametrize("others", [3, 40])
def test_long_queries_among_short_ones_are_drawn_in_the_same_order(others):
    queries = (40, *(1,) * others, 60, 1, 50)
    kv_lengths = (300, *(600,) * others, 400, 700, 200)
    inputs = inputs_of(kv_lengths, queries, heads=(1, 1))
    assert inputs.batch.known_lengths == KnownLengths.of(np.array(queries), np.array(kv_lengths))
    order = [tokens_of(queries, sequence) for sequence in (others + 1, 0, others + 3)]
    assert drawn(inputs, 3, long_only=True) == order


@pytest.mark.parametrize("count", [32, 33, 192, 193])
def test_no_tile_is_left_out_of_few_sequences_or_of_many(count):
    rng = np.random.default_rng(count)
    queries = rng.integers(9, 14, count)
    kv_lengths = queries + rng.integers(0, 60, count)
    inputs = inputs_of(kv_lengths.tolist(), queries.tolist(), heads=(1, 1))
    check(inputs, prefill_of, multiprocessors=3, seeds=(count,))


def test_no_tile_is_left_out_from_either_end_of_a_mixed_batch():
    inputs = inputs_of((500, *range(5, 196), 300), (300, *(1,) * 191, 140), heads=(1, 1))
    check(
        inputs,
        lambda call: prefill.PrefillLaunch(call, splits=1),
        multiprocessors=3,
        seeds=(0,),
    )


@pytest.mark.parametrize(
    ("count", "shorts", "longest"),
    [(32, 40, 150), (192, 40, 12), (193, 40, 150), (3, 1100, 12)],
)
def test_no_tile_of_long_queries_is_left_out_among_any_number_of_short_ones(count, shorts, longest):
    rng = np.random.default_rng(count)
    queries = rng.permutation([1] * shorts + [12] * (count - 1) + [longest])
    kv_lengths = queries + rng.integers(0, 60, queries.size)
    inputs = inputs_of(kv_lengths.tolist(), queries.tolist(), heads=(2, 1))
    out = torch.full_like(inputs.query, torch.nan)
    with emulation(3):
        call = inputs.call(out)
        prefill.PrefillLaunch(call, long_only=True, splits=1)(call)
    is_long = torch.from_numpy(queries.repeat(queries) > 1)
    assert torch.equal(~out.isnan().any((1, 2)), is_long)
    exact, _ = reference_attention(inputs.call(), torch.float64)
    torch.testing.assert_close(out[is_long].double(), exact[is_long], atol=4e-3, rtol=4e-3)
