"""Wrong arguments get one sentence that says what was given and what is allowed."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from pagedattn import KVCache, PageTable
from pagedattn.attention import (
    AttentionBatch,
    Rotary,
    attention,
    get_implementation,
    implementation_names,
    register,
    rotary_write_kv,
    write_kv,
)
from pagedattn.attention import registry as registry_module
from pagedattn.attention.call import FEATURES
from pagedattn.attention.torch_impl import TorchImplementation
from pagedattn.testing import check_attention, make_inputs
from pagedattn.workloads import AttentionShape

SHAPE = AttentionShape("small", (1, 1), (7, 16), 4, 2, 64, 4, "float32")


@pytest.fixture
def inputs():
    return make_inputs(SHAPE)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda q: q[0], "query has 2 dimensions; it must be"),
        (lambda q: q[:1], "query has 1 tokens; the batch has 2"),
        (lambda q: q[..., :32], "query has head_size 32; the cache has 64"),
        (lambda q: q[:, :3], "query has 3 heads, which is no multiple of the cache's 2 KV heads"),
        (lambda q: q[:, :0], "query has 0 heads, which is no multiple of the cache's 2 KV heads"),
        (lambda q: q.half(), r"query is torch.float16; the cache is torch.float32"),
        (lambda q: q.double(), r"query is torch.float64; it must be torch.float16, torch.bfl"),
        (lambda q: q.transpose(1, 2).contiguous().transpose(1, 2), "query must be contiguous"),
        (lambda q: q.to("meta"), "query is on meta; the cache is on cpu"),
    ],
)
def test_a_query_that_does_not_fit_is_refused(inputs, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        attention(change(inputs.query), inputs.cache, inputs.batch)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"window": 0}, "window is 0; it must be a whole number of tokens, at least 1, or None"),
        ({"window": 2.5}, "window is 2.5; it must be a whole number"),
        ({"window": True}, "window is True; it must be a whole number"),
        ({"window": np.int64(0)}, r"window is .*0.*; it must be a whole number"),
        ({"scale": float("nan")}, "scale is nan; it must be a finite number, or None"),
        ({"scale": -math.inf}, "scale is -inf; it must be a finite number"),
        ({"soft_cap": 0.0}, "soft_cap is 0.0; it must be a finite number above 0, or None"),
        ({"soft_cap": -3.0}, "soft_cap is -3.0; it must be"),
        ({"soft_cap": float("inf")}, "soft_cap is inf; it must be"),
        ({"alibi_slopes": torch.ones(2)}, r"alibi_slopes is torch.float32 .2,.; it must be torch"),
        ({"alibi_slopes": torch.ones(4).half()}, "alibi_slopes is torch.float16"),
        ({"alibi_slopes": torch.ones(8)[::2]}, "alibi_slopes must be contiguous"),
        ({"sinks": torch.ones(4, 1)}, r"sinks is torch.float32 .4, 1.; it must be .* here .4,."),
        ({"sinks": torch.ones(4, device="meta")}, "sinks is on meta; the cache is on cpu"),
        ({"causal": False, "window": 4}, "count from a query's own position; they need causal=T"),
        ({"causal": False, "alibi_slopes": torch.ones(4)}, "own position; they need causal=True"),
    ],
    ids=str,
)
def test_an_option_that_means_nothing_is_refused(inputs, options, sentence):
    out = torch.full_like(inputs.query, 7.0)
    with pytest.raises(ValueError, match=sentence):
        attention(inputs.query, inputs.cache, inputs.batch, out=out, **options)
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        (torch.empty(2, 4, 32), "out is torch.float32 .2, 4, 32."),
        (torch.empty(2, 4, 64, dtype=torch.float16), "out is torch.float16"),
        (torch.empty(2, 64, 4).transpose(1, 2), "out must be contiguous"),
        (torch.empty(2, 4, 64, device="meta"), "out is on meta"),
        (torch.empty(1, 4, 64).expand(2, 4, 64), "out has several rows in one place; its strides"),
    ],
)
def test_an_output_that_does_not_fit_is_refused(inputs, out, sentence):
    with pytest.raises(ValueError, match=sentence):
        attention(inputs.query, inputs.cache, inputs.batch, out=out)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"key": torch.zeros(2, 2, 32)}, "key has shape .2, 2, 32."),
        ({"value": torch.zeros(3, 2, 64)}, "value has shape .3, 2, 64."),
        ({"slots": torch.zeros(2, dtype=torch.int32)}, "slots are torch.int32; they must be"),
        ({"slots": torch.zeros(4, dtype=torch.int64)[::2]}, "slots must be contiguous"),
        ({"slots": torch.zeros(2, dtype=torch.int64, device="meta")}, "slots is on meta"),
        ({"slots": torch.tensor(3)}, "slots must be contiguous in their one dimension"),
        ({"key": torch.zeros(2, 64, 2).transpose(1, 2)}, "key must be contiguous"),
        ({"value": torch.zeros(2, 2, 64).half()}, "key is torch.float32 and value torch.float16"),
        (
            {name: torch.zeros(2, 2, 64).int() for name in ("key", "value")},
            "value torch.int32; they must be of one floating dtype",
        ),
    ],
)
def test_keys_values_and_slots_that_do_not_fit_are_refused(inputs, change, sentence):
    given = {"key": inputs.key, "value": inputs.value, "slots": inputs.batch.slots} | change
    before = inputs.cache.key.clone()
    with pytest.raises(ValueError, match=sentence):
        write_kv(given["key"], given["value"], inputs.cache, given["slots"])
    torch.testing.assert_close(inputs.cache.key, before, equal_nan=True, rtol=0, atol=0)


def test_a_whole_cache_and_a_page_table_are_told_from_a_layer_and_a_batch(inputs):
    cache = KVCache(
        num_layers=1, num_blocks=2, block_size=4, num_kv_heads=2, head_size=64, dtype=torch.float32
    )
    slots = inputs.batch.slots
    for call in (
        lambda: attention(inputs.query, cache, inputs.batch),
        lambda: write_kv(inputs.key, inputs.value, cache, slots),
    ):
        with pytest.raises(ValueError, match=r"cache is a KVCache; .* as KVCache\.layer returns"):
            call()
    with pytest.raises(ValueError, match="batch is a PageTable; attention takes an AttentionBatch"):
        attention(inputs.query, inputs.cache, page_table([7, 16]))


def test_a_page_table_of_other_blocks_than_the_caches_is_refused(inputs):
    batch = AttentionBatch.of(page_table([7, 16], block_size=8))
    with pytest.raises(ValueError, match="is of blocks of 8 tokens; the cache's have 4"):
        attention(inputs.query, inputs.cache, batch)
    with pytest.raises(ValueError, match="is of blocks of 8 tokens; this batch was made for 4"):
        inputs.batch.advance(page_table([7, 16], block_size=8))


@pytest.mark.implementations("own")
@pytest.mark.parametrize("scale", [np.float32(0.1), np.float64(0.1), torch.tensor(0.1)], ids=repr)
def test_a_scale_and_a_window_may_be_numbers_of_other_packages(
    attend, implementation, device, scale
):
    results = [
        attend(
            dataclasses.replace(make_inputs(SHAPE, device=device), window=window),
            implementation,
            scale=factor,
        )
        for factor, window in ((scale, np.int64(5)), (float(scale), 5))
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_nothing_is_kept_for_gradients(inputs, name):
    key, value, query = (
        tensor.clone().requires_grad_() for tensor in (inputs.key, inputs.value, inputs.query)
    )
    sinks = torch.ones(4, requires_grad=True)
    positions = torch.arange(2)
    rotary = Rotary.of(torch.ones(32), 4)
    layer = inputs.cache
    for _ in range(2):
        write_kv(key, value, layer, inputs.batch.slots, implementation=name)
        turned = rotary_write_kv(
            query, key, value, layer, inputs.batch.slots, positions, rotary,
            implementation=name,
        )  # fmt: skip
    out = attention(query, layer, inputs.batch, sinks=sinks, implementation=name)
    for tensor in (layer.key, layer.value, turned, out):
        assert not tensor.requires_grad
    assert not layer.value.isnan().all()


def test_the_log_sum_exp_comes_with_the_result_where_asked(inputs):
    out, lse = attention(inputs.query, inputs.cache, inputs.batch, return_lse=True)
    assert lse.dtype == torch.float32
    assert lse.shape == (2, 4)
    check_attention(out, inputs, lse)
    empty = AttentionBatch.of(page_table([7, 16]), 0)
    out, lse = attention(inputs.query[:0], inputs.cache, empty, return_lse=True)
    assert (out.shape, lse.shape) == ((0, 4, 64), (0, 4))


def test_an_unknown_implementation_names_the_known_ones(inputs):
    with pytest.raises(
        ValueError, match="no implementation 'fast'; known are cuda, triton, torch, ref"
    ):
        attention(inputs.query, inputs.cache, inputs.batch, implementation="fast")


def test_what_an_implementation_cannot_take_is_said():
    pytest.importorskip("triton")
    inputs = make_inputs(AttentionShape("large", (1,), (3,), 1, 1, 512, 4, "float32"))
    with pytest.raises(ValueError, match="'triton' cannot take these inputs: head_size 512"):
        attention(inputs.query, inputs.cache, inputs.batch, implementation="triton")
    check_attention(attention(inputs.query, inputs.cache, inputs.batch), inputs)


def test_a_registered_implementation_is_called_by_its_name(inputs, monkeypatch):
    monkeypatch.setattr(registry_module, "_made", dict(registry_module._made))

    class Mine(TorchImplementation):
        name = "mine"

        def attention(self, call):
            super().attention(call)
            call.out.neg_()

    register(Mine())
    assert "mine" in implementation_names()
    mine, own = (
        attention(inputs.query, inputs.cache, inputs.batch, implementation=name)
        for name in ("mine", "torch")
    )
    assert torch.equal(mine, -own)
    for name in ("mine", "torch"):
        other = Mine()
        other.name = name
        with pytest.raises(ValueError, match=f"named '{name}' exists"):
            register(other)
    assert get_implementation("mine").name == "mine"


@pytest.mark.parametrize("window", [1, 2**30, 2**32, 10**30])
def test_a_call_has_no_window_that_an_int32_does_not_hold(inputs, window):
    call = dataclasses.replace(inputs, window=window).call()
    assert call.window == min(window, 2**30)


@pytest.mark.parametrize("soft_cap", [2.0**100, 1e300])
def test_a_call_has_no_cap_that_no_score_comes_near(inputs, soft_cap):
    assert dataclasses.replace(inputs, soft_cap=soft_cap).call().soft_cap is None
    assert dataclasses.replace(inputs, soft_cap=2.0**99).call().soft_cap == 2.0**99


def test_a_call_names_what_it_asks_for_and_what_is_missing(inputs):
    plain = inputs.call()
    assert plain.features == frozenset()
    assert plain.beyond(()) is None
    ones = torch.ones(4)
    full = dataclasses.replace(
        plain, lse=torch.empty(2, 4), window=3, soft_cap=5.0, alibi_slopes=ones, sinks=ones,
        causal=False,
    )  # fmt: skip
    assert full.features == FEATURES.keys() - {"fp8"}
    assert full.beyond(FEATURES) is None
    assert (
        full.beyond({"alibi", "lse", "sinks", "not_causal"})
        == "it does not do a sliding window or a soft cap"
    )


def page_table(lengths, block_size=4):
    lengths = np.array(lengths)
    width = max(1, int(-(-lengths.max(initial=0) // block_size)))
    tables = np.arange(lengths.size * width, dtype=np.int32).reshape(lengths.size, width)
    return PageTable(block_size, tables, lengths)


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
        "max_query_length": 2, "max_kv_length": 8,
    } | changes  # fmt: skip
    tensors = {
        name: torch.tensor(value, dtype=torch.int32) if isinstance(value, list) else value
        for name, value in numbers.items()
    }
    return AttentionBatch(slots=torch.tensor([5, 6, 11]), **tensors)


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
        ({"kv_lengths": [1, 4]}, "sequence 0 has more query tokens than tokens"),
        ({"block_tables": [[0, -1], [2, 1]]}, "sequence 0 has a block that is none of the cache's"),
        (
            {"block_tables": [[0, 1], [3, 1]]},
            "sequence 1 has a block that is none of",
        ),
    ],
    ids=str,
)
def test_what_a_batchs_tensors_hold_is_looked_at_where_asked(changes, sentence):
    contents().check_integrity(3, 4)
    contents(kv_lengths=[0, 4]).check_integrity(3, 4)  # a padding sequence
    with pytest.raises(ValueError, match=sentence):
        contents(**changes).check_integrity(3, 4)


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
