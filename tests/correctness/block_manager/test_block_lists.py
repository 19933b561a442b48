"""Lists of block ids in one array, against a dictionary of lists."""

import numpy as np
import pytest

from pagedattn.block_manager.block_lists import BlockLists


def numbers(*values):
    return np.array(values, np.int64)


class Model:
    """Lists as a dictionary: number to first column and blocks; and the operations on both."""

    def __init__(self, num_lists):
        self.lists = BlockLists(num_lists)
        self.num_lists = num_lists
        self.kept = {}  # number: first column, blocks
        self.next_block = 1

    def blocks(self, count):
        self.next_block += count
        return list(range(self.next_block - count, self.next_block))

    def write(self, chosen, starts, ends):
        for number, start, end in zip(chosen, starts, ends, strict=True):
            first, blocks = self.kept[number]
            new = self.blocks(end - start)
            places = self.lists.addresses(numbers(number), numbers(start), numbers(end))
            self.lists.entries[places] = new
            self.kept[number] = first, blocks[: start - first] + new

    def open(self, chosen, first, ends):
        self.lists.open(numbers(*chosen), numbers(*first), numbers(*ends))
        self.kept |= {number: (start, []) for number, start in zip(chosen, first, strict=True)}
        self.write(chosen, first, ends)

    def ends(self, chosen):
        return [self.kept[number][0] + len(self.kept[number][1]) for number in chosen]

    def extend(self, chosen, counts):
        ends = self.ends(chosen)
        wanted = [end + count for end, count in zip(ends, counts, strict=True)]
        self.lists.extend(numbers(*chosen), numbers(*ends), numbers(*wanted))
        self.write(chosen, ends, wanted)

    def leave(self, chosen, counts):
        """Let the first columns leave a window."""
        for number, count in zip(chosen, counts, strict=True):
            first, blocks = self.kept[number]
            count = min(count, len(blocks) - 1)
            self.kept[number] = first + count, blocks[count:]
            self.lists.first[number] = first + count

    def close(self, chosen):
        self.lists.close(numbers(*chosen))
        for number in chosen:
            del self.kept[number]

    def padded(self, chosen):
        ends = self.ends(chosen)
        table = self.lists.padded(numbers(*chosen), numbers(*ends), masked=True)
        width = max(ends, default=0)
        expected = [[0] * self.kept[n][0] + self.kept[n][1] for n in chosen]
        assert table.dtype == np.int32
        assert table.shape == (len(chosen), width)
        assert table.tolist() == [row + [0] * (width - len(row)) for row in expected]
        bare = self.lists.padded(numbers(*chosen), numbers(*ends), masked=False)
        assert bare.dtype == np.int32
        assert bare.shape == table.shape
        for row, list_of in zip(bare.tolist(), expected, strict=True):
            assert row[: len(list_of)] == list_of
        return bare

    def check(self):
        self.lists.check_integrity()
        chosen = sorted(self.kept)
        assert self.lists.open_lists().tolist() == chosen
        first = numbers(*[self.kept[number][0] for number in chosen])
        places = self.lists.addresses(numbers(*chosen), first, numbers(*self.ends(chosen)))
        held = [block for number in chosen for block in self.kept[number][1]]
        assert self.lists.entries[places].tolist() == held
        assert (self.lists.limit[chosen] >= self.ends(chosen)).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("windows", [False, True], ids=["no-windows", "windows"])
def test_random_lists_agree_with_a_dictionary(windows, seed):
    rng = np.random.default_rng(seed)
    model = Model(12)
    for turn in range(1500):
        open_now = rng.permutation(sorted(model.kept)).astype(int)
        closed = rng.permutation(sorted(set(range(model.num_lists)) - set(model.kept))).astype(int)
        chosen = open_now[: int(rng.integers(0, 5))].tolist()
        draw = rng.random()
        if draw < 0.25:
            new = closed[: int(rng.integers(0, 5))].tolist()
            first = rng.integers(0, 500 if windows else 1, len(new))
            lengths = rng.choice([1, 4, 7, 8, 9, 12, 13, 90], len(new))
            model.open(new, first.tolist(), (first + lengths).tolist())
        elif draw < 0.65:
            model.extend(chosen, rng.choice([0, 1, 2, 3, 40], len(chosen)).tolist())
        elif draw < 0.75 and windows:
            model.leave(chosen, rng.integers(0, 30, len(chosen)).tolist())
        elif draw < 0.85:
            model.close(chosen[:3])
        elif draw < 0.87:
            model.lists.add_lists(2)
            model.num_lists += 2
        else:
            model.padded(chosen)
        if turn % 5 == 0:
            model.check()
    model.padded(sorted(model.kept))


def test_the_gaps_of_closed_lists_are_closed_before_the_array_grows():
    model = Model(400)
    model.open(list(range(300)), [0] * 300, [20] * 300)
    model.close([n for n in range(300) if n % 4])
    size = model.lists.entries.size
    model.open(list(range(300, 310)), [0] * 10, [300] * 10)  # no gap is as large
    assert model.lists.entries.size == size
    model.check()


