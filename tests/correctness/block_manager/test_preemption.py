"""Groups leave for the host as one and come back, with all that they held, or nothing moves."""

import pytest
import torch

from pagedattn import BlockManager, KVCache, OutOfBlocksError, SwappedOutError

from .managers import tables


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
