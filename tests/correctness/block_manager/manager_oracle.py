"""What the state machine's rules play against: each sequence as lists, and two memories.

The oracle keeps each sequence's tokens as a list. Beside it stand two memories, the device's and
the host's, with a number a slot: it stands for the K and V of a token, which depend on the whole
prefix, its salt and the layer group. They are written through the page table and moved by the
copy lists, as the KV cache is.
"""

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize

from pagedattn import BlockManager, CacheKeys, OutOfBlocksError, PageTable
from pagedattn.block_manager import prefix_index

FEW = prefix_index._FEW
GARBAGE = -1
MAX_SEQUENCES = 12
# what else contents depend on: a salt, or an image at a position
KEYS = [
    CacheKeys(),
    CacheKeys(),
    CacheKeys(salt="a"),
    CacheKeys(salt="b"),
    CacheKeys(media=((0, b"cat"),)),
    CacheKeys(media=((5, b"dog"),)),
]


class CopyFailedError(Exception):
    pass


def copy_fails(copies):
    assert len(copies)
    raise CopyFailedError


class Contents:
    """One sequence, as the oracle sees it."""

    def __init__(self, key, tokens, seen_from, group, *, known):
        self.key, self.tokens, self.known = key, list(tokens), known
        self.seen_from = seen_from  # position of the first query after the last growth
        self.group = group
        self.swapped = False

    def fork(self):
        twin = Contents(self.key, self.tokens, self.seen_from, self.group, known=self.known)
        twin.unique = self.unique
        return twin

    unique = None  # of sequences without known tokens: nobody shares with them


def picture(manager):
    """All that a failed operation must leave as it was."""
    snapshot = manager.snapshot()
    return [snapshot.settings, *(array.tobytes() for array in snapshot.arrays.values())]


def held(manager):
    """What a failed copy must leave: it may have cost cached blocks, and their order."""
    arrays = manager.snapshot().arrays
    kept = ("ids", "num_tokens", "num_known", "swapped", "blocks", "list_first", "pool_ref_counts")
    return [arrays[name].tobytes() for name in kept] + [
        manager.num_free_blocks,
        manager.num_free_host_blocks,
        manager.num_deferred_blocks,
    ]


