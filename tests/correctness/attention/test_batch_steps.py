"""A batch that went on step by step, in place, has the tensors of one that is made anew."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedattn import BlockManager, PageTable
from pagedattn.attention import AttentionBatch, batch_memory
from pagedattn.attention.cascade.costs import Layer
from pagedattn.shared_prefix import PrefixTree, Unchanged, find_shared_blocks

from .lives import BLOCK, LONGEST, NUM_SEQUENCES, Life
from .shared_tables import check_plan

ALWAYS, OTHER = (Layer(8, heads, 64, 2, 132, None) for heads in (2, 8))
WAYS = ("advance", "advance", "advance", "update", "by hand", "back", "aside", "back aside")
FIELDS = ("block_tables", "kv_lengths", "query_starts", "slots")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


def check_tensors(batch, table, queries):
    """Check that the tensors say what a fresh batch's do, as far as anything is read."""
    fresh = AttentionBatch.of(table, queries)
    for field in FIELDS[1:]:
        assert getattr(batch, field).tolist() == getattr(fresh, field).tolist()
    is_read = np.arange(table.block_tables.shape[1]) < table.num_blocks()[:, None]
    held = batch.block_tables.cpu().numpy()[:, : is_read.shape[1]]
    assert (held == table.block_tables)[is_read].all()


@settings(max_examples=60)
@given(st.data())
def test_steps_through_any_life_give_the_tensors_of_a_fresh_batch(device, data):
    life = Life(lambda options: data.draw(st.sampled_from(list(options))))
    table = PageTable.of(life.manager, life.ids)
    batches = [AttentionBatch.of(table, 1, device, LONGEST, share=share) for share in (True, False)]
    plans = [batches[0].sharing.plan(layer, batches[0]) for layer in (ALWAYS, OTHER)]
    places = [getattr(batch, field).data_ptr() for batch in batches for field in FIELDS]
    tables = [table]
    for _ in range(12):
        table = life.step()
        tables.append(table)
        way = data.draw(st.sampled_from(WAYS))
        if way == "by hand":  # a page table without a lineage, of other blocks
            table = dataclasses.replace(table, block_tables=table.block_tables + 1000)
        if way in ("back", "back aside"):
            table = data.draw(st.sampled_from(tables))
        for batch in batches:
            if way == "update":
                where = data.draw(st.sampled_from(["cpu", device]))
                batch.update(AttentionBatch.of(table, device=where))
            elif way in ("aside", "back aside"):  # plans are not told
                batch.without_sharing().advance(table)
            else:
                batch.advance(table)
            check_tensors(batch, table, 1)
        for layer, plan in zip((ALWAYS, OTHER), plans, strict=True):
            assert batches[0].sharing.plan(layer, batches[0]) is plan
            if way not in ("aside", "back aside"):
                check_plan(plan, table, [1] * NUM_SEQUENCES)
    assert places == [getattr(batch, field).data_ptr() for batch in batches for field in FIELDS]


@given(st.data())
def test_what_lineage_and_lengths_say_is_unchanged_is_what_a_search_finds(data):
    life = Life(lambda options: data.draw(st.sampled_from(list(options))))
    queries = np.array(data.draw(st.sampled_from([[1, 1, 1, 1], [0, 1, 1, 0]])))
    seen = []
    for _ in range(10):
        table = life.step()
        nodes = find_shared_blocks(table, queries)
        unchanged = Unchanged.since(table, queries, PrefixTree.of(table, queries))
        seen.append((unchanged, table, listed(nodes, table)))
    # also of tables that were there before, so that sequences shrink
    for unchanged, now, nodes in seen:
        assert unchanged.covers(now, queries)
        for _, table, others in seen:
            if unchanged.covers(table, queries):
                assert nodes == others
            assert not unchanged.covers(table, queries + 1)
            assert not unchanged.covers(dataclasses.replace(table), queries)


def listed(nodes, table):
    """Nodes with the physical blocks that they are of."""
    return [
        (
            n.begin,
            n.end,
            n.parent,
            n.members.tolist(),
            table.block_tables[n.members, n.begin : n.end].tolist(),
        )
        for n in nodes
    ]


