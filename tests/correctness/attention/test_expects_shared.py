"""A batch knows whether reading shared blocks once would spare half of its K and V."""

import pytest

from pagedattn.attention import AttentionBatch

from .shared_tables import one_prefix


@pytest.mark.parametrize("share", [None, True])
@pytest.mark.parametrize(
    ("blocks", "members", "own", "expected"),
    [(9, 2, 1, False), (3, 3, 1, True), (4, 3, 2, False), (8, 3, 2, True), (0, 3, 3, False)],
)
def test_a_batch_knows_whether_reading_blocks_once_spares_half_also_where_it_does_not(
    share, blocks, members, own, expected
):
    table = one_prefix(blocks, members, own)
    batch = AttentionBatch.of(table, share=share)
    assert batch.expects_shared == expected
    assert batch.without_sharing().expects_shared == expected
    assert not AttentionBatch.of(table, share=False).expects_shared


def test_a_batch_that_grows_knows_when_less_than_half_is_spared():
    first = one_prefix(8, 4, 2)
    batch = AttentionBatch.of(first, max_kv_length=1000)
    batch.sharing._plans = {"a layer": None}  # it did not pay; so the tree is kept
    assert batch.expects_shared
    tree, grown = batch.sharing.now.tree, one_prefix(8, 4, 9)
    grown.block_tables[:, :10] = first.block_tables
    batch.advance(grown)
    assert batch.sharing.now.tree is tree
    assert not batch.expects_shared


def test_whether_half_of_a_batch_is_spared_changes_from_step_to_step():
    shared, strangers = one_prefix(8, 4, 1), one_prefix(0, 4, 9)
    batch = AttentionBatch.of(shared, max_kv_length=1000)
    assert batch.expects_shared
    batch.advance(strangers)
    assert not batch.expects_shared