class ManagerOracle(RuleBasedStateMachine):
    """A block manager, what it should hold, and what every rule needs."""

    @initialize(
        num_blocks=st.one_of(st.integers(1, 12), st.integers(20, 80)),
        block_size=st.integers(1, 4),
        num_host_blocks=st.sampled_from([0, 12, 60, 60]),
        windows=st.sampled_from([(None,), (None,), (3,), (None, 1), (5, None, 2)]),
        watermark=st.sampled_from([0.0, 0.0, 0.1]),
        caching=st.sampled_from([True, True, True, False]),
        with_steps=st.booleans(),
        few=st.sampled_from([0, 3, 128]),
    )
    def start(
        self, num_blocks, block_size, num_host_blocks, windows, watermark, caching, with_steps, few
    ):
        prefix_index._FEW = few  # digests one after the other, or all at once
        self.manager = BlockManager(
            num_blocks,
            block_size,
            num_host_blocks=num_host_blocks,
            prefix_caching=caching,
            windows=windows,
            watermark=watermark,
        )
        self.size, self.windows, self.caching = block_size, windows, caching
        self.device = np.full((num_blocks, block_size), GARBAGE)
        self.host = np.full((max(1, num_host_blocks), block_size), GARBAGE)
        self.sequences = {}
        self.values = {}
        self.next_unique = 0
        self.tables_of = {}  # source and number of a lineage: the longest block table so far
        self.with_steps = with_steps
        self.unwritten = {}  # sequence: its positions that the next step writes
        self.running = {}  # step: the slots it reads, and what it must find there
        self.written_by = {}  # step: slots
        self.batches = {}  # step: groups that it writes for
        self.cacheable = set()  # prefixes that must be found as long as nothing was evicted
        self.complete = True

    def value(self, contents, position, group):
        """The number that stands for one token's K and V."""
        prefix = self.prefix(contents.key, contents.tokens, position + 1)
        return self.values.setdefault((prefix, contents.unique, group), len(self.values))

    def prefix(self, key, tokens, stop):
        """What the K and V of the last of `stop` tokens depend on."""
        seen = tuple((place, image) for place, image in key.media if place < stop)
        return key.salt, seen, tuple(tokens[:stop])

    def blocks(self, length):
        return -(-length // self.size)

    def first_kept(self, contents, window):
        if window is None:
            return 0
        return max(0, (contents.seen_from - window + 1) // self.size)

    def num_held(self, contents):
        total = self.blocks(len(contents.tokens))
        return sum(total - self.first_kept(contents, window) for window in self.windows)

    def resident(self):
        return sorted(i for i, c in self.sequences.items() if not c.swapped)

    def table(self, sequence, group):
        return PageTable.of(self.manager, [sequence], group).block_tables[0]

    def write(self, sequence, start, stop, fresh=()):
        """Write positions through the page tables; into shared blocks only if they are new."""
        if self.with_steps:
            assert sequence not in self.unwritten
            self.unwritten[sequence] = (start, stop)
            return
        self.write_now(sequence, start, stop, fresh)

    def write_now(self, sequence, start, stop, fresh=()):
        contents, written = self.sequences[sequence], []
        for group in range(len(self.windows)):
            table = self.table(sequence, group)
            for position in range(start, stop):
                block, offset = table[position // self.size], position % self.size
                value = self.value(contents, position, group)
                if self.manager.ref_counts([block])[0] > 1:
                    # others of the same call, or of the same step, wait for just this
                    assert self.device[block, offset] in (GARBAGE, value) or block in fresh
                self.device[block, offset] = value
                written.append((block, offset))
        return written

    def launch(self):
        """Start a step: it writes what waits, and reads all that is there until it is done."""
        if not self.with_steps:
            return
        slots = []
        fresh = set(range(len(self.device)))
        for sequence, (start, stop) in self.unwritten.items():
            slots += self.write_now(sequence, start, stop, fresh)
        step = self.manager.start_step()
        self.written_by[step] = slots
        self.batches[step] = {self.sequences[sequence].group for sequence in self.unwritten}
        self.unwritten.clear()
        reads = {}
        for sequence in self.resident():
            contents = self.sequences[sequence]
            for group, window in enumerate(self.windows):
                table = self.table(sequence, group)
                first = self.first_kept(contents, window) * self.size
                for position in range(first, len(contents.tokens)):
                    slot = int(table[position // self.size]), position % self.size
                    reads[slot] = self.device[slot]
        self.running[step] = reads

    def settle(self, ids):
        """Launch first if one of these sequences still waits to be written."""
        if any(sequence in self.unwritten for sequence in ids):
            self.launch()

    def out_of_blocks(self, operation):
        before = picture(self.manager)
        with pytest.raises(OutOfBlocksError) as caught:
            operation()
        assert caught.value.needed > caught.value.free
        assert picture(self.manager) == before

    def copying_fails(self, operation):
        before = held(self.manager)
        with pytest.raises(CopyFailedError):
            operation(copy_fails)
        assert held(self.manager) == before
        self.manager.check_integrity()
        self.complete = False

    def kept_free(self):
        return int(self.manager.watermark * self.manager.num_blocks) if self.resident() else 0

    def draw_some(self, data, ids):
        return data.draw(st.lists(st.sampled_from(ids), min_size=1, unique=True))

    def members(self, ids):
        groups = {self.sequences[sequence].group for sequence in ids}
        return sorted(i for i, c in self.sequences.items() if c.group in groups)

    def is_behind(self, contents):
        return 0 <= contents.known < len(contents.tokens)

    def shared_tails(self, ids):
        """Copies on write, worked out a sequence at a time: all owners but the last copy."""
        writers = {}
        for sequence in ids:
            length = len(self.sequences[sequence].tokens)
            if length % self.size:
                last = int(self.table(sequence, 0)[length // self.size])
                writers[last] = writers.get(last, 0) + 1
        owners = {block: int(self.manager.ref_counts([block])[0]) for block in writers}
        return sum(count - (count == owners[block]) for block, count in writers.items())

    def note_cacheable(self, contents):
        for stop in range(self.size, contents.known + 1, self.size):
            self.cacheable.add(self.prefix(contents.key, contents.tokens, stop))

    def check_reads(self, steps):
        for step in steps:
            for slot, value in self.running.pop(step).items():
                assert self.device[slot] == value, "a block was reused while a step still read it"

    def reads_right(self, sequence):
        contents = self.sequences[sequence]
        length = len(contents.tokens)
        for group, window in enumerate(self.windows):
            table = self.table(sequence, group)
            first = 0 if window is None else max(0, contents.seen_from - window + 1)
            for position in range(first, length):
                found = self.device[table[position // self.size], position % self.size]
                if found != self.value(contents, position, group):
                    return False
        return True

    def is_waited_for(self, block, position, group):
        """Whether another sequence, shared with in the same step, has yet to write this."""
        return any(
            start <= position < stop and self.table(other, group)[position // self.size] == block
            for other, (start, stop) in self.unwritten.items()
        )

    def teardown(self):
        prefix_index._FEW = FEW
        if not hasattr(self, "manager"):
            return
        self.launch()
        self.check_reads(sorted(self.running))
        if self.with_steps:
            self.manager.finish_step(max(self.written_by))
        self.manager.free(sorted(self.sequences))
        if self.with_steps:
            self.manager.finish_step(self.manager.start_step())
        assert self.manager.num_free_blocks == self.manager.num_blocks
        assert self.manager.num_free_host_blocks == self.manager.num_host_blocks
        self.manager.reset_prefix_cache()
        assert self.manager.statistics().num_empty_blocks == self.manager.num_blocks
        self.manager.check_integrity()