def test_growth_is_told_from_lineage_and_lengths_alone(monkeypatch):
    manager = BlockManager(200, BLOCK)
    parent = manager.allocate([48])
    ids = manager.fork(parent, NUM_SEQUENCES)
    manager.append(ids, [20, 17, 33, 18])
    batch = AttentionBatch.of(PageTable.of(manager, ids), max_kv_length=LONGEST, share=True)
    plan = batch.sharing.plan(ALWAYS, batch)
    monkeypatch.setattr(PrefixTree, "of", None)
    monkeypatch.setattr(PrefixTree, "still_holds", None)
    for _ in range(40):
        manager.append(ids)
        table = PageTable.of(manager, ids)
        batch.advance(table)
        check_tensors(batch, table, 1)
        assert check_plan(plan, table, [1] * NUM_SEQUENCES) == 3 * NUM_SEQUENCES


def test_only_new_entries_are_sent_of_tables_that_grow(monkeypatch):
    manager = BlockManager(200, BLOCK)
    ids = manager.allocate([16, 20, 31, 32])
    batch = AttentionBatch.of(PageTable.of(manager, ids), max_kv_length=LONGEST)
    monkeypatch.setattr(batch_memory.BatchMemory, "_write_tables", None)
    sentinel = 2**30
    for count in (1, 1, 40):
        before = PageTable.of(manager, ids).num_blocks()
        manager.append(ids, count)
        table = PageTable.of(manager, ids)
        batch.block_tables.fill_(sentinel)
        batch.advance(table)
        columns = np.arange(batch.block_tables.shape[1])
        is_new = (columns >= before[:, None]) & (columns < table.num_blocks()[:, None])
        assert ((batch.block_tables.numpy() != sentinel) == is_new).all()


def test_more_new_entries_than_there_is_room_for_are_sent_all_the_same(device, monkeypatch):
    monkeypatch.setattr(batch_memory, "ROOM", 0)
    manager = BlockManager(200, BLOCK)
    ids = manager.allocate([3] * NUM_SEQUENCES)
    batch = AttentionBatch.of(PageTable.of(manager, ids), 1, device, LONGEST)
    for count in (1, 60, 1, 20, 100):
        manager.append(ids, count)
        table = PageTable.of(manager, ids)
        batch.advance(table)
        check_tensors(batch, table, 1)


@pytest.mark.parametrize("queries", [[4, 1, 0, 7], [0, 0, 12, 0], [3, 3, 3, 3]], ids=str)
def test_a_batch_of_several_query_tokens_advances_to_as_many_in_all(device, queries):
    manager = BlockManager(200, BLOCK)
    ids = manager.allocate([16, 20, 31, 32])
    batch = AttentionBatch.of(PageTable.of(manager, ids), [12, 0, 0, 0], device, LONGEST)
    manager.append(ids, 9)
    table = PageTable.of(manager, ids)
    batch.advance(table, queries)
    check_tensors(batch, table, queries)


def test_padding_sequences_come_and_go(device):
    tables = np.arange(16, dtype=np.int32).reshape(4, 4)
    batch = AttentionBatch.of(
        PageTable(BLOCK, tables, np.array([60, 1, 30, 0])), [2, 1, 0, 0], device
    )
    table = PageTable(BLOCK, tables + 16, np.array([0, 0, 31, 17]))
    batch.advance(table, [0, 0, 2, 1])
    check_tensors(batch, table, [0, 0, 2, 1])


def test_tensors_are_copies_of_page_tables_that_stay_as_they_are():
    manager = BlockManager(200, BLOCK)
    ids = manager.allocate([16, 20, 31, 32])
    table = PageTable.of(manager, ids)
    by_hand = dataclasses.replace(
        table, block_tables=table.block_tables.copy(), num_tokens=table.num_tokens.copy()
    )
    arrays = [t for made in (table, by_hand) for t in (made.block_tables, made.num_tokens)]
    before = [array.copy() for array in arrays]
    batches = [AttentionBatch.of(made) for made in (table, by_hand)]
    for batch in batches:
        for step in (table, by_hand):
            batch.advance(step)
        for field in FIELDS:
            assert not any(np.shares_memory(getattr(batch, field).numpy(), a) for a in arrays)
            getattr(batch, field).fill_(7)
    for array, expected in zip(arrays, before, strict=True):
        assert (array == expected).all()
    with pytest.raises(ValueError, match="read-only"):
        table.block_tables[0, 0] = 1
    with pytest.raises(ValueError, match="read-only"):
        table.num_tokens[0] = 1


