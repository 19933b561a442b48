"""What a block manager keeps, and what can be asked of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pagedattn.block_manager import growth, swapping
from pagedattn.block_manager.block_pool import BlockPool
from pagedattn.block_manager.in_flight import StepsInFlight
from pagedattn.block_manager.layer_groups import LayerGroups
from pagedattn.block_manager.lineage import Lineage
from pagedattn.block_manager.prefix_cache import PrefixCache
from pagedattn.block_manager.prefix_index import BlockDigests
from pagedattn.block_manager.ragged import token_counts, whole_number, whole_sum
from pagedattn.block_manager.sequence_tables import SequenceTables
from pagedattn.block_manager.snapshot import FORMAT, Snapshot
from pagedattn.block_manager.statistics import BlockStatistics

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import ArrayLike, NDArray

_ONE = np.int64(1)
_COUNTERS = ("num_copied_blocks", "num_swapped_out_blocks", "num_swapped_in_blocks")


class ManagerState:
    """The arrays behind a `BlockManager`, and the questions that change nothing.

    A question may notice that steps in flight are done, which frees the blocks that waited.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        num_host_blocks: int = 0,
        prefix_caching: bool = True,
        seed: bytes | None = None,
        windows: Sequence[int | None] = (None,),
        watermark: float = 0.0,
    ) -> None:
        num_blocks = whole_number(num_blocks, "num_blocks", 0)
        block_size = whole_number(block_size, "block_size", 1)
        num_host_blocks = whole_number(num_host_blocks, "num_host_blocks", 0)
        if not isinstance(watermark, (int, float)) or not 0 <= watermark <= 1:
            raise ValueError(f"watermark is {watermark!r}; it must be a number from 0 to 1")
        if not isinstance(prefix_caching, (bool, np.bool_)):
            raise ValueError(f"prefix_caching is {prefix_caching!r}; it must be True or False")
        prefix_caching = bool(prefix_caching)
        self.block_size = block_size
        self.watermark = watermark
        self._groups = LayerGroups(windows, block_size)
        self._tables = SequenceTables(self._groups, block_size if prefix_caching else 0)
        self._sources = [object() for _ in range(self._groups.count)]
        self._pool = BlockPool(num_blocks)
        self._host = BlockPool(num_host_blocks, "host") if num_host_blocks else None
        self._cache = PrefixCache(num_blocks, block_size, seed) if prefix_caching else None
        if self._cache is not None:
            self._pool.digests = self._cache.index
            if self._host is not None:
                self._host.digests = BlockDigests(num_host_blocks)
        self._steps = StepsInFlight(num_blocks)
        self._settings = {
            "format": FORMAT,
            "num_blocks": num_blocks,
            "block_size": block_size,
            "num_host_blocks": num_host_blocks,
            "prefix_caching": prefix_caching,
            "windows": list(self._groups.windows),
            "watermark": watermark,
        }
        self.num_copied_blocks = self.num_swapped_out_blocks = self.num_swapped_in_blocks = 0

    # -- what is there ---------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool, free or not."""
        return self._pool.num_blocks

    @property
    def num_host_blocks(self) -> int:
        """Blocks in the host's pool, free or not."""
        return self._host.num_blocks if self._host else 0

    @property
    def num_layer_groups(self) -> int:
        """Layer groups, each with its own block tables."""
        return self._groups.count

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be handed out, those whose contents can still be found included."""
        return self._pool.num_free

    @property
    def num_cached_blocks(self) -> int:
        """Free blocks whose contents can still be found."""
        return self._pool.num_cached

    @property
    def num_deferred_blocks(self) -> int:
        """Blocks that no sequence refers to but that steps in flight may still read."""
        return self._pool.num_deferred

    @property
    def num_free_host_blocks(self) -> int:
        """Blocks of the host's pool that can be handed out."""
        return self._host.num_free if self._host else 0

    @property
    def num_sequences(self) -> int:
        """Live sequences, those swapped out included."""
        return self._tables.rows.num_live

    def sequence_ids(self) -> NDArray[np.int64]:
        """Ids of all live sequences; int64 [num_sequences]."""
        return self._tables.rows.ids(self._tables.rows.live_rows())

    def sequence_group(self, sequence_ids: ArrayLike) -> NDArray[np.int64]:
        """Ids of all live members of the groups of these sequences.

        A group is a sequence with its forks and theirs; it swaps and is dropped as one
        (SOSP '23, §4.5).
        """
        rows = self._tables.rows
        return rows.ids(rows.group_rows(rows.rows_of(sequence_ids)))

    def is_swapped_out(self, sequence_ids: ArrayLike) -> NDArray[np.bool_]:
        """Whether each sequence's blocks are in the host's pool; bool [num_sequences]."""
        return self._tables.rows.swapped[self._tables.rows.rows_of(sequence_ids)]

    def num_tokens(self, sequence_ids: ArrayLike) -> NDArray[np.int64]:
        """Tokens of each sequence; int64 [num_sequences]."""
        return self._tables.rows.num_tokens[self._tables.rows.rows_of(sequence_ids)]

    def ref_counts(self, block_ids: ArrayLike) -> NDArray[np.int32]:
        """How many block tables refer to each block; int32, in the shape of `block_ids`.

        Raises:
            ValueError: something is not a block of the pool.

        """
        blocks = np.asarray(block_ids)
        if blocks.size == 0:
            return np.zeros(blocks.shape, np.int32)
        if blocks.dtype.kind not in "iu" or blocks.min() < 0 or blocks.max() >= self.num_blocks:
            raise ValueError(f"block ids must be whole numbers from 0 to {self.num_blocks - 1}")
        return self._pool.ref_counts(blocks)

    def block_tables(
        self, sequence_ids: ArrayLike, layer_group: int = 0
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Block tables of a batch, padded, and the sequences' lengths.

        Args:
            sequence_ids: distinct live sequences that are not swapped out.
            layer_group: which group of layers.

        Returns:
            block_tables: int32 [num_sequences, max_blocks], physical ids in logical order;
                max_blocks is the longest sequence's. Entries past a sequence's last block are
                ids of any blocks of the pool and mean nothing; blocks that have left a window
                are 0.
            num_tokens: int64 [num_sequences].

        """
        return self.page_table(sequence_ids, layer_group)[:2]

    def page_table(
        self, sequence_ids: ArrayLike, layer_group: int = 0
    ) -> tuple[NDArray[np.int32], NDArray[np.int64], Lineage | None]:
        """Block tables and lengths, as `block_tables` returns them, and where they come from.

        Returns:
            block_tables: int32 [num_sequences, max_blocks].
            num_tokens: int64 [num_sequences].
            lineage: tells of later tables, without a comparison, that they begin as these; None for
                a group with a sliding window, whose tables lose entries while they grow.

        """
        layer_group = whole_number(layer_group, "layer_group", 0)
        if layer_group >= self._groups.count:
            raise ValueError(
                f"layer_group is {layer_group}; there are {self._groups.count}, from 0"
            )
        state = self._tables.rows
        rows = state.resident_rows_of(sequence_ids)
        num_tokens = state.num_tokens[rows]
        lists = self._tables.lists_of(rows, layer_group)
        ends = self._tables.blocks_for(num_tokens)
        # ids of the host's pool must not stand in the padding, which may be read
        tables = self._tables.lists.padded(lists, ends, masked=state.num_swapped > 0)
        lineage = None
        if self._groups.windows[layer_group] is None:
            lineage = Lineage(self._sources[layer_group], state.lineage[rows])
        return tables, num_tokens, lineage

    def can_allocate(self, num_tokens: ArrayLike) -> bool:
        """Whether `allocate` would find the blocks for prompts of these lengths."""
        lengths = token_counts(num_tokens)
        needed = self._groups.count * whole_sum(self._tables.blocks_for(lengths))
        self._poll()
        return needed + self._num_kept_free <= self.num_free_blocks

    def can_append(self, sequence_ids: ArrayLike, num_new_tokens: ArrayLike = 1) -> bool:
        """Whether `append` would find the blocks."""
        rows = self._tables.rows.resident_rows_of(sequence_ids)
        self._poll()
        needed = growth.plan(self._tables, self._pool, rows, self._counts(num_new_tokens, rows))
        copied = self._groups.count * needed.writers.size
        return needed.num_needed <= needed.num_free and copied <= self.num_free_blocks

    def can_swap_out(self, sequence_ids: ArrayLike) -> bool:
        """Whether `swap_out` would find the blocks on the host."""
        rows = self._tables.rows.group_rows(self._tables.rows.resident_rows_of(sequence_ids))
        self._poll()
        return swapping.plan_out(self._tables, self._host, rows).fits()

    def can_swap_in(self, sequence_ids: ArrayLike) -> bool:
        """Whether `swap_in` would find the blocks on the device."""
        rows = self._swapped_groups(sequence_ids)
        self._poll()
        return rows.size == 0 or self._plan_in(rows).fits(self._num_kept_free)

    def statistics(self, final_num_tokens: ArrayLike | None = None) -> BlockStatistics:
        """Count what the pool's blocks and slots are used for, now.

        Args:
            final_num_tokens: int [num_sequences], the length that each of `sequence_ids()` will
                end with, if that is known: it tells slots that wait for tokens from slots that
                will never hold one.

        """
        finals = None if final_num_tokens is None else token_counts(final_num_tokens)
        return BlockStatistics.of(self, finals)

    def snapshot(self) -> Snapshot:
        """Copy the whole state: to print as a picture, to keep, to `BlockManager.restore`."""
        tables, settings = self._tables, dict(self._settings)
        rows = tables.rows.live_rows()
        lists = tables.all_lists_of(rows)
        arrays = tables.rows.state() | self._steps.state()
        arrays["list_first"] = tables.lists.first[lists]
        arrays["list_ends"] = tables.per_list(tables.blocks_for(tables.rows.num_tokens[rows]))
        arrays["blocks"] = tables.lists.entries[tables.held(rows)]
        for name, pool in (("pool", self._pool), ("host", self._host)):
            if pool is None:
                continue
            arrays |= {f"{name}_{part}": array for part, array in pool.state().items()}
            if pool.digests is not None:
                arrays[f"{name}_hashed"] = np.flatnonzero(pool.digests.hashed)
                arrays[f"{name}_digests"] = pool.digests.digests[pool.digests.hashed]
        settings["newest_step"] = self._steps.newest
        settings["media"] = {
            str(row): {str(column): added.hex() for column, added in waiting.items()}
            for row, waiting in tables.rows.media.items()
        }
        settings["counters"] = {name: getattr(self, name) for name in _COUNTERS}
        if self._cache is not None:
            settings["seed"] = self._cache.hasher.seed.hex()
            settings["num_lookup_tokens"] = self._cache.num_lookup_tokens
            settings["num_hit_tokens"] = self._cache.num_hit_tokens
        return Snapshot(settings, arrays)

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless counts, tables, pools and the prefix index agree.

        Each block's reference count is the number of block-table entries that name it, and each
        unreferenced block waits in one place. Cost: linear in the pools and the tables.
        """
        rows, lists = self._tables.rows, self._tables.lists
        rows.check_integrity()
        lists.check_integrity()
        live = rows.live_rows()
        for pool, members in (
            (self._pool, live[~rows.swapped[live]]),
            (self._host, live[rows.swapped[live]]),
        ):
            if pool is None:
                assert members.size == 0, "a sequence is swapped out to no pool"
                continue
            pool.check_integrity()
            named = lists.entries[self._tables.held(members)]
            references = np.bincount(named, minlength=pool.num_blocks)
            counts = pool.ref_counts(np.arange(pool.num_blocks, dtype=np.int32))
            assert np.array_equal(references, counts), "reference counts differ from the tables"
            partly = members[rows.num_tokens[members] % self.block_size > 0]
            last = rows.num_tokens[partly] // self.block_size
            tails = lists.entries[self._tables.at(partly, 0, last)]
            shared = pool.ref_counts(tails) > 1
            assert rows.forked[partly[shared]].all(), "a shared block would be written"
        if self._cache is not None:
            self._cache.index.check_integrity()
        open_lists = np.sort(self._tables.all_lists_of(live))
        assert np.array_equal(open_lists, lists.open_lists()), "a list without a sequence is open"

    # -- helpers ---------------------------------------------------------------------------

    @property
    def _num_kept_free(self) -> int:
        """Blocks that the watermark keeps from new and returning sequences, for those that run."""
        state = self._tables.rows
        if state.num_live == state.num_swapped:
            return 0
        return int(self.watermark * self._pool.num_blocks)

    def _counts(
        self, num_tokens: ArrayLike, rows: NDArray[np.int64]
    ) -> NDArray[np.int64] | np.int64:
        """Token counts, checked: one for all, or one for each of `rows`."""
        if type(num_tokens) is int and num_tokens == 1:  # True is no count
            return _ONE
        counts = token_counts(num_tokens)
        if counts.size not in (1, rows.size):
            raise ValueError(f"{counts.size} token counts were given for {rows.size} sequences")
        return counts[0] if counts.size == 1 else counts

    def _swapped_groups(self, sequence_ids: ArrayLike) -> NDArray[np.int64]:
        state = self._tables.rows
        rows = state.group_rows(state.rows_of(sequence_ids))
        resident = ~state.swapped[rows]
        if resident.any():
            sequence = int(state.ids(rows[np.argmax(resident)]))
            raise ValueError(f"sequence {sequence} is not swapped out")
        return rows

    def _become(self, settings: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Make this manager, which is new, what a snapshot says."""
        for name, pool in (("pool", self._pool), ("host", self._host)):
            if pool is None:
                continue
            if pool.digests is not None:
                hashed = arrays[f"{name}_hashed"].astype(np.int32)
                pool.digests.insert(hashed, arrays[f"{name}_digests"])
            state = {part: arrays[f"{name}_{part}"] for part in pool.state()}
            pool.restore(state, int(arrays["running"].max(initial=0)))
        tables = self._tables
        missing = arrays["next_ids"].size - tables.rows.capacity
        tables.lists.add_lists(missing * self._groups.count)
        ends = tables.per_list(tables.blocks_for(arrays["num_tokens"]))
        held = (ends - arrays["list_first"]).sum()
        if not np.array_equal(ends, arrays["list_ends"]) or held != arrays["blocks"].size:
            raise ValueError("the block tables do not have as many blocks as the tokens need")
        rows = tables.rows.restore(arrays)
        tables.rows.media = {
            int(row): {int(column): bytes.fromhex(added) for column, added in waiting.items()}
            for row, waiting in settings["media"].items()
        }
        lists = tables.all_lists_of(rows)
        tables.lists.open(lists, arrays["list_first"], arrays["list_ends"])
        tables.lists.entries[tables.held(rows)] = arrays["blocks"]
        newest_step = whole_number(settings["newest_step"], "newest_step", 0)
        if newest_step >= 1 << 62:
            raise ValueError(f"newest_step is {newest_step}; there are not so many steps")
        self._steps.restore(newest_step, arrays)
        for name in _COUNTERS:
            setattr(self, name, whole_number(settings["counters"][name], name, 0))
        for name in ("num_lookup_tokens", "num_hit_tokens") if self._cache is not None else ():
            setattr(self._cache, name, whole_number(settings[name], name, 0))

    def _plan_in(self, rows: NDArray[np.int64]) -> swapping.Move:
        assert self._host is not None
        return swapping.plan_in(self._tables, self._pool, self._host, self._cache, rows)

    def _poll(self) -> None:
        """Notice steps that say they are done."""
        if self._steps.newest_running and self._steps.poll():
            self._settle()

    def _settle(self) -> None:
        """Free what waited for steps that are done."""
        for pool in (self._pool, self._host):
            if pool is not None:
                pool.settle(self._steps.oldest_running - 1, self._steps.newest_running)
