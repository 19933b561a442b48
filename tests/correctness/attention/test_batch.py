"""Batches: made of page tables and by hand, written in place, and looked at."""

import dataclasses

import numpy as np
import pytest
import torch

from pagedattn import KVCache, PageTable
from pagedattn.attention import AttentionBatch

from .page_tables import page_table


def test_a_batch_has_the_rows_and_slots_of_its_page_table():
    batch = AttentionBatch.of(page_table([7, 4]), [3, 1])
    assert batch.query_starts.tolist() == [0, 3, 4]
    assert batch.kv_lengths.tolist() == [7, 4]
    assert batch.slots.tolist() == [4, 5, 6, 2 * 4 + 3]
    assert (batch.max_query_length, batch.max_kv_length) == (3, 7)
    assert (batch.num_sequences, batch.num_query_tokens) == (2, 4)


def fields_of_a_batch(**changes):
    """The fields of a batch of two sequences, each with a query, but for some."""
    made = AttentionBatch(
        block_tables=torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
        kv_lengths=torch.tensor([20, 30], dtype=torch.int32),
        query_starts=torch.tensor([0, 1, 2], dtype=torch.int32),
        slots=torch.tensor([19, 61]),
        max_query_length=1,
        max_kv_length=30,
    )
    return {field.name: getattr(made, field.name) for field in dataclasses.fields(made)} | changes


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"kv_lengths": torch.tensor([20, 30])},
            r"in a batch of 2 sequences it must be torch.int32 \[num_sequences\]",
        ),
        ({"kv_lengths": torch.zeros(4).int()[::2]}, "kv_lengths must be contiguous"),
        (
            {"kv_lengths": torch.zeros(3).int()},
            r"block_tables is torch.int32 \(2, 2\); in a batch of",
        ),
        ({"block_tables": torch.zeros(2, 2)}, r"block_tables is torch.float32"),
        ({"block_tables": torch.zeros(4).int()}, r"block_tables is torch.int32 \(4,\)"),
        ({"block_tables": torch.zeros(2, 2).int().T.clone().T}, None),
        (
            {"block_tables": torch.zeros(2, 4).int()[:, ::2]},
            "block_tables must be contiguous in its",
        ),
        ({"block_tables": torch.zeros(2, 4).int()[:, :2]}, None),
        ({"query_starts": torch.zeros(2).int()}, r"query_starts is torch.int32 \(2,\)"),
        ({"query_starts": torch.zeros(6).int()[::2]}, "query_starts must be contiguous"),
        ({"slots": torch.zeros(2).int()}, r"slots is torch.int32 \(2,\)"),
        ({"slots": torch.zeros(2, 1).long()}, r"slots is torch.int64 \(2, 1\)"),
        (
            {"slots": torch.zeros(2, device="meta").long()},
            "slots is on meta; the block tables are on",
        ),
        ({"max_kv_length": -1}, "max_kv_length is -1; it must be at least 0"),
    ],
    ids=str,
)
def test_tensors_that_kernels_would_read_wrongly_make_no_batch(changes, sentence):
    fields = fields_of_a_batch(**changes)
    if sentence is None:
        assert AttentionBatch(**fields).num_sequences == 2
        return
    with pytest.raises(ValueError, match=sentence):
        AttentionBatch(**fields)


def test_more_queries_than_tokens_are_refused():
    with pytest.raises(ValueError, match="must be from 0 to each sequence's length"):
        AttentionBatch.of(page_table([7, 4]), [3, 5])


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (PageTable(4, np.array([[1, 2]]), np.array([9])), "9 tokens; a block table of 2 blocks"),
        (
            PageTable(4, np.array([[1], [2]]), np.array([-3, 4])),
            "has -3 tokens; it must have at least 0",
        ),
        (PageTable(0, np.array([[1]]), np.array([1])), "block_size is 0; a block has at least 1"),
        (PageTable(4, np.array([[1]]), np.array([1, 2])), r"num_tokens \(2,\); they must be"),
        (PageTable(4, np.array([1]), np.array([1])), r"block_tables has shape \(1,\)"),
    ],
)
def test_a_page_table_that_contradicts_itself_makes_no_batch(table, sentence):
    with pytest.raises(ValueError, match=sentence):
        AttentionBatch.of(table, 0)


@pytest.mark.parametrize("queries", [1.9, "2", [1, 1], [1, 1, 1]], ids=repr)
def test_query_lengths_are_a_whole_number_for_each_sequence(queries):
    with pytest.raises(ValueError, match="num_last_tokens"):
        AttentionBatch.of(page_table([7, 4, 4, 4]), queries)


def contents(**changes):
    """A batch of two sequences whose tensors hold what they should, but for some."""
    numbers = {
        "block_tables": [[0, 1], [2, -1]], "kv_lengths": [7, 4], "query_starts": [0, 2, 3],
        "max_query_length": 2, "max_kv_length": 8, "slots": torch.tensor([5, 6, 11]),
    } | changes  # fmt: skip
    tensors = {
        name: torch.tensor(value, dtype=torch.int32) if isinstance(value, list) else value
        for name, value in numbers.items()
    }
    return AttentionBatch(**tensors)