def test_lists_that_come_and_go_take_no_more_room_with_time():
    model = Model(50)
    rng = np.random.default_rng(5)
    sizes = set()
    for turn in range(400):
        if turn >= 20:
            model.close([turn % 50 - 20 if turn % 50 >= 20 else turn % 50 + 30])
        model.open([turn % 50], [0], [int(rng.integers(1, 200))])
        sizes.add(model.lists.entries.size)
    assert max(sizes) < 3 * 20 * 300
    model.check()


def test_a_list_that_grows_one_by_one_is_moved_seldom():
    model = Model(1)
    model.open([0], [0], [1])
    limits = set()
    for _ in range(1500):
        model.extend([0], [1])
        limits.add(int(model.lists.limit[0]))
    assert len(limits) < 25
    model.check()


def test_a_window_that_slides_on_takes_no_more_room():
    model = Model(2)
    model.open([0, 1], [0, 0], [5, 3])
    for _ in range(1000):
        model.extend([0], [1])
        model.leave([0], [1])
    assert model.lists.entries.size < 1000
    assert model.kept[0][0] == 1000
    model.check()
    model.padded([1, 0])


def test_room_that_is_there_moves_nothing():
    model = Model(2)
    model.open([0, 1], [0, 0], [3, 3])
    start, spare = model.lists.start.copy(), int(model.lists.limit[0]) - 3
    model.extend([0], [spare])
    assert np.array_equal(model.lists.start, start)
    model.extend([0], [1])
    assert model.lists.start[0] != start[0]
    model.check()


def test_a_table_has_zeros_behind_each_list_and_before_its_window():
    lists = BlockLists(3)
    lists.open(numbers(0, 2), numbers(0, 0), numbers(2, 4))
    lists.entries[lists.addresses(numbers(0, 2), numbers(0, 0), numbers(2, 4))] = range(1, 7)
    assert lists.padded(numbers(2, 0), numbers(4, 2), masked=True).tolist() == [
        [3, 4, 5, 6],
        [1, 2, 0, 0],
    ]
    lists.first[2] = 3
    assert lists.padded(numbers(2, 0), numbers(4, 2), masked=True).tolist() == [
        [0, 0, 0, 6],
        [1, 2, 0, 0],
    ]


def test_a_table_is_a_copy():
    model = Model(2)
    model.open([0, 1], [0, 0], [3, 5])
    table = model.padded([0, 1])
    table[:] = 99
    model.check()
    model.lists.entries[:] = 7
    assert (table == 99).all()


def test_a_table_of_no_lists_is_empty():
    model = Model(2)
    assert model.padded([]).shape == (0, 0)
    model.open([], [], [])
    model.close([])
    model.extend([], [])
    model.check()


def test_a_table_of_the_last_lists_of_a_full_array_is_whole():
    model = Model(3)
    model.open([0], [0], [8])
    while model.lists._end < model.lists.entries.size:  # fill the array to its last entry
        room = model.lists.entries.size - model.lists._end
        model.lists.add_lists(1)
        model.num_lists += 1
        model.open([model.num_lists - 1], [0], [min(room, 4)])
    model.padded([model.num_lists - 1, 0])  # the last row ends behind the array
    model.open([1], [0], [200])
    model.padded([model.num_lists - 1, 1, 0])
    model.check()


def test_gaps_that_were_to_be_reused_are_made_up_for_when_they_are_closed():
    model = Model(40)
    model.open(list(range(20)), [0] * 20, [8] * 20)
    model.close(list(range(18)))
    model.open([*range(18), 30], [0] * 19, [8] * 18 + [128])
    model.check()


def test_new_room_names_no_block_that_another_list_held():
    lists = BlockLists(40)
    lists.open(np.arange(20), np.zeros(20, np.int64), np.full(20, 8))
    lists.entries[:160] = 7  # ids of the host's pool, perhaps
    lists.close(np.arange(18))
    lists.open(numbers(30), numbers(0), numbers(128))
    places = lists.addresses(numbers(30), numbers(0), numbers(128))
    assert not lists.entries[places].any()


def test_host_memory_is_counted():
    lists = BlockLists(10)
    before = lists.nbytes
    lists.add_lists(90)
    per_list = [lists.start, lists.first, lists.limit, lists._size_class]
    assert lists.nbytes == lists.entries.nbytes + sum(array.nbytes for array in per_list)
    assert lists.nbytes - before == 90 * sum(array.itemsize for array in per_list)


@pytest.mark.parametrize("damage", ["overlap", "lost", "end", "before"])
def test_damage_to_lists_is_found(damage):
    model = Model(3)
    model.open([0, 1], [0, 0], [3, 9])
    model.close([1])
    model.check()
    if damage == "overlap":
        model.lists._free = {1: [0]}
    elif damage == "lost":
        model.lists._free.clear()
    elif damage == "end":
        model.lists._end += 4
    else:
        model.lists.first[0] = -1
    with pytest.raises(AssertionError):
        model.lists.check_integrity()
