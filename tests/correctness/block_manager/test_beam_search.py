"""Beams fork what is kept, drop the rest, and copy a block only where they diverge."""

import numpy as np

from pagedattn import BlockManager


def test_beam_search_forks_what_is_kept_twice_and_drops_the_rest():
    manager = BlockManager(32, 4)
    (prompt,) = manager.allocate([6])
    beams = np.concatenate([[prompt], manager.fork(prompt, 3)])
    manager.append(beams)
    kept = [beams[1], beams[1], beams[2], beams[2]]
    survivors = manager.fork(kept)
    manager.free(beams)
    assert manager.num_sequences == 4
    copies = manager.append(survivors)
    assert len(copies) == 2  # of each pair, one
    manager.check_integrity()


def test_beams_that_diverge_copy_one_block_each():
    manager = BlockManager(32, 4)
    (prompt,) = manager.allocate([5])
    beams = np.concatenate([[prompt], manager.fork(prompt, 3)])
    assert len(manager.append(beams)) == 3
    next_beams = manager.fork([beams[0], beams[0], beams[3], beams[3]])
    manager.free(beams)
    assert len(manager.append(next_beams)) == 2
    assert manager.num_free_blocks == 32 - 1 - 4
    assert manager.statistics().num_copied_blocks == 5
    manager.check_integrity()