@pytest.mark.parametrize(
    ("lengths", "queries", "sentence"),
    [
        ([8 * BLOCK + 1, 8], 1, "max_kv_length is 129"),
        ([3, 8], 2, "max_query_length is 2"),
        ([3], 1, "kv_lengths has shape"),
        ([3, 8], [1, 0], "slots has shape"),
        ([3, 8], 9, "must be from 0 to each sequence's length"),
    ],
)
def test_a_step_that_does_not_fit_changes_nothing(lengths, queries, sentence):
    manager = BlockManager(64, BLOCK)
    ids = manager.allocate([9, 9])
    batch = AttentionBatch.of(PageTable.of(manager, ids), max_kv_length=8 * BLOCK)
    before = [getattr(batch, field).clone() for field in FIELDS]
    other = PageTable.of(manager, manager.allocate(lengths))
    with pytest.raises(ValueError, match=sentence):
        batch.advance(other, queries)
    assert all(torch.equal(getattr(batch, f), old) for f, old in zip(FIELDS, before, strict=True))
    manager.append(ids, 30)
    batch.advance(PageTable.of(manager, ids))
    check_tensors(batch, PageTable.of(manager, ids), 1)


def test_a_page_table_that_is_too_wide_is_refused():
    wide = PageTable(BLOCK, np.zeros((2, 9), np.int32), np.array([9, 9]))
    batch = AttentionBatch.of(PageTable(BLOCK, np.zeros((2, 8), np.int32), np.array([9, 9])))
    with pytest.raises(ValueError, match="block tables are 9 blocks wide"):
        batch.advance(wide)


def test_a_batch_whose_tensors_lie_elsewhere_advances_too(device):
    manager = BlockManager(200, BLOCK)
    ids = manager.allocate([16, 20, 31, 32])
    made = AttentionBatch.of(PageTable.of(manager, ids), 1, device, LONGEST)
    for moved in (
        dataclasses.replace(made, block_tables=made.block_tables.clone()),
        AttentionBatch(*(getattr(made, field).clone() for field in FIELDS), 1, LONGEST),
    ):
        manager.append(ids, 20)
        table = PageTable.of(manager, ids)
        other = dataclasses.replace(table, block_tables=table.block_tables + 1000)
        for step in (table, other):
            moved.advance(step)
            check_tensors(moved, step, 1)
    # and one that was written by hand, then by tables of which it knows what it holds
    made.update(moved)
    for _ in range(2):
        manager.append(ids, 9)
        made.advance(PageTable.of(manager, ids))
        check_tensors(made, PageTable.of(manager, ids), 1)


def test_a_second_kind_of_layer_has_a_plan_that_grows_too(device):
    manager = BlockManager(200, BLOCK)
    ids = manager.fork(manager.allocate([48]), NUM_SEQUENCES)
    manager.append(ids, [20, 17, 33, 18])
    batch = AttentionBatch.of(PageTable.of(manager, ids), 1, device, LONGEST, share=True)
    plans = [batch.sharing.plan(layer, batch) for layer in (ALWAYS, OTHER)]
    lengths = {plan.tensors.own_lengths.data_ptr() for plan in plans}
    assert len(lengths) == 2
    for _ in range(20):
        manager.append(ids)
        table = PageTable.of(manager, ids)
        batch.advance(table)
        for plan in plans:
            assert check_plan(plan, table, [1] * NUM_SEQUENCES) == 3 * NUM_SEQUENCES


def test_an_update_by_other_blocks_is_known_to_the_next_step(device):
    manager = BlockManager(200, BLOCK)
    ids = manager.allocate([16, 20])
    table = PageTable.of(manager, ids)
    batch = AttentionBatch.of(table, 1, device, LONGEST)
    other = dataclasses.replace(table, block_tables=table.block_tables + 1000)
    batch.update(AttentionBatch.of(other, 1, device))
    manager.append(ids)
    batch.advance(PageTable.of(manager, ids))
    check_tensors(batch, PageTable.of(manager, ids), 1)


