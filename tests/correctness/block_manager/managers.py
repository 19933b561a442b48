"""A manager with something of everything, and the block tables of one."""

from pagedattn import BlockManager, CacheKeys


def tables(manager, ids, layer_group=0):
    padded, lengths = manager.block_tables(ids, layer_group)
    blocks = -(-lengths // manager.block_size)
    return [row[:count].tolist() for row, count in zip(padded, blocks, strict=True)]


def busy_manager(**arguments):
    """A manager with something of everything."""
    manager = BlockManager(24, 4, num_host_blocks=8, windows=(None, 6), **arguments)
    first, second = manager.admit([[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5]]).sequence_ids
    manager.fork(first)
    (gone,) = manager.admit([[7] * 4], CacheKeys(salt="a")).sequence_ids
    manager.free([gone])
    manager.swap_out([second])
    manager.allocate([3])
    manager.start_step()
    (late,) = manager.admit([[6] * 5]).sequence_ids
    manager.free([late])
    return manager
