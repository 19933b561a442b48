"""The table from digests to blocks, against a dictionary."""

import numpy as np
import pytest

from pagedattn.block_manager import prefix_index
from pagedattn.block_manager.prefix_index import BlockDigests, PrefixIndex

WORD = 2**64


@pytest.fixture(autouse=True, params=[0, 1 << 40], ids=["all-at-once", "one-after-the-other"])
def _few(request, monkeypatch):
    """Go both ways, whatever the number of digests."""
    monkeypatch.setattr(prefix_index, "_FEW", request.param)


def words(*rows):
    return np.array(rows, np.uint64).reshape(-1, 4)


def ids(*blocks):
    return np.array(blocks, np.int32)


def random_digests(rng, count):
    return rng.integers(0, WORD, (count, 4), np.uint64)


def colliding_digests(index, collision):
    """48 distinct digests that are alike in what the table looks at."""
    rng = np.random.default_rng(3)
    digests = random_digests(rng, 48)
    size = len(index._table)
    if collision == "place":
        digests[:, 0] = 5 + size * np.arange(48, dtype=np.uint64)
    elif collision == "last-place":
        digests[:, 0] = size - 1 + size * np.arange(48, dtype=np.uint64)
    elif collision == "step":
        digests[:, 1] = digests[0, 1]
    elif collision == "place-and-step":
        digests[:, 0] = 5 + size * np.arange(48, dtype=np.uint64)
        digests[:, 1] = WORD - 1
    elif collision == "first-word":
        digests[:, 0] = digests[0, 0]
    elif collision == "first-two-words":
        digests[:, :2] = digests[0, :2]
    elif collision == "all-but-the-last-word":
        digests[:, :3] = digests[0, :3]
    elif collision == "all-but-the-second-word":
        digests[:, [0, 2, 3]] = digests[0, [0, 2, 3]]
    elif collision == "all-but-the-third-word":
        digests[:, [0, 1, 3]] = digests[0, [0, 1, 3]]
    elif collision == "few-bits":
        digests = np.array([[i % 2, i // 2 % 2, i // 4 % 4, i // 16] for i in range(48)], np.uint64)
    return digests


COLLISIONS = [
    "none",
    "place",
    "last-place",
    "step",
    "place-and-step",
    "first-word",
    "first-two-words",
    "all-but-the-last-word",
    "all-but-the-second-word",
    "all-but-the-third-word",
    "few-bits",
]


class Model:
    """An index as a dictionary, and the operations on both."""

    def __init__(self, index, digests):
        self.index, self.digests = index, digests
        self.blocks = {}  # number of a digest: its block

    def find(self, numbers):
        expected = [self.blocks.get(number, -1) for number in numbers]
        found = self.index.find(self.digests[numbers])
        assert found.dtype == np.int32
        assert found.tolist() == expected

    def insert(self, blocks, numbers):
        self.index.insert(np.array(blocks, np.int32), self.digests[numbers])
        self.blocks |= dict(zip(numbers, blocks, strict=True))

    def enter(self, blocks, numbers):
        held = self.index.enter(np.array(blocks, np.int32), self.digests[numbers])
        expected = []
        for block, number in zip(blocks, numbers, strict=True):
            expected.append(self.blocks.get(number, -1))
            self.blocks.setdefault(number, block)
        assert held.dtype == np.int32
        assert held.tolist() == expected

    def forget(self, numbers):
        self.index.forget(np.array([self.blocks.pop(n) for n in numbers], np.int32))

    def check(self):
        self.index.check_integrity()
        hashed = np.flatnonzero(self.index.hashed).tolist()
        assert hashed == sorted(self.blocks.values())
        self.find(list(range(len(self.digests))))


@pytest.mark.parametrize("collision", COLLISIONS)
@pytest.mark.parametrize("num_blocks", [20, 40])
def test_random_batches_agree_with_a_dictionary(num_blocks, collision):
    index = PrefixIndex(num_blocks)
    model = Model(index, colliding_digests(index, collision))
    rng = np.random.default_rng(num_blocks)
    for turn in range(400):  # many times what the table holds, so it is rebuilt often
        free = sorted(set(range(num_blocks)) - set(model.blocks.values()))
        new = sorted(set(range(48)) - set(model.blocks))
        draw = rng.random()
        if draw < 0.2:  # as often as not, what is there already, or the same twice
            count = int(rng.integers(0, len(free) + 1))
            blocks = rng.permutation(np.array(free, int))[:count].tolist()
            model.enter(blocks, rng.integers(0, 48, count).tolist())
        elif draw < 0.4:
            count = int(rng.integers(0, min(len(free), len(new)) + 1))
            blocks = rng.permutation(np.array(free, int))[:count].tolist()
            model.insert(blocks, rng.permutation(np.array(new, int))[:count].tolist())
        elif draw < 0.8:
            count = int(rng.integers(0, len(model.blocks) + 1))
            model.forget(rng.permutation(np.array(sorted(model.blocks), int))[:count].tolist())
        else:
            model.find(rng.integers(0, 48, int(rng.integers(0, 60))).tolist())
        if turn % 8 == 0:
            model.check()
    model.check()


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 5, 6, 7, 16, 100, 1000])
def test_an_index_can_be_filled_to_every_block_again_and_again(num_blocks):
    index = PrefixIndex(num_blocks)
    rng = np.random.default_rng(1)
    for _ in range(6):
        digests = random_digests(rng, num_blocks)
        blocks = rng.permutation(num_blocks).astype(np.int32)
        for part in np.array_split(np.arange(num_blocks), 3):
            index.insert(blocks[part], digests[part])
        index.check_integrity()
        assert np.array_equal(index.find(digests), blocks)
        assert (index.find(random_digests(rng, 50)) == -1).all()
        index.forget(blocks)
        assert (index.find(digests) == -1).all()


@pytest.mark.parametrize("one_by_one", [False, True])
def test_blocks_that_collide_fill_a_whole_index(one_by_one):
    index = PrefixIndex(48)
    digests = colliding_digests(index, "place-and-step")
    for part in np.array_split(np.arange(48), 48 if one_by_one else 1):
        index.insert(part.astype(np.int32), digests[part])
    assert index.find(digests).tolist() == list(range(48))


def test_a_block_may_be_given_another_digest_after_it_was_forgotten():
    index = PrefixIndex(4)
    first, second = words([1, 1, 1, 1]), words([1, 1, 1, 2])
    index.insert(ids(2), first)
    index.forget(ids(2))
    index.insert(ids(2), second)
    assert index.find(np.concatenate([first, second])).tolist() == [-1, 2]
    index.forget(ids(2))
    index.insert(ids(2), first)
    assert index.find(np.concatenate([first, second])).tolist() == [2, -1]


def test_a_digest_may_move_to_another_block():
    index = PrefixIndex(4)
    digest = words([7, 7, 7, 7])
    for block in (0, 3, 1, 0):
        index.insert(ids(block), digest)
        assert index.find(digest).tolist() == [block]
        index.forget(ids(block))
        assert index.find(digest).tolist() == [-1]


def test_a_digest_behind_a_forgotten_one_is_still_found():
    index = PrefixIndex(8)
    digests = colliding_digests(index, "place-and-step")[:3]
    for block in range(3):
        index.insert(ids(block), digests[block : block + 1])
    index.forget(ids(0, 1))
    assert index.find(digests).tolist() == [-1, -1, 2]


def test_the_digest_of_zeros_is_like_any_other():
    index = PrefixIndex(4)
    zeros = words([0, 0, 0, 0])
    assert index.find(zeros).tolist() == [-1]
    index.insert(ids(0), zeros)
    assert index.find(zeros).tolist() == [0]


def test_a_digest_looked_for_twice_is_found_twice():
    index = PrefixIndex(4)
    index.insert(ids(1), words([9, 9, 9, 9]))
    assert index.find(words([9, 9, 9, 9], [9, 9, 9, 8], [9, 9, 9, 9])).tolist() == [1, -1, 1]


def test_nothing_is_found_in_nothing_and_among_nothing():
    index = PrefixIndex(4)
    assert index.find(words()).tolist() == []
    assert index.find(words([1, 2, 3, 4])).tolist() == [-1]
    index.insert(ids(), words())
    index.forget(ids())
    index.check_integrity()


def test_a_cleared_index_holds_nothing_and_can_be_filled():
    index = PrefixIndex(30)
    digests = random_digests(np.random.default_rng(0), 30)
    index.insert(np.arange(30, dtype=np.int32), digests)
    index.clear()
    assert not index.hashed.any()
    assert (index.find(digests) == -1).all()
    index.insert(np.arange(30, dtype=np.int32)[::-1], digests)
    assert index.find(digests).tolist() == list(range(29, -1, -1))
    index.check_integrity()


@pytest.mark.parametrize("collision", COLLISIONS)
def test_of_blocks_with_one_digest_the_first_enters(collision):
    index = PrefixIndex(8)
    one, other = colliding_digests(index, collision)[:2].tolist()
    held = index.enter(ids(5, 1, 3, 2), words(one, other, one, one))
    assert held.tolist() == [-1, -1, 5, 5]
    assert index.find(words(one, other)).tolist() == [5, 1]
    assert index.enter(ids(0), words(other)).tolist() == [1]
    assert np.flatnonzero(index.hashed).tolist() == [1, 5]
    index.forget(ids(5))
    assert index.enter(ids(4, 0), words(one, other)).tolist() == [-1, 1]
    index.check_integrity()


def test_searches_stay_short_while_blocks_come_and_go():
    index = PrefixIndex(500)
    rng = np.random.default_rng(2)
    index.insert(np.arange(500, dtype=np.int32), random_digests(rng, 500))
    for _ in range(200):
        blocks = rng.choice(500, 50, replace=False).astype(np.int32)
        index.forget(blocks)
        index.insert(blocks[:25], random_digests(rng, 25))
        index.enter(blocks[25:], random_digests(rng, 25))
        taken = np.count_nonzero(index._table)
        assert taken < 0.9 * len(index._table)  # an empty place ends a search
    index.check_integrity()


def test_digests_without_a_table_are_kept_and_forgotten():
    digests = BlockDigests(5)
    digests.insert(ids(1, 4), words([1, 2, 3, 4], [5, 6, 7, 8]))
    digests.forget(ids(1))
    assert digests.hashed.tolist() == [False, False, False, False, True]
    assert digests.digests[4].tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize("damage", ["entry", "digest", "miscounted", "duplicate"])
def test_damage_to_an_index_is_found(damage):
    index = PrefixIndex(8)
    index.insert(ids(0, 1), words([1, 1, 1, 1], [2, 2, 2, 2]))
    index.check_integrity()
    if damage == "entry":
        index._table[:] = 0
    elif damage == "digest":
        index.digests[1, 0] = 3
    elif damage == "duplicate":
        index.digests[1] = index.digests[0]
    else:
        index._num_entries = 1
    with pytest.raises(AssertionError):
        index.check_integrity()
