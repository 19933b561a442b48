"""Prompts that begin alike share full blocks, and no others do."""

import numpy as np
import pytest

from pagedattn import BlockManager, CacheKeys, OutOfBlocksError, PageTable

from .managers import tables


def cached(manager, *prompts, **options):
    return manager.admit(prompts, **options).num_cached_tokens.tolist()


def test_a_prompt_finds_the_full_blocks_of_one_that_is_still_there():
    manager = BlockManager(16, 4)
    first = manager.admit([range(10)])
    second = manager.admit([[*range(8), 99, 98, 97]])
    assert first.num_cached_tokens.tolist() == [0]
    assert second.num_cached_tokens.tolist() == [8]
    (one,), (two,) = tables(manager, first.sequence_ids), tables(manager, second.sequence_ids)
    assert one[:2] == two[:2]
    assert one[2] != two[2]
    assert manager.ref_counts(one).tolist() == [2, 2, 1]
    manager.check_integrity()


def test_freed_blocks_are_found_again():
    manager = BlockManager(16, 4)
    admission = manager.admit([range(11)])
    before = tables(manager, admission.sequence_ids)[0]
    manager.free(admission.sequence_ids)
    assert manager.num_free_blocks == 16
    assert manager.num_cached_blocks == 2
    again = manager.admit([range(11)])
    assert again.num_cached_tokens.tolist() == [8]
    assert tables(manager, again.sequence_ids)[0][:2] == before[:2]
    assert manager.num_cached_blocks == 0
    manager.check_integrity()


@pytest.mark.parametrize(("length", "found"), [(4, 0), (5, 4), (8, 4), (9, 8), (12, 8)])
def test_a_prompt_fully_in_the_cache_recomputes_its_last_token(length, found):
    manager = BlockManager(16, 4)
    manager.free(manager.admit([range(16)]).sequence_ids)
    assert cached(manager, range(length)) == [found]


def test_prompts_of_one_call_share_with_each_other():
    manager = BlockManager(16, 4)
    admission = manager.admit([range(9), [*range(8), 50], [*range(4), 60, 61], range(9)])
    assert admission.num_cached_tokens.tolist() == [0, 8, 4, 8]
    one, two, three, four = tables(manager, admission.sequence_ids)
    assert one[:2] == two[:2] == four[:2]
    assert three[0] == one[0]
    assert len({one[2], two[2], three[1], four[2]}) == 4
    assert manager.num_free_blocks == 16 - 6
    manager.check_integrity()


def test_a_block_counts_with_all_that_precedes_it():
    manager = BlockManager(16, 4)
    assert cached(manager, [1, 1, 1, 1, 5, 5, 5, 5, 0]) == [0]
    assert cached(manager, [2, 2, 2, 2, 5, 5, 5, 5, 0]) == [0]
    assert cached(manager, [5, 5, 5, 5, 0]) == [0]


@pytest.mark.parametrize("other", [CacheKeys(adapter="b"), CacheKeys(salt="a"), CacheKeys(), None])
def test_prompts_with_other_keys_share_nothing(other):
    manager = BlockManager(16, 4)
    assert cached(manager, range(9), keys=CacheKeys(adapter="a")) == [0]
    assert cached(manager, range(9), keys=other) == [0]
    assert cached(manager, range(9), keys=[CacheKeys(adapter="a")]) == [8]


def test_tenants_with_their_own_salts_learn_nothing_from_each_other():
    manager = BlockManager(64, 4)
    salts = [CacheKeys(salt=name) for name in ("alice", "bob")]
    assert cached(manager, range(9), range(9), keys=salts) == [0, 0]
    assert cached(manager, range(9), range(9), keys=salts) == [8, 8]


def test_an_image_counts_from_the_block_it_begins_in():
    manager = BlockManager(32, 4)
    cat, dog = (CacheKeys(media=((5, content),)) for content in (b"cat", b"dog"))
    prompt = [0] * 13
    assert cached(manager, prompt, keys=cat) == [0]
    assert cached(manager, prompt, keys=dog) == [4]  # the block before it is the same
    assert cached(manager, prompt, keys=cat) == [12]
    moved = CacheKeys(media=((6, b"cat"),))
    assert cached(manager, prompt, keys=moved) == [4]


