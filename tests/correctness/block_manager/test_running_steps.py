"""Freed blocks wait for the steps that read them; what a failed step was to write is not found."""

import numpy as np
import pytest

from pagedattn import BlockManager, OutOfBlocksError

from .managers import tables


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
