"""Corners that a reading of the block manager found broken once."""

import numpy as np
import pytest

from pagedattn import BlockManager, CacheKeys, OutOfBlocksError, Snapshot, SnapshotError

TOKENS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]


# -- wrong results -------------------------------------------------------------------------


def test_an_image_in_a_prompts_partly_filled_block_is_told_from_none():
    manager = BlockManager(32, 4)
    image = CacheKeys(media=((5, b"image"),))
    (sequence,) = manager.admit([TOKENS[:6]], image).sequence_ids
    manager.append([sequence], 2, token_ids=TOKENS[6:8])
    assert manager.admit([TOKENS]).num_cached_tokens.tolist() == [4]


def test_an_image_behind_the_first_chunk_is_told_from_none():
    manager = BlockManager(32, 4)
    image = CacheKeys(media=((9, b"image"),))
    (sequence,) = manager.admit([TOKENS[:12]], image, max_new_tokens=4).sequence_ids
    manager.append([sequence], 8, token_ids=TOKENS[4:12])
    assert manager.admit([TOKENS]).num_cached_tokens.tolist() == [8]


def test_a_prompt_with_an_image_that_came_in_chunks_is_found_again():
    manager = BlockManager(32, 4)
    image = CacheKeys(media=((9, b"image"),))
    (sequence,) = manager.admit([TOKENS[:12]], image, max_new_tokens=4).sequence_ids
    manager.append([sequence], 8, token_ids=TOKENS[4:12])
    assert manager.admit([TOKENS], image).num_cached_tokens.tolist() == [12]


def test_a_swapped_out_sequence_brings_nothing_back_that_a_reset_made_unfindable():
    manager = BlockManager(32, 4, num_host_blocks=8)
    (sequence,) = manager.admit([TOKENS]).sequence_ids
    manager.swap_out([sequence])
    manager.reset_prefix_cache()
    manager.swap_in([sequence])
    assert manager.admit([TOKENS]).num_cached_tokens.tolist() == [0]


def test_a_block_begun_before_a_reset_is_not_findable_when_it_is_full():
    manager = BlockManager(32, 4)
    (old,) = manager.admit([TOKENS[:6]]).sequence_ids
    manager.reset_prefix_cache()  # after new weights were loaded
    manager.append([old], 2, token_ids=TOKENS[6:8])
    (new,) = manager.admit([TOKENS[:5]]).sequence_ids  # its first block is written anew
    shared = set(manager.block_tables([old])[0][0, :2].tolist())
    third = manager.admit([TOKENS[:9]])
    table = manager.block_tables(third.sequence_ids)[0][0]
    assert not shared & set(table[:2].tolist()), f"{new}'s prompt goes on with {old}'s K and V"


# -- a failed operation that changed something ---------------------------------------------


@pytest.mark.parametrize("lengths", [[2**62, 2**62], [2**62] * 4, [2**63 - 1, 2]], ids=str)
def test_lengths_whose_sum_overflows_do_not_fit(lengths):
    manager = BlockManager(8, 1)
    assert not manager.can_allocate(lengths)
    with pytest.raises((OutOfBlocksError, ValueError)):
        manager.allocate(lengths)
    assert manager.num_sequences == 0
    manager.check_integrity()


@pytest.mark.parametrize("count", [2**63 - 1, 2**63 - 7, 2**62])
def test_appending_so_many_tokens_that_the_length_overflows_is_refused(count):
    manager = BlockManager(8, 4)
    ids = manager.allocate([7, 7])
    assert not manager.can_append(ids, count)
    with pytest.raises((OutOfBlocksError, ValueError)):
        manager.append(ids, count)
    assert manager.num_tokens(ids).tolist() == [7, 7]
    manager.check_integrity()


def test_an_admission_beyond_the_most_sequences_leaves_no_reference():
    manager = BlockManager(2**20 + 16, 4)
    manager.admit([TOKENS])
    manager.allocate(np.ones(2**20 - 1, np.int64))
    with pytest.raises(ValueError, match="a manager holds 1048576"):
        manager.admit([TOKENS])
    manager.check_integrity()


def test_a_failed_copy_evicts_the_cached_block_it_may_have_written_to():
    manager = BlockManager(4, 4)
    (cached,) = manager.admit([TOKENS[:8]]).sequence_ids
    (parent,) = manager.allocate([6])
    manager.fork(parent)
    manager.free([cached])

    def fails(_):
        raise ConnectionError

    with pytest.raises(ConnectionError):
        manager.append([parent], copy=fails)
    assert manager.num_free_blocks == 2
    assert manager.num_cached_blocks == 1
    assert manager.admit([TOKENS[:9]], max_new_tokens=1).num_cached_tokens.tolist() == [4]
    manager.check_integrity()


