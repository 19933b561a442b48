"""The block manager, an operation at a time."""

import doctest

import numpy as np
import pytest

from pagedattn import BlockManager, OutOfBlocksError, UnknownSequenceError
from pagedattn.block_manager import manager as manager_module

from .managers import tables


def state(manager):
    """All that an operation could change, as bytes."""
    pool, rows, lists = manager._pool, manager._tables.rows, manager._tables.lists
    live = rows.live_rows()
    arrays = (
        pool._queue[pool._head : pool._tail],
        pool._place,
        pool._ref_counts,
        rows._ids,
        rows._next_ids,
        rows._unused[: rows.capacity - rows.num_live],
        rows.num_tokens,
        rows.forked,
        rows.swapped,
        lists.entries[manager._tables.held(live)],
        lists.first,
        lists.start,
        lists.limit,
    )
    return [pool.num_free, *(array.tobytes() for array in arrays)]


@pytest.mark.parametrize(("num_tokens", "blocks"), [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_a_prompt_takes_the_blocks_that_hold_it(num_tokens, blocks):
    manager = BlockManager(16, 4)
    (sequence,) = manager.allocate(num_tokens)
    assert manager.num_free_blocks == 16 - blocks
    assert len(set(tables(manager, [sequence])[0])) == blocks
    assert manager.num_tokens([sequence]).tolist() == [num_tokens]
    manager.check_integrity()


def test_a_batch_of_prompts_shares_no_block():
    manager = BlockManager(16, 4)
    ids = manager.allocate([1, 4, 9])
    blocks = [block for table in tables(manager, ids) for block in table]
    assert len(blocks) == len(set(blocks)) == 5
    assert manager.sequence_ids().tolist() == ids.tolist()
    manager.check_integrity()


def test_empty_batches_change_nothing():
    manager = BlockManager(4, 4)
    manager.allocate([5])
    before = state(manager)
    assert manager.allocate([]).size == 0
    assert len(manager.append([])) == 0
    manager.free([])
    padded, lengths = manager.block_tables([])
    assert padded.shape == (0, 0)
    assert lengths.size == 0
    assert state(manager) == before


@pytest.mark.parametrize("new", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("length", [1, 3, 4, 5])
def test_tokens_are_appended_to_the_last_block_and_to_new_ones(length, new):
    manager = BlockManager(32, 4)
    ids = manager.allocate([length, 7])
    before = tables(manager, ids)
    copies = manager.append(ids, new)
    after = tables(manager, ids)
    assert len(copies) == 0
    assert [table[: len(old)] for table, old in zip(after, before, strict=True)] == before
    assert [len(table) for table in after] == [-(-(n + new) // 4) for n in (length, 7)]
    assert manager.num_tokens(ids).tolist() == [length + new, 7 + new]
    manager.check_integrity()


def test_each_sequence_of_a_batch_may_get_another_number_of_tokens():
    manager = BlockManager(32, 4)
    ids = manager.allocate([1, 2, 3])
    manager.append(ids[::-1], [1, 5, 9])
    assert manager.num_tokens(ids).tolist() == [10, 7, 4]
    manager.check_integrity()


def test_a_fork_takes_no_block():
    manager = BlockManager(8, 4)
    (parent,) = manager.allocate([6])
    forks = manager.fork(parent, 3)
    assert manager.num_free_blocks == 6
    assert manager.num_sequences == 4
    assert tables(manager, forks) == tables(manager, [parent]) * 3
    assert manager.ref_counts(tables(manager, [parent])[0]).tolist() == [4, 4]
    manager.check_integrity()


@pytest.mark.parametrize("writers", [1, 2, 3])
def test_each_divergence_copies_one_block_and_the_last_owner_keeps_it(writers):
    manager = BlockManager(16, 4)
    (parent,) = manager.allocate([6])
    family = [parent, *manager.fork(parent, 2)]
    shared = tables(manager, [parent])[0]
    copies = manager.append(family[:writers])
    assert len(copies) == min(writers, 2)
    assert set(copies.sources.tolist()) == {shared[1]}
    assert not set(copies.destinations.tolist()) & set(shared)
    assert len(set(copies.destinations.tolist())) == len(copies)
    last = [table[1] for table in tables(manager, family)]
    assert len(set(last[:writers])) == writers
    assert all(table[0] == shared[0] for table in tables(manager, family))
    assert manager.num_free_blocks == 16 - 2 - len(copies)
    manager.check_integrity()


def test_forks_that_diverge_one_after_the_other_copy_once_less_than_they_are():
    manager = BlockManager(16, 4)
    (parent,) = manager.allocate([6])
    family = [parent, *manager.fork(parent, 3)]
    assert [len(manager.append([member])) for member in family] == [1, 1, 1, 0]
    manager.check_integrity()


def test_a_fork_at_a_block_boundary_copies_nothing():
    manager = BlockManager(16, 4)
    (parent,) = manager.allocate([8])
    family = [parent, *manager.fork(parent, 1)]
    assert len(manager.append(family)) == 0
    first, second = tables(manager, family)
    assert first[:2] == second[:2]
    assert first[2] != second[2]


def test_several_families_diverge_in_one_call():
    manager = BlockManager(32, 4)
    parents = manager.allocate([6, 7, 5])
    forks = np.concatenate([manager.fork(int(parent)) for parent in parents])
    copies = manager.append(np.concatenate([parents, forks]), 3)
    assert len(copies) == 3
    assert len(set(copies.sources.tolist())) == 3
    manager.check_integrity()


def test_a_block_is_freed_with_its_last_owner():
    manager = BlockManager(8, 4)
    (parent,) = manager.allocate([6])
    (child,) = manager.fork(parent)
    manager.free([parent])
    assert manager.num_free_blocks == 6
    manager.check_integrity()
    manager.free([child])
    assert manager.num_free_blocks == 8
    manager.check_integrity()


def test_owners_of_one_block_may_be_freed_in_one_call():
    manager = BlockManager(8, 4)
    (parent,) = manager.allocate([6])
    forks = manager.fork(parent, 2)
    manager.free([parent, *forks])
    assert manager.num_free_blocks == 8
    manager.check_integrity()


def test_memory_that_runs_out_is_said_and_changes_nothing():
    manager = BlockManager(4, 4)
    (parent,) = manager.allocate([14])
    (fork,) = manager.fork(parent)
    before = state(manager)
    for operation in (
        lambda: manager.allocate([1]),
        lambda: manager.allocate([1, 900]),
        lambda: manager.append([parent]),
        lambda: manager.append([parent, fork], 3),
        lambda: manager.append([parent], 900),
    ):
        with pytest.raises(OutOfBlocksError, match="blocks and 0 are free") as caught:
            operation()
        assert caught.value.free == 0
        assert caught.value.needed >= 1
        assert state(manager) == before
    manager.check_integrity()


def test_the_last_block_can_be_used():
    manager = BlockManager(4, 4)
    (sequence,) = manager.allocate([12])
    manager.append([sequence])
    assert manager.num_free_blocks == 0
    manager.append([sequence], 3)
    with pytest.raises(OutOfBlocksError):
        manager.append([sequence])


def test_freed_unknown_and_reused_ids_are_refused():
    manager = BlockManager(8, 4)
    live, gone = (int(sequence) for sequence in manager.allocate([3, 3]))
    manager.free([gone])
    (again,) = manager.allocate([3])  # takes the row of the one that is gone
    assert again not in (live, gone)
    before = state(manager)
    for unknown in (gone, 12345, -1, 2**62):
        for operation in (
            lambda ids: manager.free(ids),
            lambda ids: manager.append(ids),
            lambda ids: manager.num_tokens(ids),
            lambda ids: manager.block_tables(ids),
            lambda ids: manager.fork(ids[-1]),
        ):
            with pytest.raises(UnknownSequenceError, match=f"sequence {unknown} is not live"):
                operation([live, unknown])
            assert state(manager) == before


def test_a_sequence_given_twice_is_refused():
    manager = BlockManager(8, 4)
    first, second = manager.allocate([3, 3])
    before = state(manager)
    for operation in (manager.free, manager.append):
        with pytest.raises(ValueError, match=f"sequence {second} is given twice"):
            operation([second, first, second])
        assert state(manager) == before


@pytest.mark.parametrize("bad", [0, -1, [3, 0], 1.5, [1.0], True, [[1, 2]], "4"])
def test_lengths_that_are_no_positive_whole_numbers_are_refused(bad):
    manager = BlockManager(8, 4)
    (sequence,) = manager.allocate([3])
    before = state(manager)
    for operation in (manager.allocate, lambda n: manager.append([sequence], n)):
        with pytest.raises(ValueError, match=r"at least 1|whole number"):
            operation(bad)
        assert state(manager) == before


def test_a_wrong_number_of_counts_is_refused():
    manager = BlockManager(8, 4)
    ids = manager.allocate([3, 3, 3])
    with pytest.raises(ValueError, match="2 token counts were given for 3 sequences"):
        manager.append(ids, [1, 1])


@pytest.mark.parametrize("num_blocks", [0, -1, 2**31])
def test_an_impossible_pool_is_refused(num_blocks):
    with pytest.raises(ValueError, match=f"num_blocks is {num_blocks}"):
        BlockManager(num_blocks, 16)


def test_an_impossible_block_or_number_of_forks_is_refused():
    with pytest.raises(ValueError, match="block_size is 0"):
        BlockManager(4, 0)
    manager = BlockManager(4, 4)
    (sequence,) = manager.allocate([1])
    with pytest.raises(ValueError, match="num_forks is 0"):
        manager.fork(sequence, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"watermark": 1.5}, "watermark is 1.5"),
        ({"watermark": -0.1}, "watermark is -0.1"),
        ({"num_host_blocks": -1}, "num_host_blocks is -1"),
        ({"watermark": "x"}, "watermark is 'x'"),
        ({"num_host_blocks": 1.5}, "num_host_blocks is 1.5"),
        ({"num_blocks": "8"}, "num_blocks is '8'"),
        ({"block_size": True}, "block_size is True"),
        ({"windows": ()}, r"windows is \(\)"),
        ({"windows": 16}, "windows is 16"),
        ({"windows": (0,)}, "a window is 0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BlockManager(**{"num_blocks": 4, "block_size": 4} | options)


def test_asking_whether_prompts_fit_changes_nothing():
    manager = BlockManager(4, 4)
    before = state(manager)
    assert manager.can_allocate([16])
    assert manager.can_allocate([8, 8])
    assert not manager.can_allocate([8, 8, 1])
    assert not manager.can_allocate(17)
    assert state(manager) == before


def test_many_sequences_and_long_ones_grow_the_tables():
    manager = BlockManager(200_000, 1)
    ids = manager.allocate(np.full(40, 3))
    (long,) = manager.allocate([100_000])
    manager.append(ids)
    manager.append([long], 50_000)
    assert manager.num_tokens([long]).tolist() == [150_000]
    assert manager.block_tables([long])[0].max() > 65_535
    manager.check_integrity()
    manager.free(manager.sequence_ids())
    assert manager.num_free_blocks == 200_000
    manager.check_integrity()


def test_ids_are_never_used_again():
    manager = BlockManager(8, 4)
    seen = set()
    for _ in range(200):
        ids = manager.allocate([1, 1]).tolist()
        assert not seen & set(ids)
        seen.update(ids)
        manager.free(ids)


@pytest.mark.parametrize("damage", ["count", "table", "queue", "place", "length", "extent", "row"])
def test_damage_is_found(damage):
    manager = BlockManager(8, 4)
    (sequence,) = manager.allocate([6])
    manager.free(manager.allocate([8]))
    manager.check_integrity()
    pool, rows, lists = manager._pool, manager._tables.rows, manager._tables.lists
    if damage == "count":
        pool._ref_counts[tables(manager, [sequence])[0][0]] += 1
    elif damage == "table":
        lists.entries[lists.start[0]] = 7
    elif damage == "queue":
        pool._queue[pool._head] = tables(manager, [sequence])[0][0]
    elif damage == "place":
        pool._place[tables(manager, [sequence])[0][0]] = 1
    elif damage == "length":
        rows.num_tokens[0] = 9
    elif damage == "extent":
        lists.limit[0] += 8
    else:
        rows.num_live += 1
    with pytest.raises(AssertionError):
        manager.check_integrity()


def test_the_example_in_the_docstring_runs():
    result = doctest.testmod(manager_module)
    assert result.attempted > 3
    assert result.failed == 0
