"""Windows in blocks, against a count of the positions that a query sees."""

import numpy as np
import pytest

from pagedattn.block_manager.layer_groups import LayerGroups

WINDOWS = [1, 2, 3, 4, 5, 6, 8, 9, 13, 100]
BLOCK_SIZES = [1, 2, 3, 4, 16]


def seen(position, window):
    """Positions that a query sees, one at a time."""
    return [p for p in range(position + 1) if window is None or p > position - window]


@pytest.mark.parametrize(("window", "blocks"), [(1, 0), (2, 1), (5, 1), (6, 2), (9, 2), (10, 3)])
def test_the_worked_example_of_full_blocks_in_a_window_holds(window, blocks):
    assert LayerGroups([window], 4).blocks_in_window(0) == blocks


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_a_query_at_a_boundary_sees_the_blocks_that_its_positions_lie_in(block_size, window):
    boundary = 200 * block_size
    before = {p // block_size for p in seen(boundary, window) if p < boundary}
    assert LayerGroups([window], block_size).blocks_in_window(0) == len(before)


@pytest.mark.parametrize("window", [None, *WINDOWS], ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_the_first_block_seen_is_that_of_the_first_position_seen(block_size, window):
    positions = np.arange(150)
    first = [min(seen(p, window)) // block_size for p in range(150)]
    assert LayerGroups([None, window], block_size).first_seen(1, positions).tolist() == first


def test_a_group_without_a_window_sees_more_blocks_than_there_can_be():
    assert LayerGroups([None], 4).blocks_in_window(0) > 2**60


@pytest.mark.parametrize("windows", [(None,), (3,), (None, 5), (7, 3, None)], ids=str)
def test_the_groups_are_counted_and_a_window_is_noticed(windows):
    groups = LayerGroups(windows, 4)
    assert groups.count == len(windows)
    assert groups.has_window == (windows != (None,))
    assert groups.windows == windows


def test_keys_of_groups_differ_and_leave_the_digests_alone():
    digests = np.arange(40, dtype=np.uint64).reshape(10, 4)
    before = digests.copy()
    groups = LayerGroups([None] * 5, 4)
    keys = [groups.keys(digests, group).tobytes() for group in range(5)]
    assert len(set(keys)) == 5
    assert keys[0] == before.tobytes()
    assert np.array_equal(digests, before)


def test_keys_of_a_group_change_the_last_word_alone():
    digests = np.arange(8, dtype=np.uint64).reshape(2, 4)
    keys = LayerGroups([None] * 4, 4).keys(digests, 3)
    assert np.array_equal(keys[:, :3], digests[:, :3])
    assert (keys[:, 3] != digests[:, 3]).all()


def test_no_groups_at_all_are_refused():
    with pytest.raises(ValueError, match="at least one layer group"):
        LayerGroups([], 4)


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_that_sees_nothing_is_refused(window):
    with pytest.raises(
        ValueError, match=f"a window is {window}; it must be a whole number of at least 1"
    ):
        LayerGroups([None, window], 4)
