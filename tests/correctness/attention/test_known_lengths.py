"""What a batch knows of its lengths: of short queries and of long ones."""

import dataclasses

import numpy as np
import pytest

from pagedattn.attention import AttentionBatch
from pagedattn.attention.known_lengths import MOST_SHORT, KnownLengths, Sequences
from pagedattn.page_table import PageTable

ROUNDED = 1 / 32  # a number of 5 significant bits is no farther from any


def table_of(kv_lengths):
    kv_lengths = np.array(kv_lengths)
    blocks = np.zeros((kv_lengths.size, -(-int(kv_lengths.max()) // 16)), np.int32)
    return PageTable(16, blocks, kv_lengths)


def batch_of(query_lengths, kv_lengths, **options):
    return AttentionBatch.of(table_of(kv_lengths), query_lengths, **options)


def expected(pairs, longest):
    """What is known of sequences, pairs of queries and keys, by counting one by one."""
    if not pairs:
        return None
    tokens = sum(q for q, _ in pairs)
    # the last query sees all keys, and each one before sees one fewer
    seen = sum(k - i for q, k in pairs for i in range(q)) / tokens
    mean = sum(k for _, k in pairs) / len(pairs)
    return (
        (len(pairs), tokens, max(q for q, _ in pairs)),
        (mean / longest, max(k for _, k in pairs) / longest, seen / longest),
    )


def test_counts_are_exact_and_keys_are_shares_of_the_longest_within_a_32th():
    rng = np.random.default_rng(3)
    for _ in range(50):
        size = int(rng.integers(2, 20))
        queries = rng.choice([0, 1, 2, MOST_SHORT, MOST_SHORT + 1, 100], size)
        queries[0] = 2
        keys = queries + rng.integers(1, 500, size)
        known = batch_of(queries, keys).known_lengths
        for found, chosen in (
            (known.short, (queries > 0) & (queries <= MOST_SHORT)),
            (known.long, queries > MOST_SHORT),
        ):
            pairs = list(zip(queries[chosen].tolist(), keys[chosen].tolist(), strict=True))
            counts_and_keys = expected(pairs, keys.max())
            if counts_and_keys is None:
                assert found is None
                continue
            counts, shares = counts_and_keys
            assert (found.count, found.query_tokens, found.most_queries) == counts
            assert (found.mean_kv, found.most_kv, found.mean_seen) == pytest.approx(
                shares, rel=ROUNDED
            )


def test_alike_sequences_have_as_many_keys_on_average_as_at_most():
    known = batch_of((4,) * 7, (300,) * 7).known_lengths
    assert known == KnownLengths(Sequences(7, 28, 4, 1.0, 1.0, 1.0), None, 304)
    among_longer = batch_of((4, 4, 40), (77, 77, 300)).known_lengths.short
    assert among_longer.mean_kv == among_longer.most_kv


def test_a_batch_that_grows_evenly_is_known_as_the_same():
    before = batch_of((4, 4, 40), (200, 333, 700)).known_lengths
    assert batch_of((4, 4, 40), (201, 334, 701)).known_lengths == before
    grown = batch_of((4, 4, 40), (208, 346, 728)).known_lengths
    assert grown == dataclasses.replace(before, longest=grown.longest)
    assert grown.longest == pytest.approx(728, rel=ROUNDED)


@pytest.mark.parametrize(
    ("queries", "is_mixed"),
    [((8, 1, 3), False), ((9, 40, 300), False), ((0, 9, 40), False), ((0, 9, 1), True)],
)
def test_a_batch_is_mixed_that_has_short_queries_and_long_ones(queries, is_mixed):
    assert batch_of(queries, (300, 300, 300)).known_lengths.is_mixed == is_mixed


def test_of_decodes_it_is_known_how_long_they_are_on_average_if_they_are_not_alike():
    assert batch_of(1, (300, 300)).known_lengths is None
    assert batch_of(1, (300, 150, 300, 150)).known_lengths.short.mean_kv == 0.75
    assert batch_of((0, 0, 1), (300, 20, 300)).known_lengths.short.count == 1


def test_sequences_without_tokens_are_known():
    known = KnownLengths.of(np.array([2, 2]), np.array([0, 0]))
    assert known.short.mean_kv == known.short.most_kv == 0


def test_a_later_step_leaves_it_as_it_was():
    batch = batch_of((40, 1), (300, 70))
    before = dataclasses.replace(batch.known_lengths)
    batch.update(batch_of((1, 40), (299, 70)))
    assert batch.known_lengths == before
    batch.advance(table_of((299, 70)), (1, 40))
    assert batch.known_lengths == before