def test_blocks_filled_by_decoding_are_found():
    manager = BlockManager(16, 4)
    admission = manager.admit([range(6)])
    for token in (6, 7, 8):
        manager.append(admission.sequence_ids, token_ids=[token])
    assert cached(manager, [*range(8), 99]) == [8]
    manager.free(admission.sequence_ids)
    assert cached(manager, [*range(9), 99]) == [8]
    manager.check_integrity()


def test_a_chunked_prompt_ends_up_findable_as_a_whole():
    whole, chunked = BlockManager(32, 4, seed=b"s"), BlockManager(32, 4, seed=b"s")
    whole.admit([range(30)])
    admission = chunked.admit([range(30)], max_new_tokens=7)
    ids = admission.sequence_ids
    assert chunked.num_tokens(ids).tolist() == [7]
    assert cached(chunked, range(8)) == [4]  # what is not taken in yet is not found
    for start in range(7, 30, 7):
        chunk = range(start, min(start + 7, 30))
        chunked.append(ids, len(chunk), token_ids=chunk)
    for manager in (whole, chunked):
        assert cached(manager, [*range(30), 1]) == [28]
        manager.check_integrity()


def test_tokens_may_become_known_later():
    manager = BlockManager(16, 4)
    (sequence,) = manager.admit([range(6)]).sequence_ids
    manager.append([sequence], 3)
    assert cached(manager, [*range(8), 99]) == [4]
    manager.record([sequence], [6])
    manager.record([sequence], [7, 8], 2)
    assert cached(manager, [*range(8), 99]) == [8]
    with pytest.raises(ValueError, match="append first"):
        manager.record([sequence], [9])
    manager.check_integrity()


def test_token_ids_that_do_not_follow_are_refused():
    manager = BlockManager(16, 4)
    (known,) = manager.admit([range(6)]).sequence_ids
    (unknown,) = manager.allocate([6])
    with pytest.raises(ValueError, match="made by allocate"):
        manager.append([known, unknown], token_ids=[1, 2])
    with pytest.raises(ValueError, match="2 token ids were given for 1 new tokens"):
        manager.append([known], token_ids=[1, 2])
    with pytest.raises(ValueError, match="a token id is -1"):
        manager.append([known], token_ids=[-1])
    manager.append([known])
    with pytest.raises(ValueError, match=r"tokens 6 to 6 of sequence \d+ are not known yet"):
        manager.append([known], token_ids=[1])
    assert manager.num_tokens([known, unknown]).tolist() == [7, 6]
    manager.check_integrity()


def test_the_least_recently_freed_goes_first_and_of_a_sequence_its_tail():
    manager = BlockManager(6, 4)
    old = manager.admit([[1] * 12]).sequence_ids
    new = manager.admit([[2] * 12]).sequence_ids
    blocks = tables(manager, old)[0][::-1] + tables(manager, new)[0][::-1]
    manager.free(old)
    manager.free(new)
    for evicted in range(1, 6):
        ids = manager.allocate([4 * evicted])
        assert sorted(tables(manager, ids)[0]) == sorted(blocks[:evicted])
        assert manager.statistics().num_evicted_blocks == evicted
        manager.free(ids)
    assert cached(manager, [2] * 9, [1] * 5) == [4, 0]


def test_being_found_makes_a_block_recent():
    manager = BlockManager(6, 4)
    first = manager.admit([[1] * 8]).sequence_ids
    second = manager.admit([[2] * 8]).sequence_ids
    manager.free(first)
    manager.free(second)
    manager.free(manager.admit([[1] * 9]).sequence_ids)  # used again: now the most recent
    manager.free(manager.allocate([4 * 4]))
    assert cached(manager, [1] * 9) == [8]
    assert cached(manager, [2] * 9) == [0]


def test_blocks_that_are_empty_are_used_before_cached_ones():
    manager = BlockManager(4, 4)
    manager.free(manager.admit([[1] * 8]).sequence_ids)
    for _ in range(5):
        manager.free(manager.allocate([8]))
    assert cached(manager, [1] * 9) == [8]
    assert manager.statistics().num_evicted_blocks == 0


def test_found_blocks_are_not_evicted_by_the_prompt_that_finds_them():
    manager = BlockManager(4, 4)
    manager.free(manager.admit([range(12)]).sequence_ids)
    admission = manager.admit([[*range(12), 1, 2, 3, 4]])
    assert admission.num_cached_tokens.tolist() == [12]
    assert manager.num_free_blocks == 0
    manager.check_integrity()


