"""Groups leave for the host and come back, blocks leave windows, and steps finish before reuse."""

import numpy as np
import pytest
import torch

from pagedattn import BlockManager, KVCache, OutOfBlocksError, PageTable, SwappedOutError


def tables(manager, ids, layer_group=0):
    padded, lengths = manager.block_tables(ids, layer_group)
    blocks = -(-lengths // manager.block_size)
    return [row[:count].tolist() for row, count in zip(padded, blocks, strict=True)]


def fails(copies):
    assert len(copies)
    raise ConnectionError


def state(manager):
    """What a failed operation leaves as it was; blocks it took are no longer never used."""
    arrays = manager.snapshot().arrays
    kept = [name for name in arrays if name.split("_")[-1] not in ("empty", "counters")]
    return [
        manager.num_free_blocks,
        manager.num_free_host_blocks,
        *(arrays[name].tobytes() for name in kept),
    ]


# -- swapping ------------------------------------------------------------------------------


def test_a_group_moves_as_one_and_each_block_once():
    manager = BlockManager(16, 4, num_host_blocks=8, prefix_caching=False)
    (parent, other) = manager.allocate([10, 4])
    forks = manager.fork(parent, 2)
    manager.append([forks[0]])  # one block of its own
    group = sorted([parent, *forks])
    assert sorted(manager.sequence_group([forks[1]]).tolist()) == group
    before = dict(zip(group, tables(manager, group), strict=True))
    out = manager.swap_out([forks[1]])
    assert len(out) == 4
    assert manager.is_swapped_out([*group, other]).tolist() == [True] * 3 + [False]
    assert manager.num_free_blocks == 15
    assert manager.num_free_host_blocks == 4
    manager.check_integrity()

    back = manager.swap_in([parent])
    assert len(back) == 4
    assert sorted(back.sources.tolist()) == sorted(out.destinations.tolist())
    moved = dict(zip(out.sources.tolist(), out.destinations.tolist(), strict=True))
    returned = dict(zip(back.sources.tolist(), back.destinations.tolist(), strict=True))
    for sequence, table in zip(group, tables(manager, group), strict=True):
        assert table == [returned[moved[block]] for block in before[sequence]]
    assert manager.num_free_host_blocks == 8
    manager.check_integrity()


def test_swapping_is_all_or_none():
    manager = BlockManager(16, 4, num_host_blocks=3)
    ids = manager.allocate([8, 8])
    assert manager.can_swap_out([ids[0]])
    assert not manager.can_swap_out(ids)
    with pytest.raises(OutOfBlocksError) as caught:
        manager.swap_out(ids)
    assert (caught.value.needed, caught.value.free) == (4, 3)
    assert not manager.is_swapped_out(ids).any()
    manager.swap_out([ids[0]])
    (filler,) = manager.allocate([13 * 4])
    assert not manager.can_swap_in([ids[0]])
    with pytest.raises(OutOfBlocksError):
        manager.swap_in([ids[0]])
    manager.free([filler])
    assert manager.can_swap_in([ids[0]])
    manager.swap_in([ids[0]])
    manager.check_integrity()


@pytest.mark.parametrize("operation", ["append", "fork", "block_tables", "record", "swap_out"])
def test_what_is_swapped_out_is_not_used(operation):
    manager = BlockManager(16, 4, num_host_blocks=8)
    (sequence,) = manager.admit([range(6)]).sequence_ids
    manager.swap_out([sequence])
    arguments = ([sequence], [6]) if operation == "record" else ([sequence],)
    with pytest.raises(SwappedOutError, match=f"sequence {sequence} is swapped out"):
        getattr(manager, operation)(*arguments)
    manager.check_integrity()


def test_what_is_not_swapped_out_is_not_swapped_in():
    manager = BlockManager(16, 4, num_host_blocks=8)
    (sequence,) = manager.allocate([6])
    with pytest.raises(ValueError, match=f"sequence {sequence} is not swapped out"):
        manager.swap_in([sequence])


def test_without_a_host_pool_nothing_can_be_swapped():
    manager = BlockManager(16, 4)
    (sequence,) = manager.allocate([6])
    assert not manager.can_swap_out([sequence])
    with pytest.raises(OutOfBlocksError, match="2 host blocks and 0 are free"):
        manager.swap_out([sequence])


def test_a_swapped_sequence_can_end():
    manager = BlockManager(16, 4, num_host_blocks=8)
    (parent,) = manager.admit([range(6)]).sequence_ids
    (child,) = manager.fork(parent)
    manager.swap_out([parent])
    manager.free([parent])
    assert manager.num_free_host_blocks == 6
    manager.free([child])
    assert manager.num_free_host_blocks == 8
    manager.check_integrity()


def test_coming_back_shares_what_the_prefix_cache_still_holds():
    manager = BlockManager(16, 4, num_host_blocks=8)
    (sequence,) = manager.admit([range(10)]).sequence_ids
    before = tables(manager, [sequence])[0]
    assert len(manager.swap_out([sequence])) == 3
    assert manager.num_cached_blocks == 2
    back = manager.swap_in([sequence])
    assert len(back) == 1  # the last block is not full
    assert tables(manager, [sequence])[0][:2] == before[:2]
    manager.check_integrity()


def test_what_comes_back_is_findable_again():
    manager = BlockManager(4, 4, num_host_blocks=8)
    (sequence,) = manager.admit([range(10)]).sequence_ids
    manager.swap_out([sequence])
    manager.free(manager.allocate([16]))  # evicts everything
    assert len(manager.swap_in([sequence])) == 3
    manager.free([sequence])
    assert manager.admit([range(9)]).num_cached_tokens.tolist() == [8]
    manager.check_integrity()


@pytest.mark.parametrize("cached", [False, True])
def test_a_copy_that_fails_moves_nothing(cached):
    manager = BlockManager(8, 4, num_host_blocks=8, prefix_caching=cached)
    (parent,) = manager.admit([range(6)]).sequence_ids
    (child,) = manager.fork(parent)
    for operation in (manager.append, manager.swap_out):
        before = state(manager)
        with pytest.raises(ConnectionError):
            operation([child], copy=fails)
        assert state(manager) == before
    manager.swap_out([child])
    before = state(manager)
    with pytest.raises(ConnectionError):
        manager.swap_in([child], copy=fails)
    assert state(manager) == before
    manager.swap_in([child])
    manager.check_integrity()


def test_dropping_ends_the_whole_group_and_leaves_its_blocks_findable():
    manager = BlockManager(16, 4)
    (parent, other) = manager.admit([range(9), [5] * 4]).sequence_ids
    forks = manager.fork([parent, parent])
    assert sorted(manager.drop([forks[0]]).tolist()) == sorted([parent, *forks])
    assert manager.sequence_ids().tolist() == [other]
    assert manager.admit([range(9)]).num_cached_tokens.tolist() == [8]


def test_contents_survive_the_way_to_the_host_and_back():
    """The copy lists drive real caches, the second one as host memory."""
    sizes = {"num_layers": 2, "block_size": 4, "num_kv_heads": 2, "head_size": 8}
    device = KVCache(**sizes, num_blocks=6, dtype=torch.float32)
    host = KVCache(**sizes, num_blocks=9, dtype=torch.float32)
    device.storage.normal_()
    manager = BlockManager(6, 4, num_host_blocks=9, prefix_caching=False)
    (sequence,) = manager.allocate([11])

    def gather():
        return torch.stack(
            [torch.cat(device.gather(i, tables(manager, [sequence])[0], 11)) for i in range(2)]
        )

    before = gather()
    manager.swap_out([sequence], copy=lambda copies: host.copy_blocks(copies, device))
    device.storage.fill_(torch.nan)
    manager.free(manager.allocate([4]))
    manager.swap_in([sequence], copy=lambda copies: device.copy_blocks(copies, host))
    assert torch.equal(gather(), before)


def test_the_watermark_is_kept_from_new_and_returning_sequences_alone():
    manager = BlockManager(10, 4, num_host_blocks=10, watermark=0.2)
    (other,) = manager.allocate([4])
    assert manager.can_allocate([28])
    assert not manager.can_allocate([29])
    with pytest.raises(OutOfBlocksError):
        manager.allocate([29])
    with pytest.raises(OutOfBlocksError):
        manager.admit([range(29)])
    (sequence,) = manager.allocate([28])
    manager.append([sequence], 8)  # what runs may use all
    assert manager.num_free_blocks == 0
    manager.swap_out([sequence])
    assert not manager.can_swap_in([sequence])
    with pytest.raises(OutOfBlocksError):
        manager.swap_in([sequence])
    manager.free([other])
    manager.swap_in([sequence])  # nobody runs for whom blocks would have to be kept


def test_what_fits_the_pool_comes_back_whatever_the_watermark():
    manager = BlockManager(10, 4, num_host_blocks=10, watermark=1)
    (sequence,) = manager.allocate([40])
    manager.swap_out([sequence])
    assert manager.can_swap_in([sequence])
    manager.swap_in([sequence])
    assert not manager.can_allocate([1])
    manager.check_integrity()


# -- beam search ---------------------------------------------------------------------------


def test_beam_search_forks_what_is_kept_twice_and_drops_the_rest():
    manager = BlockManager(32, 4)
    (prompt,) = manager.allocate([6])
    beams = np.concatenate([[prompt], manager.fork(prompt, 3)])
    manager.append(beams)
    kept = [beams[1], beams[1], beams[2], beams[2]]
    survivors = manager.fork(kept)
    manager.free(beams)
    assert manager.num_sequences == 4
    copies = manager.append(survivors)
    assert len(copies) == 2  # of each pair, one
    manager.check_integrity()


def test_beams_that_diverge_copy_one_block_each():
    manager = BlockManager(32, 4)
    (prompt,) = manager.allocate([5])
    beams = np.concatenate([[prompt], manager.fork(prompt, 3)])
    assert len(manager.append(beams)) == 3
    next_beams = manager.fork([beams[0], beams[0], beams[3], beams[3]])
    manager.free(beams)
    assert len(manager.append(next_beams)) == 2
    assert manager.num_free_blocks == 32 - 1 - 4
    assert manager.statistics().num_copied_blocks == 5
    manager.check_integrity()


# -- sliding windows and layer groups ------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 4, 5, 6, 9, 100])
@pytest.mark.parametrize("block_size", [1, 4])
def test_blocks_that_no_query_will_see_go_back(window, block_size):
    manager = BlockManager(64, block_size, windows=(window,), prefix_caching=False)
    (sequence,) = manager.allocate([7])
    for position in range(7, 30):
        manager.append([sequence])
        first_seen = max(0, position - window + 1)
        held = position // block_size - first_seen // block_size + 1
        assert manager.num_free_blocks == 64 - held
        table = tables(manager, [sequence])[0]
        assert not any(table[: first_seen // block_size])
        manager.check_integrity()


def test_a_sequence_longer_than_the_pool_fits_its_window():
    manager = BlockManager(4, 4, windows=(8,))
    (sequence,) = manager.allocate([4])
    for _ in range(400):
        manager.append([sequence])
    assert manager.num_tokens([sequence]).tolist() == [404]
    manager.check_integrity()


def test_blocks_that_leave_a_window_serve_the_same_call():
    manager = BlockManager(2, 4, windows=(4,), prefix_caching=False)
    (sequence,) = manager.allocate([8])
    manager.append([sequence])
    assert manager.num_free_blocks == 0  # the window of token 8 reaches back to token 5
    manager.append([sequence], 3)
    manager.append([sequence])  # token 12 sees 9 to 11: block 1 leaves, a new one comes
    assert manager.num_free_blocks == 0
    manager.check_integrity()


def test_each_layer_group_has_tables_of_its_own_on_one_pool():
    manager = BlockManager(64, 4, windows=(None, 6), prefix_caching=False)
    (sequence,) = manager.allocate([16])
    manager.append([sequence])
    full, sliding = (PageTable.of(manager, [sequence], group) for group in (0, 1))
    assert full.block_tables.shape == sliding.block_tables.shape == (1, 5)
    assert (sliding.block_tables[0] > 0).tolist() == [False, False, True, True, True]
    held = [*full.block_tables[0], *sliding.block_tables[0, 2:]]
    assert len(set(held)) == 8
    assert manager.num_free_blocks == 64 - 8
    assert full.slots().tolist() != sliding.slots().tolist()
    with pytest.raises(ValueError, match="layer_group is 2; there are 2"):
        PageTable.of(manager, [sequence], 2)


def test_forks_of_all_layer_groups_copy_on_write():
    manager = BlockManager(64, 4, windows=(None, 6, 100))
    (parent,) = manager.allocate([6])
    (child,) = manager.fork(parent)
    copies = manager.append([child])
    assert len(copies) == 3
    for group in range(3):
        (one,), (two,) = (tables(manager, [i], group) for i in (parent, child))
        assert one[0] == two[0]
        assert one[1] != two[1]
    manager.check_integrity()


def test_a_window_needs_only_its_last_blocks_from_the_cache():
    """After a long prompt's first blocks were evicted, a window still finds its last ones."""
    manager = BlockManager(12, 4, windows=(5,), seed=b"s")
    (sequence,) = manager.admit([range(32)]).sequence_ids
    manager.append([sequence], token_ids=[1])  # seven blocks leave the window, head last freed
    manager.free([sequence])
    again = manager.admit([range(33)])
    assert again.num_cached_tokens.tolist() == [32]
    table = tables(manager, again.sequence_ids)[0]
    assert sum(block > 0 for block in table) <= 2
    manager.check_integrity()


@pytest.mark.parametrize(("evicted", "found"), [(0, 12), (2, 12), (3, 8), (4, 8), (5, 4), (8, 0)])
def test_a_prompt_is_cached_as_far_as_all_layer_groups_have_it(evicted, found):
    manager = BlockManager(16, 4, windows=(None, 5))
    manager.free(manager.admit([range(16)]).sequence_ids)
    assert manager.num_cached_blocks == 8
    # the last block of either group goes first
    manager._pool.put_back(manager._pool.take(8 + evicted))
    assert manager.num_cached_blocks == 8 - evicted
    admission = manager.admit([range(16)])
    assert admission.num_cached_tokens.tolist() == [found]
    manager.check_integrity()


# -- work in flight ------------------------------------------------------------------------


def test_a_freed_block_waits_for_the_steps_that_read_it():
    manager = BlockManager(2, 4, prefix_caching=False)
    (sequence,) = manager.allocate([8])
    first, second = manager.start_step(), manager.start_step()
    manager.free([sequence])
    assert manager.num_free_blocks == 0
    assert manager.num_deferred_blocks == 2
    assert not manager.can_allocate([1])
    manager.finish_step(first)
    with pytest.raises(OutOfBlocksError):
        manager.allocate([1])
    manager.finish_step(second)
    assert manager.num_deferred_blocks == 0
    manager.allocate([8])


def test_a_delayed_reader_never_sees_its_blocks_overwritten():
    """A step reads only when it is finished, long after its sequences were freed."""
    manager = BlockManager(12, 2, prefix_caching=False)
    memory = np.zeros(12, dtype=int)
    rng = np.random.default_rng(0)
    running, number = [], 0
    for _ in range(300):
        number += 1
        lengths = rng.integers(1, 5, rng.integers(1, 3))
        if manager.can_allocate(lengths):
            for table in tables(manager, manager.allocate(lengths)):
                memory[table] = number
        ids = manager.sequence_ids()
        held = [block for table in tables(manager, ids) for block in table]
        blocks = np.array(held, dtype=int)
        running.append((manager.start_step(), blocks, memory[blocks].copy()))
        if ids.size:
            manager.free(rng.permutation(ids)[: rng.integers(0, ids.size + 1)])
        while len(running) > rng.integers(0, 4):
            step, blocks, seen = running.pop(0)
            assert (memory[blocks] == seen).all()
            manager.finish_step(step)
        manager.check_integrity()
    assert number == 300


def test_a_step_may_say_itself_that_it_is_done():
    manager = BlockManager(2, 4)
    (sequence,) = manager.allocate([8])
    done = []
    manager.start_step(is_done=lambda: bool(done))
    manager.free([sequence])
    assert not manager.can_allocate([8])
    done.append(True)
    assert manager.can_allocate([8])
    manager.allocate([8])


def test_a_deferred_block_can_still_be_found():
    manager = BlockManager(3, 4)
    (sequence,) = manager.admit([range(8)]).sequence_ids
    before = tables(manager, [sequence])[0]
    step = manager.start_step()
    manager.free([sequence])
    admission = manager.admit([range(9)])
    assert admission.num_cached_tokens.tolist() == [8]
    assert tables(manager, admission.sequence_ids)[0][:2] == before
    manager.finish_step(step)
    assert manager.num_free_blocks == 0
    manager.check_integrity()


def test_what_a_failed_step_was_to_write_is_not_found():
    manager = BlockManager(32, 4)
    good = manager.admit([range(9)]).sequence_ids
    manager.finish_step(manager.start_step())
    bad = manager.admit([[7] * 9, [*range(8), 1]]).sequence_ids
    manager.append(good, 4, token_ids=range(9, 13))
    step = manager.start_step()
    manager.fail_step(step)
    manager.drop([*bad])
    assert manager.admit([[7] * 9]).num_cached_tokens.tolist() == [0]
    assert manager.admit([range(13)]).num_cached_tokens.tolist() == [8]
    manager.check_integrity()


def test_if_the_first_step_fails_nothing_is_found():
    manager = BlockManager(32, 4)
    ids = manager.admit([range(9)]).sequence_ids
    manager.fail_step(manager.start_step())
    manager.drop(ids)
    assert manager.admit([range(9)]).num_cached_tokens.tolist() == [0]


@pytest.mark.parametrize("step", [0, 2, -1])
def test_steps_that_were_never_started_are_refused(step):
    manager = BlockManager(2, 4)
    manager.start_step()
    for operation in (manager.finish_step, manager.fail_step):
        with pytest.raises(ValueError, match=f"step {step} was never started"):
            operation(step)


# -- memory that runs out at each point ----------------------------------------------------


def run_out(manager, operation):
    """Do `operation` in a pool that may be too small; whether it was done, or None."""
    try:
        ids = manager.admit([range(5), range(4), [9] * 3]).sequence_ids
        if operation == "append to forks":
            ids = np.concatenate([ids, manager.fork(ids)])
        if operation == "swap in":
            manager.swap_out(ids)
            manager.allocate([manager.num_blocks // manager.num_layer_groups])
    except OutOfBlocksError:
        return None
    before = manager.snapshot()
    try:
        if operation == "allocate":
            manager.allocate([3, 1, 7])
        elif operation == "admit":
            manager.admit([range(7), [4] * 5, range(6)])
        elif operation == "swap in":
            manager.swap_in(ids)
        else:
            manager.append(ids, 3)
    except OutOfBlocksError:
        after = manager.snapshot()
        assert after.settings == before.settings
        for name, array in before.arrays.items():
            assert np.array_equal(after.arrays[name], array), name
        return False
    finally:
        manager.check_integrity()
    return True


@pytest.mark.parametrize("windows", [(None,), (None, 3)], ids=["one group", "two groups"])
@pytest.mark.parametrize("operation", ["allocate", "admit", "append", "append to forks", "swap in"])
def test_whatever_the_pool_lacks_an_operation_is_done_whole_or_not_at_all(operation, windows):
    outcomes = [
        run_out(BlockManager(n, 2, num_host_blocks=40, windows=windows, seed=b"s"), operation)
        for n in range(1, 40)
    ]
    assert {True, False} <= set(outcomes)
    assert outcomes == sorted(outcomes, key=[None, False, True].index)


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


# -- failed steps --------------------------------------------------------------------------


def test_who_shared_with_a_failed_step_is_named():
    manager = BlockManager(32, 4)
    manager.finish_step(manager.start_step())
    (early,) = manager.admit([range(50, 59)]).sequence_ids
    manager.finish_step(manager.start_step())
    (writer,) = manager.admit([range(9)]).sequence_ids
    step = manager.start_step()
    (sharer,) = manager.admit([[*range(8), 50]]).sequence_ids  # after the launch
    (other,) = manager.admit([[*range(50, 58), 1]]).sequence_ids  # shares with the early one
    assert manager.fail_step(step).tolist() == [writer, sharer]
    manager.drop([writer, sharer])
    assert manager.admit([range(9)]).num_cached_tokens.tolist() == [0]
    assert manager.admit([range(50, 59)]).num_cached_tokens.tolist() == [8]
    assert sorted(manager.sequence_ids())[:2] == [early, other]
    manager.check_integrity()


def test_when_the_first_step_fails_nobody_is_trusted():
    manager = BlockManager(32, 4)
    ids = manager.admit([range(9), range(20, 25)]).sequence_ids.tolist()
    assert manager.fail_step(manager.start_step()).tolist() == ids
    assert manager.num_cached_blocks == 0


def test_what_a_failed_step_was_to_write_does_not_come_back_from_the_host():
    manager = BlockManager(16, 4, num_host_blocks=16)
    manager.finish_step(manager.start_step())
    (sequence,) = manager.admit([range(9)]).sequence_ids
    step = manager.start_step()
    manager.swap_out([sequence])
    assert manager.fail_step(step).tolist() == [sequence]
    manager.swap_in([sequence])
    assert manager.admit([range(9)]).num_cached_tokens.tolist() == [0]
    manager.check_integrity()


def test_a_step_that_is_given_up_taints_nobody_else():
    manager = BlockManager(16, 4)
    manager.finish_step(manager.start_step())
    (kept,) = manager.admit([range(50, 59)]).sequence_ids
    manager.finish_step(manager.start_step())
    (given_up,) = manager.admit([range(9)]).sequence_ids
    assert manager.cancel_step().tolist() == [given_up]
    manager.free([given_up])
    assert manager.sequence_ids().tolist() == [kept]


def test_a_swapped_fork_that_ends_leaves_the_others_blocks_findable():
    manager = BlockManager(8, 4, num_host_blocks=16)
    (parent,) = manager.admit([range(9)]).sequence_ids
    (fork,) = manager.fork(parent)
    manager.swap_out([parent])
    manager.free(manager.allocate([32]))  # nothing is cached on the device any longer
    manager.free([fork])
    manager.swap_in([parent])
    assert manager.admit([range(9)]).num_cached_tokens.tolist() == [8]
    manager.check_integrity()
