"""Any order of operations keeps every sequence's contents.

If after every step what the tables name is what the oracle's lists say, no block was lost, shared
wrongly, found wrongly, overwritten, or reused while it was still read.

An engine is played in one of two ways: without steps, where tokens are written at once, or with
steps in flight, where they are written when a step starts, and the step reads all that was there
until it is finished.
"""

import os
import tempfile

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from pagedattn import BlockManager, CacheKeys, OutOfBlocksError, PageTable, Snapshot

from .manager_oracle import GARBAGE, KEYS, MAX_SEQUENCES, Contents, ManagerOracle, picture


class BlockManagerMachine(ManagerOracle):
    @precondition(lambda self: len(self.sequences) < MAX_SEQUENCES)
    @rule(lengths=st.lists(st.integers(1, 14), max_size=4))
    def allocate(self, lengths):
        needed = len(self.windows) * sum(map(self.blocks, lengths))
        fits = needed + self.kept_free() <= self.manager.num_free_blocks
        assert self.manager.can_allocate(lengths) == fits
        if not fits:
            self.out_of_blocks(lambda: self.manager.allocate(lengths))
            return
        ids = self.manager.allocate(lengths).tolist()
        for sequence, length in zip(ids, lengths, strict=True):
            assert sequence not in self.sequences
            contents = Contents(CacheKeys(), [0] * length, 0, sequence, known=-1)
            contents.unique = self.next_unique = self.next_unique + 1
            self.sequences[sequence] = contents
            self.write(sequence, 0, length)

    @precondition(lambda self: len(self.sequences) < MAX_SEQUENCES)
    @rule(
        prompts=st.lists(
            st.tuples(st.sampled_from(KEYS), st.lists(st.integers(0, 1), min_size=1, max_size=14)),
            min_size=1,
            max_size=4,
        ),
        chunk=st.sampled_from([None, None, 1, 5]),
    )
    def admit(self, prompts, chunk):
        prompts = [
            (key, prompt) for key, prompt in prompts if all(p < len(prompt) for p, _ in key.media)
        ]
        keys, tokens = [key for key, _ in prompts], [prompt for _, prompt in prompts]
        before, evicted = picture(self.manager), self.manager.statistics().num_evicted_blocks
        counts = self.manager.ref_counts(np.arange(self.manager.num_blocks))
        try:
            admission = self.manager.admit(tokens, keys, max_new_tokens=chunk)
        except OutOfBlocksError:
            unchanged = picture(self.manager) == before
            assert unchanged
            most = len(self.windows) * sum(self.blocks(len(prompt)) for prompt in tokens)
            assert most + self.kept_free() > self.manager.num_free_blocks
            return
        ids, cached = admission.sequence_ids.tolist(), admission.num_cached_tokens.tolist()
        fresh = set(np.flatnonzero(counts == 0).tolist())
        for sequence, (key, prompt), hit in zip(ids, prompts, cached, strict=True):
            assert sequence not in self.sequences
            assert hit % self.size == 0
            assert 0 <= hit < len(prompt)
            taken = len(prompt) if chunk is None else min(len(prompt), hit + chunk)
            known = taken if self.caching else -1
            contents = Contents(key, prompt[:taken], hit, sequence, known=known)
            if not self.caching:
                contents.unique = self.next_unique = self.next_unique + 1
                assert hit == 0
            if self.complete and evicted == 0 and self.windows == (None,) and self.caching:
                limit = (len(prompt) - 1) // self.size * self.size
                ideal = 0
                while (
                    ideal < limit and self.prefix(key, prompt, ideal + self.size) in self.cacheable
                ):
                    ideal += self.size
                assert hit == ideal
            self.sequences[sequence] = contents
            if chunk is None:
                self.note_cacheable(contents)
        for sequence, hit in zip(ids, cached, strict=True):
            self.note_cacheable(self.sequences[sequence])
            self.write(sequence, hit, len(self.sequences[sequence].tokens), fresh)

    @rule(key=st.sampled_from(KEYS), prompt=st.lists(st.integers(0, 1), min_size=6, max_size=14))
    def give_up(self, key, prompt):
        """Admit, and end before anything was launched: nothing was written."""
        try:
            admission = self.manager.admit([prompt], key)
        except OutOfBlocksError:
            return
        self.manager.cancel_step()
        self.manager.free(admission.sequence_ids)
        self.complete = False

    @precondition(lambda self: self.resident())
    @rule(data=st.data(), failing=st.sampled_from([False, False, False, True]))
    def append(self, data, failing):
        ids = self.draw_some(data, self.resident())
        counts = [data.draw(st.integers(1, 7)) for _ in ids]
        self.grow(ids, counts, data.draw(st.booleans()), failing)

    @precondition(lambda self: self.resident())
    @rule(known=st.booleans(), failing=st.sampled_from([False, False, False, True]))
    def decode(self, known, failing):
        ids = self.resident()
        self.grow(ids, [1] * len(ids), known, failing)

    @precondition(lambda self: self.resident())
    @rule(data=st.data())
    def decode_some(self, data):
        ids = self.draw_some(data, self.resident())
        self.grow(ids, [1] * len(ids), known=True, failing=False)

    def grow(self, ids, counts, known, failing):
        self.settle(ids)
        given = 1 if counts == [1] * len(ids) else counts
        contents = [self.sequences[sequence] for sequence in ids]
        known = known and all(c.known == len(c.tokens) for c in contents)
        tokens = [
            [(len(c.tokens) + i) % 2 for i in range(n)]
            for c, n in zip(contents, counts, strict=True)
        ]
        flat = [token for part in tokens for token in part] if known else None
        copied = self.shared_tails(ids)
        if not self.manager.can_append(ids, given):
            self.out_of_blocks(lambda: self.manager.append(ids, given, token_ids=flat))
            return
        if failing and copied:
            self.copying_fails(
                lambda copy: self.manager.append(ids, given, token_ids=flat, copy=copy)
            )
            return
        copies = self.manager.append(ids, given, token_ids=flat)
        assert len(copies) == copied * len(self.windows)
        assert not set(copies.sources.tolist()) & set(copies.destinations.tolist())
        self.device[copies.destinations] = self.device[copies.sources]
        for sequence, new in zip(ids, tokens, strict=True):
            grown = self.sequences[sequence]
            grown.seen_from = len(grown.tokens)
            grown.tokens += new
            if known:
                grown.known = len(grown.tokens)
                self.note_cacheable(grown)
            self.write(sequence, grown.seen_from, len(grown.tokens))

    @precondition(lambda self: any(0 <= c.known < len(c.tokens) for c in self.sequences.values()))
    @rule(data=st.data())
    def record(self, data):
        behind = [i for i in self.resident() if self.is_behind(self.sequences[i])]
        if not behind:
            return
        ids = self.draw_some(data, behind)
        self.settle(ids)
        parts = [self.sequences[i].tokens[self.sequences[i].known :] for i in ids]
        counts = [data.draw(st.integers(1, len(part))) for part in parts]
        flat = [token for part, n in zip(parts, counts, strict=True) for token in part[:n]]
        self.manager.record(ids, flat, counts)
        for sequence, count in zip(ids, counts, strict=True):
            self.sequences[sequence].known += count
        self.complete = False  # a block that two forks hold is registered once

    @precondition(lambda self: self.resident() and len(self.sequences) < MAX_SEQUENCES)
    @rule(data=st.data(), count=st.integers(1, 2))
    def fork(self, data, count):
        parents = data.draw(st.lists(st.sampled_from(self.resident()), min_size=1, max_size=3))
        self.settle(parents)
        free = self.manager.num_free_blocks
        children = self.manager.fork(parents, count).tolist()
        for child, parent in zip(children, np.repeat(parents, count).tolist(), strict=True):
            assert child not in self.sequences
            self.sequences[child] = self.sequences[parent].fork()
        assert self.manager.num_free_blocks == free

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def free(self, data):
        ids = self.draw_some(data, sorted(self.sequences))
        self.settle(ids)
        self.manager.free(ids)
        for sequence in ids:
            del self.sequences[sequence]

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def drop(self, data):
        ids = self.draw_some(data, sorted(self.sequences))
        members = self.members(ids)
        self.settle(members)
        assert sorted(self.manager.drop(ids).tolist()) == members
        for sequence in members:
            del self.sequences[sequence]

    @precondition(lambda self: self.resident())
    @rule(data=st.data(), failing=st.sampled_from([False, False, True]))
    def swap_out(self, data, failing):
        ids = self.draw_some(data, self.resident())
        members = self.members(ids)
        self.settle(members)
        assert sorted(self.manager.sequence_group(ids).tolist()) == members
        if not self.manager.can_swap_out(ids):
            self.out_of_blocks(lambda: self.manager.swap_out(ids))
            return
        if failing:
            self.copying_fails(lambda copy: self.manager.swap_out(ids, copy=copy))
            return
        copies = self.manager.swap_out(ids)
        assert len(set(copies.sources.tolist())) == len(copies)
        assert len(set(copies.destinations.tolist())) == len(copies)
        self.host[copies.destinations] = self.device[copies.sources]
        for sequence in members:
            self.sequences[sequence].swapped = True
        assert self.manager.is_swapped_out(members).all()

    @precondition(lambda self: any(c.swapped for c in self.sequences.values()))
    @rule(data=st.data(), failing=st.sampled_from([False, False, True]))
    def swap_in(self, data, failing):
        ids = self.draw_some(data, sorted(i for i, c in self.sequences.items() if c.swapped))
        members = self.members(ids)
        if not self.manager.can_swap_in(ids):
            self.out_of_blocks(lambda: self.manager.swap_in(ids))
            return
        if failing:
            try:
                self.copying_fails(lambda copy: self.manager.swap_in(ids, copy=copy))
            except pytest.fail.Exception:  # all of it was still cached: nothing to copy
                for sequence in members:
                    self.sequences[sequence].swapped = False
            return
        copies = self.manager.swap_in(ids)
        self.device[copies.destinations] = self.host[copies.sources]
        for sequence in members:
            self.sequences[sequence].swapped = False

    @precondition(lambda self: self.with_steps)
    @rule()
    def start_step(self):
        self.launch()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish_step(self, data):
        step = data.draw(st.sampled_from(sorted(self.running)))
        self.check_reads([s for s in sorted(self.running) if s <= step])
        self.manager.finish_step(step)
        if not self.running:
            assert self.manager.num_deferred_blocks == 0

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def fail_step(self, data):
        step = data.draw(st.sampled_from(sorted(self.running)))
        groups = {self.sequences[sequence].group for sequence in self.unwritten}
        for later in [s for s in sorted(self.running) if s >= step]:
            del self.running[later]
            groups |= self.batches[later]
        for later, slots in self.written_by.items():
            if later >= step:
                for block, offset in slots:
                    self.device[block, offset] = GARBAGE
        wrong = {sequence for sequence in self.resident() if not self.reads_right(sequence)}
        self.unwritten.clear()
        tainted = set(self.manager.fail_step(step).tolist())
        assert {i for i, contents in self.sequences.items() if contents.swapped} <= tainted
        # the engine knows who was in these steps, the manager who shares with them
        in_steps = {i for i, contents in self.sequences.items() if contents.group in groups}
        lost = set(self.members(tainted | in_steps))
        assert wrong <= lost
        self.complete = False
        if lost:
            for sequence in self.manager.drop(sorted(lost)).tolist():
                del self.sequences[sequence]

    @rule(which=st.integers(0, 9))
    def rarely(self, which):
        """A snapshot goes through a file and its manager takes over; or the cache is reset."""
        if which == 0 and not self.unwritten:
            self.manager.reset_prefix_cache()
            assert self.manager.num_cached_blocks == 0
            self.cacheable.clear()
            self.complete = False
        if which < 8:
            return
        snapshot = self.manager.snapshot()
        assert f"{self.manager.num_blocks} blocks of {self.size} tokens" in str(snapshot)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "state.npz")
            snapshot.save(path)
            loaded = BlockManager.restore(Snapshot.load(path))
        for name, array in snapshot.arrays.items():
            assert np.array_equal(loaded.snapshot().arrays[name], array), name
        assert loaded.snapshot().settings == snapshot.settings
        self.manager = loaded

    @invariant()
    def everything_adds_up(self):
        if not hasattr(self, "manager"):
            return
        manager = self.manager
        manager.check_integrity()
        assert sorted(manager.sequence_ids().tolist()) == sorted(self.sequences)
        references = np.zeros(manager.num_blocks, dtype=int)
        resident = self.resident()
        for group, window in enumerate(self.windows):
            page_table = PageTable.of(manager, resident, group)
            tables = page_table.block_tables
            self.lineage_keeps_its_promise(page_table)
            assert ((tables >= 0) & (tables < manager.num_blocks)).all()
            for row, sequence in enumerate(resident):
                contents = self.sequences[sequence]
                length = len(contents.tokens)
                first = self.first_kept(contents, window)
                blocks = tables[row, first : self.blocks(length)]
                references[blocks] += 1
                assert not tables[row, :first].any()
                if sequence in self.unwritten:
                    length = self.unwritten[sequence][0]
                seen = 0 if window is None else max(0, contents.seen_from - window + 1)
                values = self.device[blocks].reshape(-1)[seen - first * self.size :]
                for position, value in zip(range(seen, length), values.tolist(), strict=False):
                    right = value == self.value(contents, position, group)
                    block = blocks[position // self.size - first]
                    assert right or self.is_waited_for(block, position, group)
        assert (manager.ref_counts(np.arange(manager.num_blocks)) == references).all()
        used = int((references > 0).sum())
        stats = manager.statistics()
        assert stats.num_used_blocks == used
        assert used + manager.num_free_blocks + manager.num_deferred_blocks == manager.num_blocks
        assert stats.num_empty_blocks + stats.num_cached_blocks == manager.num_free_blocks
        empty = stats.num_internal_slots + stats.num_reserved_slots
        assert empty + stats.num_token_slots == used * self.size
        assert empty <= (self.size - 1) * len(resident) * len(self.windows)

    def lineage_keeps_its_promise(self, page_table):
        """Tables with one number of one source begin alike, whenever they were taken."""
        lineage = page_table.lineage
        if lineage is None:
            assert self.windows != (None,)
            return
        for number, table, length in zip(
            lineage.numbers.tolist(), page_table.block_tables, page_table.num_blocks(), strict=True
        ):
            now = table[:length].tolist()
            before = self.tables_of.setdefault((lineage.source, number), now)
            assert all(old == new for old, new in zip(before, now, strict=False))
            self.tables_of[lineage.source, number] = max(before, now, key=len)


TestBlockManagerKeepsEveryContent = BlockManagerMachine.TestCase
TestBlockManagerKeepsEveryContent.settings = settings(max_examples=2 * settings().max_examples)