# -- other errors --------------------------------------------------------------------------


def test_the_id_that_marks_an_unused_row_is_unknown():
    manager = BlockManager(8, 4)
    with pytest.raises(LookupError):
        manager.free([-(2**63)])
    manager.check_integrity()


@pytest.mark.parametrize("count", [2, []], ids=str)
def test_an_empty_batch_may_be_appended_to_and_recorded(count):
    manager = BlockManager(8, 4)
    assert len(manager.append([], count, token_ids=[])) == 0
    manager.record([], [], count)
    manager.check_integrity()


def test_swapping_no_sequence_needs_no_host():
    manager = BlockManager(8, 4)
    assert manager.can_swap_out([])
    assert len(manager.swap_out([])) == 0


def test_steps_once_used_do_not_make_memory_grow_without_end():
    manager = BlockManager(8, 4)
    manager.finish_step(manager.start_step())
    for number in range(100):  # no step is started any more
        manager.free(manager.admit([[number] * 5]).sequence_ids)
    assert manager.snapshot().arrays["written"].size <= 8


def test_a_full_host_is_called_a_host():
    manager = BlockManager(8, 4, num_host_blocks=1)
    with pytest.raises(OutOfBlocksError, match="host"):
        manager.swap_out(manager.allocate([8]))


@pytest.mark.parametrize("blocks", [[-1], [8], [1.5], [2**32]], ids=str)
def test_reference_counts_of_what_is_no_block_are_refused(blocks):
    with pytest.raises(ValueError, match="block"):
        BlockManager(8, 4).ref_counts(np.array(blocks))


@pytest.mark.parametrize("flat", [[1, 2, 3], np.array([1, 2, 3])], ids=["list", "array"])
def test_one_prompt_instead_of_a_list_of_prompts_is_refused(flat):
    with pytest.raises(ValueError, match="prompt"):
        BlockManager(8, 4).admit(flat)


@pytest.mark.parametrize("seed", [0, 42, "seed"], ids=repr)
def test_a_seed_that_is_no_bytes_is_refused(seed):
    with pytest.raises((TypeError, ValueError), match="seed"):
        BlockManager(8, 4, seed=seed)


@pytest.mark.parametrize(
    "keys",
    [{"adapter": 5}, {"salt": b"a"}, {"media": ((1,),)}, {"media": (5,)}, {"media": None}],
    ids=str,
)
def test_keys_of_other_types_are_refused_in_a_sentence(keys):
    with pytest.raises(ValueError, match="must be"):
        BlockManager(8, 4).admit([[1, 2]], CacheKeys(**keys))


def test_a_file_without_numpys_marks_is_refused_without_advice_to_unpickle_it(tmp_path):
    path = tmp_path / "state.npz"
    path.write_bytes(b"hello")
    with pytest.raises(SnapshotError) as caught:
        Snapshot.load(path)
    assert "allow_pickle" not in str(caught.value)


def test_lengths_that_no_machine_could_hold_contradict_a_snapshot():
    manager = BlockManager(8, 4)
    manager.allocate([5, 6])
    snapshot = manager.snapshot()
    arrays = {**snapshot.arrays, "num_tokens": snapshot.arrays["num_tokens"] + 2**50}
    with pytest.raises(SnapshotError):
        BlockManager.restore(Snapshot(snapshot.settings, arrays))


@pytest.mark.parametrize("num_forks", [0, 1.5, "2"], ids=repr)
def test_a_number_of_forks_is_a_whole_number(num_forks):
    manager = BlockManager(8, 4)
    (sequence,) = manager.allocate([5])
    with pytest.raises(ValueError, match="num_forks is"):
        manager.fork(sequence, num_forks)
    assert manager.num_sequences == 1


@pytest.mark.parametrize("num_forks", [2**20, 10**12, 2**63, 10**30], ids=str)
def test_more_forks_than_a_manager_holds_are_refused_before_they_take_memory(num_forks):
    manager = BlockManager(8, 4)
    parents = manager.allocate([5, 3])
    with pytest.raises(ValueError, match=f"{2 * num_forks} more .* a manager holds 1048576"):
        manager.fork(parents, num_forks)
    assert manager.num_sequences == 2


@pytest.mark.parametrize("value", ["off", 1, None], ids=repr)
def test_prefix_caching_is_true_or_false(value):
    with pytest.raises(ValueError, match=f"prefix_caching is {value!r}; it must be True or False"):
        BlockManager(4, 4, prefix_caching=value)


