"""Any order of operations keeps every sequence's contents.

The oracle stores each sequence's tokens as a list. Beside it stands a memory, an array of one
token id a slot, which is written through the page table as the KV cache would be: if what is
gathered from the memory equals the lists after every step, no block was lost, shared wrongly, or
overwritten.
"""

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pagedattn import BlockManager, OutOfBlocksError, PageTable

NOTHING = -1


class BlockManagerMachine(RuleBasedStateMachine):
    @initialize(num_blocks=st.integers(1, 24), block_size=st.integers(1, 5))
    def start(self, num_blocks, block_size):
        self.manager = BlockManager(num_blocks, block_size)
        self.memory = np.full((num_blocks, block_size), NOTHING)
        self.contents = {}
        self.next_token = 0

    def new_tokens(self, count):
        self.next_token += count
        return list(range(self.next_token - count, self.next_token))

    def blocks_needed(self, length):
        return -(-length // self.manager.block_size)

    def write(self, ids, counts):
        """Write the last tokens of sequences through the page table; never a shared slot."""
        table = PageTable.of(self.manager, ids)
        slots = table.slots(counts)
        assert np.unique(slots).size == slots.size
        blocks, offsets = np.divmod(slots, self.manager.block_size)
        assert (self.manager.ref_counts(blocks) == 1).all()
        tokens = [t for i, n in zip(ids, counts, strict=True) for t in self.contents[i][-n:]]
        self.memory[blocks, offsets] = tokens

    def expect_unchanged(self, operation, needed):
        free, ids = self.manager.num_free_blocks, self.manager.sequence_ids().tolist()
        before = PageTable.of(self.manager, ids)
        with pytest.raises(OutOfBlocksError) as caught:
            operation()
        assert (caught.value.needed, caught.value.free) == (needed, free)
        after = PageTable.of(self.manager, ids)
        assert self.manager.num_free_blocks == free
        assert self.manager.sequence_ids().tolist() == ids
        assert (before.block_tables == after.block_tables).all()
        assert (before.num_tokens == after.num_tokens).all()

    @rule(lengths=st.lists(st.integers(1, 14), max_size=4))
    def allocate(self, lengths):
        needed = sum(map(self.blocks_needed, lengths))
        fits = needed <= self.manager.num_free_blocks
        assert self.manager.can_allocate(lengths) == fits
        if not fits:
            self.expect_unchanged(lambda: self.manager.allocate(lengths), needed)
            return
        ids = self.manager.allocate(lengths).tolist()
        for sequence, length in zip(ids, lengths, strict=True):
            assert sequence not in self.contents
            self.contents[sequence] = self.new_tokens(length)
        self.write(ids, lengths)

    def needed_to_append(self, ids, counts):
        """Blocks to copy and blocks to open, worked out a sequence at a time."""
        needed = 0
        writers = {}
        for sequence, count in zip(ids, counts, strict=True):
            length = len(self.contents[sequence])
            needed += self.blocks_needed(length + count) - self.blocks_needed(length)
            if length % self.manager.block_size:
                last = int(self.manager.block_tables([sequence])[0][0, -1])
                writers[last] = writers.get(last, 0) + 1
        for block, count in writers.items():
            owners = int(self.manager.ref_counts([block])[0])
            needed += count - 1 if count == owners else count
        return needed

    @precondition(lambda self: self.contents)
    @rule(data=st.data())
    def append(self, data):
        ids = data.draw(st.lists(st.sampled_from(sorted(self.contents)), min_size=1, unique=True))
        counts = [data.draw(st.integers(1, 7)) for _ in ids]
        if data.draw(st.booleans()):
            counts = [1] * len(ids)
        needed = self.needed_to_append(ids, counts)
        if needed > self.manager.num_free_blocks:
            self.expect_unchanged(lambda: self.manager.append(ids, counts), needed)
            return
        free = self.manager.num_free_blocks
        copies = self.manager.append(ids, 1 if counts == [1] * len(ids) else counts)
        assert self.manager.num_free_blocks == free - needed
        assert not set(copies.sources.tolist()) & set(copies.destinations.tolist())
        self.memory[copies.destinations] = self.memory[copies.sources]
        for sequence, count in zip(ids, counts, strict=True):
            self.contents[sequence] = self.contents[sequence] + self.new_tokens(count)
        self.write(ids, counts)

    @precondition(lambda self: self.contents)
    @rule(data=st.data(), count=st.integers(1, 3))
    def fork(self, data, count):
        parent = data.draw(st.sampled_from(sorted(self.contents)))
        free = self.manager.num_free_blocks
        for child in self.manager.fork(parent, count).tolist():
            assert child not in self.contents
            self.contents[child] = self.contents[parent]
        assert self.manager.num_free_blocks == free

    @precondition(lambda self: self.contents)
    @rule(data=st.data())
    def free(self, data):
        ids = data.draw(st.lists(st.sampled_from(sorted(self.contents)), min_size=1, unique=True))
        self.manager.free(ids)
        for sequence in ids:
            del self.contents[sequence]

    @invariant()
    def everything_adds_up(self):
        if not hasattr(self, "manager"):
            return
        manager = self.manager
        manager.check_integrity()
        ids = sorted(self.contents)
        assert sorted(manager.sequence_ids().tolist()) == ids
        table = PageTable.of(manager, ids)
        references = np.zeros(manager.num_blocks, dtype=int)
        for row, sequence in enumerate(ids):
            tokens = self.contents[sequence]
            blocks = table.block_tables[row, : self.blocks_needed(len(tokens))]
            references[blocks] += 1
            held = self.memory[blocks].reshape(-1)[: len(tokens)]
            assert held.tolist() == tokens
            assert 0 <= blocks.size * manager.block_size - len(tokens) < manager.block_size
        assert (manager.ref_counts(np.arange(manager.num_blocks)) == references).all()
        assert manager.num_free_blocks == (references == 0).sum()

    def teardown(self):
        if hasattr(self, "manager"):
            self.manager.free(sorted(self.contents))
            assert self.manager.num_free_blocks == self.manager.num_blocks
            self.manager.check_integrity()


TestBlockManagerKeepsEveryContent = BlockManagerMachine.TestCase