@pytest.mark.parametrize("step", ["update", "advance"])
def test_what_is_written_through_one_replaced_tensor_is_known_to_the_next_step(device, step):
    manager = BlockManager(200, BLOCK)
    ids, others = manager.allocate([40, 20]), manager.allocate([33, 17])
    batch = AttentionBatch.of(PageTable.of(manager, ids), 1, device, LONGEST)
    replaced = dataclasses.replace(batch, kv_lengths=batch.kv_lengths.clone())
    table = PageTable.of(manager, others)
    if step == "update":
        replaced.update(AttentionBatch.of(table, 1, device))
    else:
        replaced.advance(table)
    manager.append(ids)
    batch.advance(PageTable.of(manager, ids))
    check_tensors(batch, PageTable.of(manager, ids), 1)


def test_a_plan_follows_blocks_that_the_batch_without_sharing_was_told_of(device):
    manager = BlockManager(200, BLOCK)
    ids = manager.fork(manager.allocate([48]), NUM_SEQUENCES)
    manager.append(ids, 20)
    batch = AttentionBatch.of(PageTable.of(manager, ids), 1, device, LONGEST, share=True)
    plan = batch.sharing.plan(ALWAYS, batch)
    manager.append(ids, 20)
    batch.without_sharing().advance(PageTable.of(manager, ids))
    manager.append(ids)
    table = PageTable.of(manager, ids)
    batch.advance(table)
    assert check_plan(plan, table, [1] * NUM_SEQUENCES) == 3 * NUM_SEQUENCES


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda table: pickle.loads(pickle.dumps(table))])
def test_what_is_changed_in_a_copy_of_a_page_table_is_sent(device, copied):
    manager = BlockManager(200, BLOCK)
    table = copied(PageTable.of(manager, manager.allocate([40, 20])))
    batch = AttentionBatch.of(table, 1, device, LONGEST)
    table.block_tables[0, 0] = 77
    batch.advance(table)
    check_tensors(batch, table, 1)


@pytest.mark.parametrize(
    ("lengths", "bound", "is_full"),
    [([32, 32], None, True), ([32, 32], 33, False), ([32, 31], None, False)],
)
def test_a_batch_is_full_where_all_sequences_are_as_long_as_it_allows(lengths, bound, is_full):
    table = PageTable(BLOCK, np.zeros((2, 3), np.int32), np.array(lengths))
    assert AttentionBatch.of(table, max_kv_length=bound).is_full is is_full


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_gpu_and_comes_after_what_reads_the_step_before():
    manager = BlockManager(20_000, BLOCK)
    ids = manager.fork(manager.allocate([4096]), 64)
    manager.append(ids, 20)
    batch = AttentionBatch.of(PageTable.of(manager, ids), 1, "cuda", 8192, share=True)
    plan = batch.sharing.plan(ALWAYS, batch)
    tables, seen = [], []
    for _ in range(8):
        manager.append(ids, 7)
        tables.append(PageTable.of(manager, ids))
    steps = [*tables, *(dataclasses.replace(table) for table in tables)]
    for table in steps:  # staging memory of all sizes is there before anything is timed
        batch.advance(table)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(1_000_000_000)
    for table in steps:
        batch.advance(table)
        seen.append([getattr(batch, field).clone() for field in FIELDS])
        seen[-1] += [plan.tensors.own_lengths.clone(), plan.tensors.own_tables.clone()]
    done.record()
    assert not done.query()
    torch.cuda.synchronize()
    for table, clones in zip(steps, seen, strict=True):
        held = dataclasses.replace(batch, **dict(zip(FIELDS, clones, strict=False)))
        check_tensors(held, table, 1)
        own = clones[4].cpu().numpy()
        assert (own == table.num_tokens - 4096).all()
        for row, blocks in enumerate(-(-own // BLOCK)):
            expected = table.block_tables[row, 256 : 256 + blocks]
            assert clones[5][row, :blocks].tolist() == expected.tolist()