CACHE = KVCache(
    num_layers=1, num_blocks=3, block_size=4, num_kv_heads=1, head_size=8, dtype=torch.float32
).layer(0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kv_lengths": [7, -1]}, "sequence 1 has a negative length"),
        ({"kv_lengths": [9, 4]}, "sequence 0 has more tokens than max_kv_length, 8"),
        (
            {"block_tables": [[0], [2]], "kv_lengths": [7, 4]},
            "sequence 0 has more tokens than its block table has room for, 4",
        ),
        ({"query_starts": [0, 2, 1]}, "sequence 1 has query_starts that fall"),
        ({"query_starts": [1, 2, 3]}, "query_starts go from 1 to 3; they must begin at 0"),
        ({"query_starts": [0, 2, 4]}, "query_starts go from 0 to 4; .* end at 3 at most"),
        ({"query_starts": [0, 0, 3]}, "sequence 1 has more query tokens than max_query_length, 2"),
        ({"kv_lengths": [1, 4]}, "sequence 0 has more query tokens than it has tokens"),
        ({"block_tables": [[0, -1], [2, 1]]}, "sequence 0 has a block that is none of the cache's"),
        ({"block_tables": [[0, 1], [3, 1]]}, "sequence 1 has a block that is none of the cache's"),
        ({"slots": torch.tensor([5, 6, 5])}, "two query tokens have one slot"),
        ({"block_size": 8}, "is of blocks of 8 tokens; the cache's have 4"),
    ],
    ids=str,
)
def test_what_a_batchs_tensors_hold_is_looked_at_where_asked(changes, sentence):
    contents().check_integrity(CACHE)
    with pytest.raises(ValueError, match=sentence):
        contents(**changes).check_integrity(CACHE)


def test_padding_and_what_has_left_a_window_is_no_mistake():
    contents(kv_lengths=[0, 4], slots=torch.tensor([-1, -1, 11])).check_integrity(CACHE)
    left = contents(block_tables=[[-1, 1], [2, -1]], query_starts=[0, 1, 3])
    left.check_integrity(CACHE, window=3)
    with pytest.raises(ValueError, match="sequence 0 has a block"):
        left.check_integrity(CACHE, window=4)


def test_a_batch_has_room_to_grow_where_asked():
    batch = AttentionBatch.of(page_table([7, 4]), max_kv_length=33)
    assert batch.max_kv_length == 33
    assert batch.block_tables.shape == (2, 9)
    batch.update(AttentionBatch.of(page_table([33, 5])))
    assert batch.block_tables[0].tolist() == list(range(9))
    with pytest.raises(ValueError, match="max_kv_length is 6; the longest sequence has 7 tokens"):
        AttentionBatch.of(page_table([7, 4]), max_kv_length=6)


def test_a_batch_is_updated_in_place():
    batch = AttentionBatch.of(page_table([9, 9]))
    pointers = [batch.block_tables.data_ptr(), batch.kv_lengths.data_ptr(), batch.slots.data_ptr()]
    other = AttentionBatch.of(page_table([3, 8]))
    batch.update(other)
    assert batch.kv_lengths.tolist() == [3, 8]
    assert batch.slots.tolist() == other.slots.tolist()
    assert batch.block_tables[:, :2].tolist() == other.block_tables.tolist()
    assert pointers == [
        batch.block_tables.data_ptr(),
        batch.kv_lengths.data_ptr(),
        batch.slots.data_ptr(),
    ]


def test_an_update_leaves_the_page_tables_as_they_are():
    tables = page_table([9, 9]), page_table([3, 8])
    before = [table.block_tables.copy() for table in tables]
    first, second = (AttentionBatch.of(table) for table in tables)
    first.update(second)
    first.block_tables.fill_(7)
    for table, expected in zip(tables, before, strict=True):
        assert (table.block_tables == expected).all()


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (lambda: AttentionBatch.of(page_table([30, 8])), "max_kv_length is 30"),
        (lambda: AttentionBatch.of(page_table([3, 8]), 2), "max_query_length is 2"),
        (lambda: AttentionBatch.of(page_table([3])), "kv_lengths has shape"),
        (lambda: AttentionBatch.of(page_table([3, 8], 8)), "is of blocks of 8 tokens; this batch"),
        (
            lambda: dataclasses.replace(AttentionBatch.of(page_table([30, 8])), max_kv_length=9),
            "block tables are 8 blocks wide",
        ),
    ],
)
def test_an_update_that_does_not_fit_changes_nothing(other, sentence):
    batch = AttentionBatch.of(page_table([9, 9]))
    with pytest.raises(ValueError, match=sentence):
        batch.update(other())
    assert batch.kv_lengths.tolist() == [9, 9]


def test_an_update_with_a_page_table_says_to_make_a_batch_of_it():
    batch = AttentionBatch.of(page_table([9, 9]))
    with pytest.raises(TypeError, match=r"given a PageTable: call advance"):
        batch.update(page_table([10, 10]))
