"""What reading shared blocks once costs and saves, by rates that a GPU is taken to have."""

from __future__ import annotations

from dataclasses import dataclass

TILE_ROWS = 128
SHORT_ROWS = 32
"""Queries times heads of a group up to which kernels divide the keys over the GPU by themselves."""
SHORT_ELEMENTS = 4096
"""The same, times the head size."""


@dataclass(frozen=True)
class Costs:
    """Rates of a device, all of it together.

    Attributes:
        fixed: seconds that three launches more cost, whatever they do.
        read: bytes a second of K and V, read from memory.
        read_again: the same where other sequences read the block too: from a cache, and beside what
            is read from memory.
        multiply: floating-point operations a second over tiles of `TILE_ROWS` rows.
        item: seconds that a tile of queries costs beside its products.
        divided: seconds of a launch over few queries, whose keys are divided over the device and
            whose partial results are merged.
        merge: bytes a second of partial results: gathered for, written, read and merged.
        margin: how many times its cost sharing has to save.

    """

    fixed: float
    read: float
    read_again: float
    multiply: float
    item: float
    divided: float
    merge: float
    margin: float


GPU = Costs(
    fixed=4e-6,
    read=3.0e12,
    read_again=11e12,
    multiply=6.8e14,
    item=2e-6,
    divided=16e-6,
    merge=0.9e12,
    margin=1.1,
)
"""An H100 SXM: fitted to both ways over prefixes of 128 to 16 k tokens and batches of 2 to 256.

An H200 is taken to be alike.

32 query heads on 8 KV heads of size 128, bfloat16, 256 tokens of each sequence its own.
`bench_shared_prefix_gpu.py` times both ways on either side of where they cross, and fails where the
choice loses. All sequences read a block at about the same time, so that a prefix that is larger
than the L2 is read again as fast.
"""


@dataclass(frozen=True)
class Layer:
    """What of a layer, and of the device it is on, decides how to share.

    Attributes:
        num_query_heads: of a token.
        num_kv_heads: divides them.
        head_size: elements.
        kv_bytes: bytes of an element of the cache.
        processors: multiprocessors of the GPU; 1 on a CPU.
        costs: rates of the device; None shares all there is, whatever it costs.

    """

    num_query_heads: int
    num_kv_heads: int
    head_size: int
    kv_bytes: int
    processors: int
    costs: Costs | None

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_query_heads // self.num_kv_heads

    @property
    def short_rows(self) -> int:
        """Queries times heads of a group that a kernel takes at once; see `SHORT_ROWS`."""
        return min(SHORT_ROWS, SHORT_ELEMENTS // self.head_size)

    @property
    def token_bytes(self) -> int:
        """K and V of a token."""
        return 2 * self.num_kv_heads * self.head_size * self.kv_bytes

    @property
    def row_bytes(self) -> int:
        """A query token's partial result and log-sum-exp, in float32, written and read."""
        return 8 * self.num_query_heads * (self.head_size + 1)

    def tiles(self, queries: int) -> int:
        """Tiles of one KV head that so many query tokens fill."""
        return -(-queries // max(1, TILE_ROWS // self.group))

    def tile_seconds(self, costs: Costs, tiles: float) -> float:
        """Seconds that a processor takes for a tile and one key, where `tiles` read the same."""
        operations = 4 * TILE_ROWS * self.head_size
        key_bytes = 2 * self.head_size * self.kv_bytes
        return self.processors * max(
            operations / costs.multiply, key_bytes / (costs.read * max(1.0, tiles))
        )
