"""What a batch's mixture says of its short and its long queries."""

import dataclasses

import numpy as np
import pytest

from pagedattn.attention import AttentionBatch
from pagedattn.attention.mixture import MOST_SHORT, Mixture
from pagedattn.page_table import PageTable


def table_of(kv_lengths):
    kv_lengths = np.array(kv_lengths)
    blocks = np.zeros((kv_lengths.size, -(-int(kv_lengths.max()) // 16)), np.int32)
    return PageTable(16, blocks, kv_lengths)


def batch_of(query_lengths, kv_lengths):
    return AttentionBatch.of(table_of(kv_lengths), query_lengths)


def test_sums_are_those_of_each_sequence():
    rng = np.random.default_rng(3)
    for _ in range(50):
        size = int(rng.integers(2, 20))
        queries = rng.choice([0, 1, 2, MOST_SHORT, MOST_SHORT + 1, 100], size)
        keys = queries + rng.integers(1, 500, size)
        short = [(q, k) for q, k in zip(queries, keys, strict=True) if 0 < q <= MOST_SHORT]
        long = [(q, k) for q, k in zip(queries, keys, strict=True) if q > MOST_SHORT]
        found = batch_of(queries, keys).mixture
        if not short or not long:
            assert found is None
            continue
        assert found == Mixture(
            num_short=len(short),
            most_short_queries=max(q for q, _ in short),
            short_kv_tokens=sum(k for _, k in short),
            longest_short_kv=max(k for _, k in short),
            num_long=len(long),
            long_query_tokens=sum(q for q, _ in long),
            most_long_queries=max(q for q, _ in long),
            longest_long_kv=max(k for _, k in long),
            # the last query sees all keys, and each one before sees one fewer
            visible_pairs=sum(k - i for q, k in long for i in range(q)),
        )


@pytest.mark.parametrize("queries", [(1, 1, 1), (8, 1, 3), (9, 40, 300), (0, 9, 40), (0, 0, 1)])
def test_a_batch_of_short_or_of_long_queries_mixes_none(queries):
    assert batch_of(queries, (300, 300, 300)).mixture is None


def test_a_later_step_leaves_it_as_it_was():
    batch = batch_of((40, 1), (300, 70))
    before = dataclasses.replace(batch.mixture)
    batch.update(batch_of((1, 40), (299, 70)))
    assert batch.mixture == before
    batch.advance(table_of((299, 70)), (1, 40))
    assert batch.mixture == before
