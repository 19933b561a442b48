"""Which blocks a prompt keeps of what it shares, when layer groups see windows."""

import numpy as np
import pytest

from pagedattn import BlockManager, OutOfBlocksError


@pytest.mark.parametrize("hit", [1, 2, 5])
@pytest.mark.parametrize("window", range(1, 11))
def test_a_prompt_that_is_found_keeps_the_blocks_that_its_first_query_sees(window, hit):
    manager = BlockManager(64, 4, windows=(window,))
    prompt = list(range(4 * hit + 1))
    (first,) = manager.admit([prompt]).sequence_ids
    second = manager.admit([prompt])
    assert second.num_cached_tokens.tolist() == [4 * hit]
    seen = {position // 4 for position in range(4 * hit) if position > 4 * hit - window}
    (table,) = manager.block_tables(second.sequence_ids)[0]
    (whole,) = manager.block_tables([first])[0]
    expected = [whole[column] if column in seen else 0 for column in range(hit)]
    assert table[:hit].tolist() == expected
    shared = manager.ref_counts(whole[:hit]) == 2
    assert np.flatnonzero(shared).tolist() == sorted(seen)
    manager.check_integrity()


def test_a_block_before_the_window_of_the_prompt_that_would_bring_it_is_not_shared():
    manager = BlockManager(6, 4, windows=(5,))
    prefix = list(range(12))
    (first,) = manager.admit([prefix]).sequence_ids
    manager.append([first], token_ids=[99])  # the first two blocks leave the window
    (other,) = manager.allocate([16])  # and are evicted
    manager.free([first])
    manager.free([other])
    admission = manager.admit([[*prefix, 5], [*prefix[:8], 7]])
    assert admission.num_cached_tokens.tolist() == [12, 0]
    manager.check_integrity()


def test_a_block_in_the_first_column_of_a_window_can_be_found_when_it_is_full():
    manager = BlockManager(8, 4, windows=(3,))
    (first,) = manager.admit([[1, 2, 3]]).sequence_ids
    for token in range(4, 12):
        manager.append([first], token_ids=[token])
    assert manager.admit([range(1, 13)]).num_cached_tokens.tolist() == [8]
    assert manager.admit([range(1, 6)]).num_cached_tokens.tolist() == [4]


def test_a_block_that_is_made_again_while_the_old_one_is_evicted_can_be_found():
    manager = BlockManager(6, 4, windows=(9,))
    prefix = list(range(16))
    (first,) = manager.admit([prefix]).sequence_ids
    manager.append([first], token_ids=[99])  # the first two blocks leave the window
    (other,) = manager.allocate([12])  # and are evicted
    manager.free([first])
    # the third block is there but of no use without the second, and must make room
    again = manager.admit([prefix[:12]])
    assert again.num_cached_tokens.tolist() == [0]
    assert manager.num_free_blocks == 0
    manager.free([other])
    assert manager.admit([[*prefix[:12], 5]]).num_cached_tokens.tolist() == [12]
    manager.check_integrity()


def test_a_block_that_leaves_a_window_is_too_late_for_a_copy_of_the_same_call():
    manager = BlockManager(2, 4, windows=(4,))
    (parent,) = manager.allocate([7])
    (fork,) = manager.fork(parent)
    assert not manager.can_append([parent, fork])
    with pytest.raises(OutOfBlocksError):
        manager.append([parent, fork])
    assert manager.num_tokens([parent, fork]).tolist() == [7, 7]
    manager.check_integrity()


def test_the_watermark_stays_free_of_new_prompts():
    manager = BlockManager(10, 4, watermark=0.2)
    (sequence,) = manager.allocate([4])
    for operation in (lambda: manager.allocate([29]), lambda: manager.admit([range(29)])):
        with pytest.raises(OutOfBlocksError):
            operation()
    assert not manager.can_allocate([29])
    assert manager.can_allocate([28])
    manager.append([sequence], 36)  # what runs may use it
    assert manager.num_free_blocks == 0