def test_a_prompt_that_needs_the_blocks_it_finds_and_more_does_not_fit():
    manager = BlockManager(4, 4)
    manager.free(manager.admit([range(12)]).sequence_ids)
    with pytest.raises(OutOfBlocksError) as caught:
        manager.admit([[*range(12), 1, 2, 3, 4, 5]])
    assert (caught.value.needed, caught.value.free) == (2, 1)
    assert manager.num_cached_blocks == 3
    assert cached(manager, [*range(12), 1]) == [12]


def test_copies_of_the_same_contents_keep_one_findable():
    manager = BlockManager(16, 4)
    one = manager.admit([range(8)]).sequence_ids
    two = manager.admit([range(8)]).sequence_ids  # recomputes its last block
    assert tables(manager, one)[0][1] != tables(manager, two)[0][1]
    manager.free(one)
    manager.free(two)
    assert manager.num_cached_blocks == 2
    assert cached(manager, range(9)) == [8]
    manager.check_integrity()


def test_a_copy_that_is_in_use_replaces_one_that_is_free():
    manager = BlockManager(16, 4)
    manager.free(manager.admit([range(8)]).sequence_ids)
    admission = manager.admit([range(8)])
    mine = tables(manager, admission.sequence_ids)[0]
    assert manager.num_cached_blocks == 0
    again = manager.admit([range(9)])
    assert tables(manager, again.sequence_ids)[0][:2] == mine
    manager.check_integrity()


def test_forgetting_the_cache_keeps_the_sequences():
    manager = BlockManager(16, 4)
    admission = manager.admit([range(9)])
    before = tables(manager, admission.sequence_ids)
    manager.free(manager.admit([[7] * 9]).sequence_ids)
    manager.reset_prefix_cache()
    assert manager.num_cached_blocks == 0
    assert tables(manager, admission.sequence_ids) == before
    assert cached(manager, range(9), [7] * 9) == [0, 0]
    manager.check_integrity()


def test_without_prefix_caching_nothing_is_found_or_kept():
    manager = BlockManager(16, 4, prefix_caching=False)
    admission = manager.admit([range(9), range(9)])
    assert admission.num_cached_tokens.tolist() == [0, 0]
    manager.append(admission.sequence_ids, token_ids=[1, 2])
    manager.free(admission.sequence_ids)
    assert manager.num_cached_blocks == 0
    assert cached(manager, range(9)) == [0]
    manager.check_integrity()


def test_the_counters_tell_hits_lookups_and_evictions():
    manager = BlockManager(8, 4)
    manager.free(manager.admit([range(10)]).sequence_ids)
    manager.free(manager.admit([range(10), [9] * 3]).sequence_ids)
    manager.free(manager.allocate([32]))
    stats = manager.statistics()
    assert (stats.num_lookup_tokens, stats.num_hit_tokens) == (23, 8)
    assert stats.hit_rate == 8 / 23
    assert stats.num_evicted_blocks == 2


def test_equal_seeds_find_the_same_blocks_and_no_seed_is_unpredictable():
    def digests(seed):
        manager = BlockManager(4, 4, seed=seed)
        manager.admit([range(8)])
        return manager.snapshot().arrays["pool_digests"].tobytes()

    assert digests(b"one") == digests(b"one")
    assert digests(b"one") != digests(b"two")
    assert digests(None) != digests(None)


def test_digests_that_collide_in_the_index_still_return_the_right_blocks(monkeypatch):
    """All digests share the place and the step of the table, and 192 of their 256 bits."""
    manager = BlockManager(64, 2, seed=b"s")
    hasher = manager._cache.hasher
    chain = hasher.chain

    def colliding(*arguments):
        digests = chain(*arguments).copy()
        digests[:, :3] = 7
        return digests

    monkeypatch.setattr(hasher, "chain", colliding)
    prompts = [[a, b, c, d, 0] for a in (1, 2) for b in (1, 2) for c in (1, 2) for d in (1, 2)]
    memory = {}
    for _ in range(2):
        for prompt in prompts:
            admission = manager.admit([prompt])
            (table,) = tables(manager, admission.sequence_ids)
            (hit,) = admission.num_cached_tokens.tolist()
            for column, block in enumerate(table[:2]):
                contents = tuple(prompt[: 2 * column + 2])
                if 2 * column < hit:
                    assert memory[block] == contents
                memory[block] = contents
            manager.free(admission.sequence_ids)
    assert cached(manager, *prompts) == [4] * len(prompts)
    manager.check_integrity()


