"""Pools of blocks: some with digests, some with all blocks taken."""

import numpy as np

from pagedattn.block_manager.block_pool import BlockPool
from pagedattn.block_manager.prefix_index import BlockDigests


def ids(*blocks):
    return np.array(blocks, np.int32)


def pool_with_digests(num_blocks, hashed=()):
    """A pool whose digests say of `hashed` that their contents can be found."""
    pool = BlockPool(num_blocks)
    pool.digests = BlockDigests(num_blocks)
    pool.digests.hashed[list(hashed)] = True
    return pool


def filled(num_blocks, hashed=()):
    """Such a pool, all of whose blocks are taken."""
    pool = pool_with_digests(num_blocks)
    pool.take(num_blocks)
    pool.digests.hashed[list(hashed)] = True
    return pool


def empty_pool(num_blocks):
    pool = BlockPool(num_blocks)
    pool.take(num_blocks)
    return pool