def test_prefix_caching_may_be_a_boolean_of_numpy(tmp_path):
    manager = BlockManager(4, 4, prefix_caching=np.bool_(False))
    manager.snapshot().save(tmp_path / "state.npz")
    assert Snapshot.load(tmp_path / "state.npz").settings["prefix_caching"] is False


def test_a_step_that_is_done_cannot_fail():
    manager = BlockManager(8, 4)
    manager.finish_step(manager.start_step())
    manager.free(manager.admit([TOKENS]).sequence_ids)
    with pytest.raises(ValueError, match="step 1 is done"):
        manager.fail_step(1)
    assert manager.num_cached_blocks == 3


def test_the_watermark_is_named_among_the_blocks_that_coming_back_needs():
    manager = BlockManager(10, 4, num_host_blocks=10, watermark=0.5)
    (sequence,) = manager.allocate([20])
    manager.swap_out([sequence])
    manager.allocate([4])
    with pytest.raises(OutOfBlocksError) as caught:
        manager.swap_in([sequence])
    assert (caught.value.needed, caught.value.free) == (10, 9)


@pytest.mark.parametrize(
    "chunk", [1.5, 2.0, float("nan"), np.array([2]), True, 0, -1, "2"], ids=repr
)
def test_a_chunk_is_a_whole_number_of_tokens(chunk):
    manager = BlockManager(8, 4)
    manager.admit([range(9)])
    before = str(manager.snapshot())
    with pytest.raises(ValueError, match="max_new_tokens is"):
        manager.admit([range(9)], max_new_tokens=chunk)
    assert str(manager.snapshot()) == before
    manager.check_integrity()


def test_a_chunk_may_be_longer_than_any_prompt():
    manager = BlockManager(8, 4)
    manager.admit([range(9)], max_new_tokens=2**70)
    assert manager.num_free_blocks == 5


def test_what_is_given_up_before_it_is_launched_is_not_found():
    manager = BlockManager(16, 4)
    for launched in (False, True):  # before the first step, and later
        if launched:
            manager.admit([range(100, 109)])
            manager.finish_step(manager.start_step())
        admission = manager.admit([range(9)])
        manager.cancel_step()
        manager.free(admission.sequence_ids)
        assert manager.num_cached_blocks == 0
        assert manager.admit([range(9)]).num_cached_tokens.tolist() == [0]
        manager.cancel_step()
    assert manager.admit([range(100, 109)]).num_cached_tokens.tolist() == [8]
    manager.check_integrity()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m: m.admit([[1]], keys=["t"]), "keys must be CacheKeys or None; given 't'"),
        (lambda m: m.admit([[1]], 5), "keys must be CacheKeys, or a list of them; given 5"),
        (lambda m: m.admit(None), "prompts must be a list of prompts; given None"),
        (lambda m: m.admit(np.array(3)), r"prompts must be a list of prompts; given array\(3\)"),
        (lambda m: m.block_tables([], "x"), "layer_group is 'x'; it must be a whole number"),
        (lambda m: m.block_tables([], None), "layer_group is None"),
        (lambda m: m.admit([3]), "the first of it is 3"),
        (lambda m: m.admit([np.array(3)]), r"the first of it is array\(3\)"),
        (lambda m: m.finish_step("1"), "a step is '1'"),
        (lambda m: m.start_step(is_done=5), "is_done is 5; it must be a function"),
        (lambda m: m.restore("state.npz"), "'state.npz' is not a Snapshot"),
        (
            lambda m: m.allocate([100]),
            "needs 25 blocks and 8 are free: the pool has 8, so it never",
        ),
    ],
)
def test_a_mistake_is_told_in_one_sentence(call, sentence):
    manager = BlockManager(8, 4)
    before = str(manager.snapshot())
    with pytest.raises((ValueError, OutOfBlocksError), match=sentence):
        call(manager)
    assert str(manager.snapshot()) == before


@pytest.mark.parametrize("window", [2.5, 0, -3, "8"], ids=repr)
def test_a_window_is_a_whole_number_of_tokens(window):
    with pytest.raises(ValueError, match="a window is"):
        BlockManager(8, 4, windows=(window,))


@pytest.mark.parametrize("columns", [0, 1.5, "x"], ids=repr)
def test_a_picture_has_columns(columns):
    with pytest.raises(ValueError, match=f"columns is {columns!r}"):
        BlockManager(8, 4).snapshot().draw(columns)