@pytest.mark.parametrize(
    ("prompts", "keys", "message"),
    [
        ([[1, 2], []], None, "prompt 1 is empty"),
        ([[1, -2]], None, "a token id is -2"),
        ([[2**31]], None, "a token id is 2147483648"),
        ([[1.5]], None, "whole number"),
        ([[[1]]], None, "whole number"),
        ([["a"]], None, "whole number"),
        ([[1, 2]], [None, None], "2 keys were given for 1 prompts"),
        ([[1, 2]], CacheKeys(media=((2, b"x"),)), "media behind its end"),
    ],
)
def test_bad_prompts_are_refused_and_change_nothing(prompts, keys, message):
    manager = BlockManager(8, 4)
    with pytest.raises(ValueError, match=message):
        manager.admit(prompts, keys)
    assert manager.num_sequences == 0
    assert manager.num_free_blocks == 8
    manager.check_integrity()


@pytest.mark.parametrize("media", [((-1, b"x"),), ((0, "x"),), ((0.5, b"x"),)])
def test_media_are_positions_and_bytes(media):
    with pytest.raises(ValueError, match="media must be pairs"):
        CacheKeys(media=media)


def test_an_empty_call_changes_nothing():
    manager = BlockManager(8, 4)
    admission = manager.admit([])
    assert admission.sequence_ids.size == admission.num_cached_tokens.size == 0
    manager.append([], token_ids=[])
    manager.check_integrity()


@pytest.mark.parametrize("kind", ["list", "int32", "int64", "uint16", "range"])
def test_prompts_come_as_any_integers(kind):
    manager = BlockManager(16, 4)
    cached(manager, list(range(9)))
    prompt = {"list": list(range(9)), "range": range(9)}.get(kind)
    assert cached(manager, np.arange(9, dtype=kind) if prompt is None else prompt) == [8]


def test_ids_above_65535_are_shared_and_found_like_others():
    manager = BlockManager(140_000, 1)
    rng = np.random.default_rng(0)
    manager.allocate([70_000])
    prompt = rng.integers(0, 50_000, 60_000)
    admission = manager.admit([prompt])
    (table,) = tables(manager, admission.sequence_ids)
    assert min(table) > 65_535
    manager.free(admission.sequence_ids)
    again = manager.admit([prompt])
    assert again.num_cached_tokens.tolist() == [59_999]
    assert tables(manager, again.sequence_ids)[0][:-1] == table[:-1]
    manager.check_integrity()


def test_slots_of_a_pool_above_two_to_the_31_are_right():
    block_size = 1 << 16
    manager = BlockManager(1 << 17, block_size, prefix_caching=False)  # 2**33 slots
    manager.allocate([120_000 * block_size])
    (sequence,) = manager.allocate([block_size + 3])
    (slots,) = PageTable.of(manager, [sequence]).slots()
    assert slots == 120_001 * block_size + 2
    assert slots > 2**31
    assert manager.statistics().num_used_blocks == 120_002
    manager.check_integrity()


@pytest.mark.parametrize("num_groups", [1, 2, 3])
@pytest.mark.parametrize("evicted", [1, 2, 7, 15])
def test_a_prefix_is_evicted_tail_first_in_all_layer_groups(num_groups, evicted):
    manager = BlockManager(32 * num_groups, 4, windows=[None] * num_groups)
    older, newer = ([first, *range(1, 64)] for first in (1000, 2000))
    manager.free(manager.admit([older]).sequence_ids)
    manager.free(manager.admit([newer]).sequence_ids)
    manager.free(manager.allocate([4 * evicted]))
    assert manager.statistics().num_evicted_blocks == evicted * num_groups
    assert cached(manager, older) == [min(60, 64 - 4 * evicted)]
    assert cached(manager, newer) == [60]
    manager.check_integrity()


def test_a_block_that_forks_were_told_of_twice_keeps_its_first_prefix():
    manager = BlockManager(16, 4)
    (one,) = manager.admit([[7]]).sequence_ids
    manager.append([one], 4)
    (other,) = manager.fork(one)
    manager.record([one], [1, 2, 3, 4], 4)
    manager.record([other], [5, 6, 7, 8], 4)  # which cannot be, for it is the same block
    manager.check_integrity()
    assert cached(manager, [7, 1, 2, 3, 0]) == [4]
    assert cached(manager, [7, 5, 6, 7, 0]) == [0]
