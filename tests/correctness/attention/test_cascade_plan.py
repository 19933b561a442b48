"""A plan stays in place while its batch goes on, and is made anew only where it has to be."""

import numpy as np
import pytest

from pagedattn import PageTable, shared_prefix
from pagedattn.attention import AttentionBatch
from pagedattn.attention.cascade import plan as plan_module
from pagedattn.attention.cascade import sharing as sharing_module
from pagedattn.attention.cascade.costs import GPU, Layer

from .shared_tables import BLOCK, KINDS, check_plan, one_prefix, tree_tables

ALWAYS, WHERE_IT_PAYS = (Layer(8, 2, 64, 2, 132, costs) for costs in (None, GPU))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture
def calls(monkeypatch):
    """Names of what has been called, of a search and a schedule."""
    called = []

    def count(module, name):
        function = getattr(module, name)

        def counted(*args):
            called.append(name)
            return function(*args)

        monkeypatch.setattr(module, name, counted)

    count(shared_prefix, "_find")
    for module in (plan_module, sharing_module):
        count(module, "make_schedule")
    return called


def growing(rng, queries):
    """Yield page tables in which sequences have a whole own block, and then more and more.

    Sequences without queries wait, and the first of them is padding, with no tokens at all.
    """
    table, used = tree_tables(rng, queries)
    columns = np.arange(table.block_tables.shape[1] + 8)
    own = np.arange(used, used + len(queries) * columns.size, dtype=np.int32)
    tables = np.pad(table.block_tables, ((0, 0), (0, 8)))
    tables = np.where(columns < table.num_blocks()[:, None], tables, own.reshape(tables.shape))
    waits = np.equal(queries, 0)
    lengths = BLOCK * (table.num_blocks() + 1) + queries
    lengths[waits.nonzero()[0][:1]] = 0
    while True:
        width = -(-lengths.max() // BLOCK)
        yield PageTable(BLOCK, np.ascontiguousarray(tables[:, :width]), lengths)
        lengths = lengths + np.where(waits, 0, rng.integers(0, BLOCK + 2, lengths.size))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_steps_in_which_sequences_grow_need_no_search_and_no_schedule(device, calls, kind, seed):
    queries = np.array(KINDS[kind])
    steps = growing(np.random.default_rng(seed), queries)
    table = next(steps)
    longest = int(table.num_tokens.max()) + 5 * (BLOCK + 1)
    batch = AttentionBatch.of(table, queries, device, longest, share=True)
    assert calls == []
    plan = batch.sharing.plan(ALWAYS, batch)
    assert calls == ["_find", "make_schedule"]
    shared = check_plan(plan, table, queries)
    assert shared > 0
    tensors = vars(plan.tensors).values()
    places = [tensor.data_ptr() for tensor in tensors]
    for _ in range(5):
        table = next(steps)
        batch.update(AttentionBatch.of(table, queries, device))
        assert check_plan(plan, table, queries) == shared
        assert plan.schedule.own_lengths.tolist() == plan.tensors.own_lengths.tolist()
    assert batch.sharing.plan(ALWAYS, batch) is plan
    assert [tensor.data_ptr() for tensor in tensors] == places
    assert len(calls) == 2


def test_other_query_lengths_over_the_same_tree_need_a_schedule_and_no_search(device, calls):
    table = one_prefix(blocks=4, members=4, own=3)
    batch = AttentionBatch.of(table, [4, 1, 0, 1], device, share=True)
    plan = batch.sharing.plan(ALWAYS, batch)
    for queries in ([1, 4, 0, 1], [0, 2, 2, 2]):
        calls.clear()
        batch.update(AttentionBatch.of(table, queries, device))
        assert check_plan(plan, table, queries) == 4 * 6
        assert calls == ["make_schedule"]


def test_a_sequence_that_is_replaced_is_searched_for(device, calls):
    table = one_prefix(blocks=4, members=4, own=3)
    batch = AttentionBatch.of(table, 1, device, share=True)
    plan = batch.sharing.plan(ALWAYS, batch)
    tables = table.block_tables.copy()
    tables[2, 1:4] = [97, 98, 99]
    calls.clear()
    other = PageTable(BLOCK, tables, table.num_tokens)
    batch.update(AttentionBatch.of(other, 1, device))
    assert check_plan(plan, other, [1] * 4) == 3 * 4 + 1
    assert calls == ["_find", "make_schedule"]


def test_where_sharing_does_not_pay_a_step_is_told_so_without_a_search(calls):
    steps = growing(np.random.default_rng(0), KINDS["decode"])
    table = next(steps)
    batch = AttentionBatch.of(table, 1, max_kv_length=int(table.num_tokens.max()) + 100)
    assert batch.sharing.plan(WHERE_IT_PAYS, batch) is None
    for _ in range(3):
        batch.update(AttentionBatch.of(next(steps)))
        assert batch.sharing.plan(WHERE_IT_PAYS, batch) is None
    assert calls == ["_find", "make_schedule"]
    batch.update(AttentionBatch.of(one_prefix(blocks=4, members=9, own=2)))
    assert batch.sharing.plan(WHERE_IT_PAYS, batch) is None
    assert calls == ["_find", "make_schedule"] * 2


def test_a_batch_without_a_plan_is_not_searched(calls):
    batch = AttentionBatch.of(one_prefix(blocks=4, members=9, own=3), share=True)
    batch.update(AttentionBatch.of(one_prefix(blocks=5, members=9, own=2)))
    assert calls == []
    (node,) = batch.sharing.nodes
    assert node.end == 5


def test_callers_may_reuse_their_arrays_before_anything_is_searched_for(device):
    first, second = (one_prefix(blocks=blocks, members=4, own=3) for blocks in (4, 3))
    queries = np.array([4, 1, 1, 1])

    def batch_of(table):
        parts = table.block_tables.copy(), table.num_tokens.copy(), queries.copy()
        made = AttentionBatch.of(PageTable(BLOCK, *parts[:2]), parts[2], device, share=True)
        for part in parts:
            part[:] = 1
        return made

    batch = batch_of(first)
    plan = batch.sharing.plan(ALWAYS, batch)
    assert check_plan(plan, first, queries) == 4 * 7
    assert plan.schedule.own_lengths.tolist() == [3 * BLOCK] * 4
    batch.update(batch_of(second))
    assert check_plan(plan, second, queries) == 3 * 7
