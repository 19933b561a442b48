"""Wherever the pool runs out, an operation is done whole or not at all."""

import numpy as np
import pytest

from pagedattn import BlockManager, OutOfBlocksError


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
