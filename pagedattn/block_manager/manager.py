"""The block manager: sequences are admitted, grow, fork, move to the host and end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pagedattn.block_manager import growth
from pagedattn.block_manager.admission import FullBlocks, look_up, open_rows, share, share_one
from pagedattn.block_manager.preemption import Preemption
from pagedattn.block_manager.prefix_hash import MAX_TOKEN_ID, CacheKeys, Prompts, token_ids_of
from pagedattn.block_manager.ragged import ragged, token_counts, whole_number, whole_sum
from pagedattn.block_manager.snapshot import FORMAT, Snapshot, SnapshotError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    from pagedattn.block_manager.copies import BlockCopies, CopyBlocks


@dataclass(frozen=True)
class Admission:
    """Sequences that `BlockManager.admit` made.

    Attributes:
        sequence_ids: int64 [num_prompts].
        num_cached_tokens: int64 [num_prompts], tokens at each prompt's beginning whose K and V
            are in the cache; a multiple of the block size and less than the prompt's length.

    """

    sequence_ids: NDArray[np.int64]
    num_cached_tokens: NDArray[np.int64]


# what a manager's parts raise for numbers that do not go together
_CONTRADICTIONS = (
    AttributeError, IndexError, ValueError, TypeError, AssertionError, OverflowError,
)  # fmt: skip


class BlockManager(Preemption):
    """Maps the tokens of many sequences to blocks of one pool (SOSP '23, §4.2 to §4.5).

    A sequence of n tokens holds `ceil(n / block_size)` blocks, so its waste is less than one
    block. Blocks are shared by forks, and by prompts that begin alike; a shared block is copied
    when one of its owners is about to write into it. Every operation takes a batch, and one that
    raises has changed nothing.

    The engine's part: the tokens given to `admit`, `allocate` and `append` are written by the
    step that follows, in every layer before that step's attention reads them. An engine that
    frees blocks while steps still run says so with `start_step` and `finish_step`.

    Args:
        num_blocks: blocks in the pool.
        block_size: tokens a block.
        num_host_blocks: blocks of host memory to swap to.
        prefix_caching: whether `admit` finds and keeps full blocks by their contents.
        seed: makes the prefix hashes the same in every process; by default they are unpredictable.
        windows: a layer group for each entry, with its sliding window in tokens, or None for
            full attention. Each group has its own block tables.
        watermark: share of the pool that `allocate`, `admit` and `swap_in` leave free while
            sequences run, so that these can grow; 0 to 1.

    Example:
        >>> manager = BlockManager(num_blocks=8, block_size=4)
        >>> (sequence,) = manager.allocate([7])
        >>> manager.num_free_blocks
        6
        >>> copies = manager.append([sequence])  # the eighth token fits the second block
        >>> manager.num_free_blocks, len(copies)
        (6, 0)
        >>> first = manager.admit([[1, 2, 3, 4, 5]])
        >>> manager.admit([[1, 2, 3, 4, 6]]).num_cached_tokens  # they begin with the same block
        array([4])

    """

    @classmethod
    def restore(cls, snapshot: Snapshot) -> BlockManager:
        """Make a manager in the state of a snapshot.

        Steps that were in flight wait for `finish_step`.

        Raises:
            SnapshotError: the snapshot contradicts itself, or is of more than memory holds.

        """
        if not isinstance(snapshot, Snapshot):
            raise SnapshotError(f"{snapshot!r} is not a Snapshot; Snapshot.load reads a file")
        settings = snapshot.settings
        try:
            if settings["format"] != FORMAT:
                raise ValueError(f"it has format {settings['format']}; this version reads {FORMAT}")
            seed = bytes.fromhex(settings["seed"]) if settings["prefix_caching"] else None
            manager = cls(
                settings["num_blocks"],
                settings["block_size"],
                num_host_blocks=settings["num_host_blocks"],
                prefix_caching=settings["prefix_caching"],
                seed=seed,
                windows=settings["windows"],
                watermark=settings["watermark"],
            )
            manager._become(settings, snapshot.arrays)
            manager.check_integrity()
        except KeyError as error:
            raise SnapshotError(f"the snapshot contradicts itself: it has no {error}") from error
        except MemoryError as error:
            raise SnapshotError(f"the snapshot does not fit into memory: {error}") from error
        except _CONTRADICTIONS as error:
            raise SnapshotError(f"the snapshot contradicts itself: {error}") from error
        return manager

    # -- sequences begin -------------------------------------------------------------------

    def allocate(self, num_tokens: ArrayLike) -> NDArray[np.int64]:
        """Make a sequence for each prompt length, all or none; no contents are looked up or kept.

        Args:
            num_tokens: a length or a flat list of them, each at least 1.

        Returns:
            int64 [num_sequences], the new sequences' ids. An id is never used again.

        Raises:
            OutOfBlocksError: the pool has too few free blocks.
            ValueError: a length is not a whole number of at least 1.

        """
        lengths = token_counts(num_tokens)
        none = np.zeros_like(lengths)
        ends = self._tables.blocks_for(lengths)
        self._poll()
        total = self._groups.count * whole_sum(ends)
        self._pool.require(total + self._num_kept_free)
        self._tables.reserve(lengths.size)
        first = [none] * self._groups.count
        rows = open_rows(self._tables, self._pool, lengths, none, first, ends)
        return self._tables.rows.ids(rows)

    def admit(
        self,
        prompts: Sequence[ArrayLike],
        keys: CacheKeys | Sequence[CacheKeys | None] | None = None,
        *,
        max_new_tokens: int | None = None,
    ) -> Admission:
        """Make a sequence for each prompt, all or none; full blocks that are there are shared.

        A prompt shares the longest beginning of full blocks that the cache holds or that an
        earlier prompt of the same call brings, but never its last token, whose output is needed.

        Args:
            prompts: token ids of each, int [num_prompt_tokens], from 0 to 2**31 - 1.
            keys: what else the contents depend on, for all prompts or one for each.
            max_new_tokens: take in no more than so many tokens of each prompt after the cached
                ones, a chunk; the rest is given to `append`. Prompts of such a call share with
                what was there before it, and not with each other.

        Raises:
            OutOfBlocksError: the pool has too few free blocks.
            ValueError: a prompt is empty or holds something else than token ids; keys do not fit.

        """
        if max_new_tokens is not None:
            whole_number(max_new_tokens, "max_new_tokens", 1)
            max_new_tokens = int(min(max_new_tokens, MAX_TOKEN_ID))
        batch = Prompts.of(prompts, keys)
        self._poll()
        if self._cache is None:
            taken = np.minimum(batch.lengths, max_new_tokens or batch.lengths)
            return Admission(self.allocate(taken), np.zeros_like(taken))
        hasher, size = self._cache.hasher, self.block_size
        starts = np.cumsum(batch.lengths) - batch.lengths
        roots = [hasher.root if key is None else hasher.root_of(key) for key in batch.keys]
        media = {i: hasher.media_of(key) for i, key in enumerate(batch.keys) if key and key.media}
        num_full = batch.lengths // size
        digests = hasher.chain(batch.tokens, starts, num_full, roots, media)
        shared = self._tables, self._pool, self._cache, self._num_kept_free
        if len(roots) == 1 and self._groups.windows == (None,):
            length = int(batch.lengths[0])
            one = share_one(digests, length, max_new_tokens, *shared, self._steps.note_written)
            rows, num_hit, taken = (np.array([value]) for value in one)
        else:
            owners, columns = ragged(np.zeros_like(num_full), num_full)
            full = FullBlocks.of(owners, columns, digests, may_share=max_new_tokens is None)
            cached = look_up(full, (batch.lengths - 1) // size, self._cache.index, self._groups)
            num_hit, taken = cached.num_hit, batch.lengths
            if max_new_tokens is not None:
                taken = np.minimum(taken, num_hit * size + max_new_tokens)
            rows = share(full, cached, taken, *shared, self._steps.note_written)
        state = self._tables.rows
        state.num_known[rows] = taken
        last = taken // size
        for number, added in media.items():
            waiting = {column: new for column, new in added.items() if column >= last[number]}
            if waiting:
                state.media[int(rows[number])] = waiting
        chains = np.frombuffer(b"".join(roots), np.uint64).reshape(-1, 4).copy()
        some = np.flatnonzero(last)
        chains[some] = digests[(np.cumsum(num_full) - num_full + last - 1)[some]]
        state.chain[rows] = chains
        places, positions = ragged(last * size, taken)
        state.tails[rows[places], positions % size] = batch.tokens[starts[places] + positions]
        num_cached = num_hit * size
        self._cache.num_lookup_tokens += batch.tokens.size
        self._cache.num_hit_tokens += int(num_cached.sum())
        return Admission(state.ids(rows), num_cached)

    # -- sequences grow, fork and end ------------------------------------------------------

    def append(
        self,
        sequence_ids: ArrayLike,
        num_new_tokens: ArrayLike = 1,
        *,
        token_ids: ArrayLike | None = None,
        copy: CopyBlocks | None = None,
    ) -> BlockCopies:
        """Make room for the next tokens of each sequence: the step of a decode batch.

        Args:
            sequence_ids: distinct live sequences that are not swapped out.
            num_new_tokens: tokens to add, one number for all or one a sequence, at least 1.
            token_ids: the new tokens, sequence after sequence, int [num_new_tokens in all]:
                blocks that they fill can be found by later prompts. Only for sequences that
                `admit` made and whose earlier tokens are all known. Tokens that are not known yet
                may be given to `record` later.
            copy: carries out the copies, for one `KVCache.copy_blocks`; if it raises, nothing
                has changed, but cached blocks that were to be written are evicted.

        Returns:
            The copies to carry out, unless `copy` did, before the new tokens' K and V are
            written: one for each sequence (and layer group) that was about to write into a block
            it shares, but for the last of a block's owners, who keeps it.

        Raises:
            OutOfBlocksError: the pool has too few free blocks.
            UnknownSequenceError: a sequence is not live.
            SwappedOutError: a sequence is in host memory.
            ValueError: a sequence is given twice, a count is not at least 1, or the token ids
                are not those that follow.

        """
        rows = self._tables.rows.resident_rows_of(sequence_ids)
        counts = self._counts(num_new_tokens, rows)
        tokens = None
        if token_ids is not None and self._cache is not None:
            tokens = self._following(rows, counts, token_ids, self._tables.rows.num_tokens[rows])
        self._poll()
        planned = growth.plan(self._tables, self._pool, rows, counts)
        self._pool.require(planned.num_needed, planned.num_free)
        self._pool.require(self._groups.count * planned.writers.size)
        copies = growth.carry_out(planned, self._tables, self._pool, copy)
        self.num_copied_blocks += len(copies)
        if tokens is not None and self._cache is not None:
            self._cache.record(
                self._tables, self._pool, rows, tokens, counts, self._steps.note_written
            )
        return copies

    def record(
        self, sequence_ids: ArrayLike, token_ids: ArrayLike, num_tokens: ArrayLike = 1
    ) -> None:
        """Say which tokens were appended without `token_ids`; blocks they fill can be found.

        Args:
            sequence_ids: distinct live sequences, made by `admit`, not swapped out.
            token_ids: int [num_tokens in all], sequence after sequence, following those that
                are known.
            num_tokens: how many for each, one number for all or one a sequence, at least 1.

        Raises:
            ValueError: the token ids do not fit, or more would be known than were appended.

        """
        rows = self._tables.rows.resident_rows_of(sequence_ids)
        counts = self._counts(num_tokens, rows)
        if self._cache is None:
            return
        known = self._tables.rows.num_known[rows]
        tokens = self._following(rows, counts, token_ids, known)
        behind = known + counts > self._tables.rows.num_tokens[rows]
        if behind.any():
            row = rows[np.argmax(behind)]
            raise ValueError(
                f"sequence {int(self._tables.rows.ids(row))} has "
                f"{int(self._tables.rows.num_tokens[row])} tokens; append first, then record"
            )
        self._cache.record(self._tables, self._pool, rows, tokens, counts, self._steps.note_written)

    def fork(self, sequence_ids: ArrayLike, num_forks: int = 1) -> NDArray[np.int64]:
        """Make sequences that share all blocks of others (SOSP '23, §4.4).

        Args:
            sequence_ids: a live sequence or several, which may repeat: as a step of beam search
                keeps some beams twice and others not at all.
            num_forks: forks of each, at least 1.

        Returns:
            int64 [num_sequences * num_forks], each parent's forks together. They belong to their
            parent's group. No block is copied until one diverges.

        Raises:
            UnknownSequenceError: a sequence is not live.
            SwappedOutError: a sequence is in host memory.
            ValueError: `num_forks` is less than 1, or more than a manager holds.

        """
        num_forks = whole_number(num_forks, "num_forks", 1)
        state, lists = self._tables.rows, self._tables.lists
        parents = state.parents_of(sequence_ids)
        self._tables.reserve(parents.size * num_forks)
        parents = np.repeat(parents, num_forks)
        rows = state.add(parents.size)
        old, new = self._tables.all_lists_of(parents), self._tables.all_lists_of(rows)
        ends = self._tables.per_list(self._tables.blocks_for(state.num_tokens[parents]))
        first = lists.first[old]
        lists.open(new, first, ends)
        blocks = lists.entries[lists.addresses(old, first, ends)]
        lists.entries[lists.addresses(new, first, ends)] = blocks
        self._pool.retain_found(blocks)
        for name in ("num_tokens", "num_known", "group", "chain", "tails"):
            values = getattr(state, name)
            values[rows] = values[parents]
        for row, parent in zip(rows.tolist(), parents.tolist(), strict=True) if state.media else ():
            if parent in state.media:
                state.media[row] = dict(state.media[parent])
        state.forked[rows] = state.forked[parents] = True
        state.any_forked = True
        return state.ids(rows)

    def free(self, sequence_ids: ArrayLike) -> None:
        """End sequences; a block goes back to the pool with its last owner.

        Full blocks whose tokens are known stay findable until they are evicted, those least
        recently freed first and of a sequence its tail first. If the step that was to write them
        will not be launched, call `cancel_step` first.

        Raises:
            UnknownSequenceError: a sequence is not live, for one because it was freed before.
            ValueError: a sequence is given twice.

        """
        rows = self._tables.rows.rows_of(sequence_ids)
        self._poll()
        self._end(rows)

    # -- helpers ---------------------------------------------------------------------------

    def _following(
        self,
        rows: NDArray[np.int64],
        counts: NDArray[np.int64] | np.int64,
        token_ids: ArrayLike,
        positions: NDArray[np.int64],
    ) -> NDArray[np.int32]:
        """Check token ids that are to follow the known ones at `positions`."""
        tokens = token_ids_of(token_ids)
        total = int(counts.sum()) if counts.ndim else int(counts) * rows.size
        if tokens.size != total:
            raise ValueError(f"{tokens.size} token ids were given for {total} new tokens")
        known = self._tables.rows.num_known[rows]
        if (known < 0).any():
            sequence = int(self._tables.rows.ids(rows[np.argmax(known < 0)]))
            raise ValueError(
                f"the tokens of sequence {sequence} are unknown: it was made by allocate, or "
                "the prefix cache was off; use admit"
            )
        if (known != positions).any():
            at = int(np.argmax(known != positions))
            sequence = int(self._tables.rows.ids(rows[at]))
            raise ValueError(
                f"tokens {int(known[at])} to {int(positions[at]) - 1} of sequence {sequence} are "
                "not known yet: record them first"
            )
        return tokens
