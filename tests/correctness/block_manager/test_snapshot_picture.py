"""A snapshot is drawn as it would be by hand: blocks, groups, what waits, and the host."""

import numpy as np

from pagedattn import BlockManager

LEGEND = "A-Z a sequence group, small where its last block has room; 2-9 named by so many tables"


def test_the_picture_of_a_small_pool_is_as_drawn_by_hand():
    manager = BlockManager(20, 4, num_host_blocks=4)
    first, second = manager.admit([[1, 2, 3, 4, 5, 6, 7, 8, 9], [2, 2, 2, 2]]).sequence_ids
    manager.fork(first, 2)
    manager.append([first])  # the copy of its last block
    manager.free(manager.admit([[3, 3, 3, 3, 3, 3, 3, 3]]).sequence_ids)
    (moved,) = manager.allocate([8])
    manager.swap_out([moved])
    manager.allocate([9])
    manager.start_step()
    manager.free([second])
    assert str(manager.snapshot()) == (
        "20 blocks of 4 tokens: 7 used by 4 sequences, 2 cached ░, 1 deferred ▒, 10 empty ·\n"
        " 0 332▒a░░B Bb······ ····\n"
        "4 blocks on the host: 2 used by 1 sequences\n"
        "0 CC··\n" + LEGEND
    )


def test_lines_of_a_picture_are_as_long_as_asked_and_numbered():
    manager = BlockManager(11, 4)
    manager.allocate([9])
    assert manager.snapshot().draw(columns=4).splitlines()[1:-1] == [
        " 0 AAa·",
        " 4 ····",
        " 8 ···",
    ]
    assert manager.snapshot().draw(10).splitlines()[1:-1] == [" 0 AAa····· ··", "10 ·"]


def test_a_picture_of_nothing_is_empty():
    assert str(BlockManager(3, 4).snapshot()) == (
        "3 blocks of 4 tokens: 0 used by 0 sequences, 0 cached ░, 0 deferred ▒, 3 empty ·\n0 ···\n"
        + LEGEND
    )


def test_a_digit_says_how_many_tables_name_a_block_and_letters_begin_again():
    manager = BlockManager(40, 4)
    (parent,) = manager.allocate([4])
    manager.fork(parent, 8)
    manager.allocate(np.full(27, 4))
    drawn = manager.snapshot().draw(40).splitlines()[1]
    assert drawn == " 0 9BCDEFGH IJKLMNOP QRSTUVWX YZAB···· ········"
    manager.fork(parent, 5)
    assert manager.snapshot().draw().splitlines()[1][3] == "9"


def test_every_layer_group_of_a_sequence_is_drawn_with_its_letter():
    manager = BlockManager(8, 4, windows=(None, 4))
    manager.admit([[5] * 3, [6] * 8])
    assert manager.snapshot().draw().splitlines()[1] == "0 aaBBBB··"


def test_a_swapped_out_group_is_drawn_on_the_host_alone():
    manager = BlockManager(8, 4, num_host_blocks=6)
    (parent,) = manager.allocate([7])
    (fork,) = manager.fork(parent)
    manager.append([fork])  # two blocks of seven and eight tokens behind one that they share
    manager.allocate([4])
    manager.swap_out([parent])
    assert manager.snapshot().draw(4).splitlines()[1:-1] == [
        "0 ···B",
        "4 ····",
        "6 blocks on the host: 3 used by 2 sequences",
        "0 2aA·",
        "4 ··",
    ]


def test_the_last_blocks_number_says_how_wide_numbers_are():
    drawn = BlockManager(10, 4).snapshot().draw(5).splitlines()[:-1]
    assert drawn[1:] == ["0 ·····", "5 ·····"]
