"""In which order the prefill kernel's programs draw query tiles, and that none is left out."""

import numpy as np
import pytest
import torch

from pagedattn.attention.mixture import Mixture
from pagedattn.attention.reference import reference_attention

pytest.importorskip("triton")

from pagedattn.attention.cuda import prefill
from pagedattn.testing.emulator import emulation, unavailable

from .emulated import check, inputs_of, prefill_of

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"emulation: {unavailable()}")

TILE = 128  # tokens, of one head


def first_of(inputs, **options):
    """Query tokens of the first item, as all that come behind it seem to be drawn already."""
    out = torch.full_like(inputs.query, torch.nan)
    with emulation(1):
        launch = prefill.PrefillLaunch(inputs.call(out), splits=1, **options)
        # its first item is number 0, the next one what comes after all that were drawn
        inputs.batch.tickets()[0] = 1_000_000
        launch(inputs.call(out))
    return (~out.isnan().any((1, 2))).nonzero().flatten().tolist()


def tokens_of(queries, sequence, tile=0):
    start, end = sum(queries[:sequence]), sum(queries[: sequence + 1])
    return list(range(start + tile * TILE, min(end, start + (tile + 1) * TILE)))


@pytest.mark.parametrize(
    ("queries", "kv_lengths", "options", "first"),
    [
        ((40, 40, 40), (100, 700, 300), {}, (1, 0)),
        ((40, 40, 40), (700, 100, 300), {}, (0, 0)),
        ((300, 20), (300, 310), {}, (1, 0)),
        ((20, 300), (200, 300), {}, (1, 2)),  # a sequence's last tile sees the most keys
        ((20, 20, 20), (300, 100, 300), {}, (2, 0)),  # of as many keys, the last one
        ((0, 20, 0, 20, 0), (400, 100, 500, 90, 500), {}, (1, 0)),  # others have no queries
        ((20, 20), (400, 300), {"window": 50}, (1, 0)),  # of which both see as many
    ],
)
def test_what_sees_the_most_keys_is_drawn_first(queries, kv_lengths, options, first):
    inputs = inputs_of(kv_lengths, [max(1, count) for count in queries], heads=(1, 1), **options)
    inputs.batch.query_starts[1:] = torch.tensor(queries).cumsum(0)
    assert first_of(inputs) == tokens_of(queries, *first)


@pytest.mark.parametrize("others", [3, 40])
def test_of_long_queries_among_short_ones_those_with_the_most_keys_are_drawn_first(others):
    queries = (40, *(1,) * others, 60, 1, 50)
    kv_lengths = (300, *(600,) * others, 400, 700, 200)
    inputs = inputs_of(kv_lengths, queries, heads=(1, 1))
    assert inputs.batch.mixture == Mixture.of(np.array(queries), np.array(kv_lengths))
    assert first_of(inputs, mixture=inputs.batch.mixture) == tokens_of(queries, others + 1)


@pytest.mark.parametrize("count", [32, 33, 70])
def test_no_tile_is_left_out_of_few_sequences_or_of_many(count):
    rng = np.random.default_rng(count)
    queries = rng.integers(9, 14, count)
    kv_lengths = queries + rng.integers(0, 60, count)
    check(inputs_of(kv_lengths.tolist(), queries.tolist(), heads=(2, 1)), prefill_of)


def test_no_tile_is_left_out_from_either_end_of_a_mixed_batch():
    inputs = inputs_of((500, *range(5, 42), 300), (300, *(1,) * 37, 140), heads=(2, 1))
    check(inputs, lambda call: prefill.PrefillLaunch(call, splits=1), multiprocessors=3)


@pytest.mark.parametrize(("count", "shorts"), [(32, 40), (33, 40), (3, 1100)])
def test_no_tile_of_long_queries_is_left_out_among_any_number_of_short_ones(count, shorts):
    rng = np.random.default_rng(count)
    queries = rng.permutation([1] * shorts + [12] * count)
    kv_lengths = queries + rng.integers(0, 60, queries.size)
    inputs = inputs_of(kv_lengths.tolist(), queries.tolist(), heads=(2, 1))
    out = torch.full_like(inputs.query, torch.nan)
    with emulation(3):
        call = inputs.call(out)
        prefill.PrefillLaunch(call, mixture=inputs.batch.mixture, splits=1)(call)
    is_long = torch.from_numpy(queries.repeat(queries) > 1)
    assert torch.equal(~out.isnan().any((1, 2)), is_long)
    exact, _ = reference_attention(inputs.call(), torch.float64)
    torch.testing.assert_close(out[is_long].double(), exact[is_long], atol=4e-3, rtol=4e-3)
