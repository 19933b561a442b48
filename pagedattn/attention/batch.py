"""What attention needs to know of a batch: tensors made from a page table and its slots."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from pagedattn.attention.batch_contents import check_contents
from pagedattn.attention.batch_memory import NUM_ARRIVALS, NUM_TICKETS, BatchMemory
from pagedattn.attention.cascade.sharing import SharedNow, Sharing
from pagedattn.attention.known_lengths import KnownLengths
from pagedattn.attention.step import Step
from pagedattn.page_table import PageTable

if TYPE_CHECKING:
    from collections.abc import Hashable

    from numpy.typing import ArrayLike

    from pagedattn.kv_cache import LayerCache

_FIELDS = ("block_tables", "kv_lengths", "query_starts", "slots")
_SHAPES = {
    "block_tables": "[num_sequences, max_blocks]",
    "kv_lengths": "[num_sequences]",
    "query_starts": "[num_sequences + 1]",
    "slots": "[num_query_tokens]",
}


@dataclass(frozen=True)
class AttentionBatch:
    """A batch of sequences, each with its query tokens at its end.

    Decode has one query token a sequence, prefill all of a sequence's tokens, a chunk or a
    verification something between; a batch may mix them. The query tokens of all sequences lie
    one after the other: sequence i has the rows `query_starts[i]` to `query_starts[i + 1]`.

    The tensors are read when a kernel runs, not when it is launched, so a captured CUDA graph
    follows what `advance` and `update` write into them.

    Attributes:
        block_tables: int32 [num_sequences, max_blocks]; entries past a sequence's end mean
            nothing.
        kv_lengths: int32 [num_sequences], tokens of each sequence, the query tokens included.
            0 marks a padding sequence: its query tokens get zeros.
        query_starts: int32 [num_sequences + 1], starting at 0, never falling.
        slots: int64 [num_query_tokens], where the query tokens' K and V go. A slot outside
            the cache is not written: the way to pad a batch.
        max_query_length: no sequence has more query tokens (a bound, known to the host).
        max_kv_length: no sequence has more tokens (a bound, known to the host).
        arrivals: int32 [NUM_ARRIVALS] of zeros on a GPU, or None. Kernels count here who has come
            to merge a sequence, or which piece of work is next, and leave zeros: so launches of
            one batch must run one after the other, as a step's layers do. Without, a kernel that
            needs counters makes them, which is one more launch.
        sharing: which blocks sequences share, so that they are read once where that pays, or None.
        memory: where the tensors lie if `of` made them, or None. Where there is one, or `sharing`,
            tensors may be changed by `advance` and `update` alone.
        is_full: whether all sequences have `max_kv_length` tokens, as far as the host knows. A
            kernel begins earlier if it is told; results do not depend on it. `advance` and `update`
            leave it as it was when the batch was made.
        likely_kv_length: tokens of the longest sequence as far as the host knows, where the bound
            is for others too; None is the bound. Kernels choose by it how to divide work; results
            do not depend on it.
        likely_shared: whether the host knows of a batch without `sharing` that reading shared
            blocks once would spare half of its K and V or more, which then come from the L2. It is
            used as `likely_kv_length` is, and `advance` and `update` leave it as it was.
        known_lengths: what the host knew of lengths when the batch was made, or None where queries
            are one a sequence and it `is_full`, or that is not known. It is used as
            `likely_kv_length` is, and `advance` and `update` leave it as it was.
        block_size: tokens of a block of the page table, which the cache must have too; None where
            that is not known.

    Raises:
        ValueError: a tensor's dtype, shape, layout or device is not as said here, which kernels do
            not look at: `block_tables` may have any stride from row to row, and else tensors are
            contiguous, but for `slots`; or a bound is negative. What the tensors hold is looked at
            by `check_integrity` alone.

    """

    block_tables: torch.Tensor
    kv_lengths: torch.Tensor
    query_starts: torch.Tensor
    slots: torch.Tensor
    max_query_length: int
    max_kv_length: int
    arrivals: torch.Tensor | None = None
    sharing: Sharing | None = None
    memory: BatchMemory | None = field(default=None, repr=False)
    is_full: bool = False
    likely_kv_length: int | None = None
    likely_shared: bool = False
    known_lengths: KnownLengths | None = None
    block_size: int | None = None

    def __post_init__(self) -> None:
        if self._own_memory is not None:
            return  # made by `of`
        tables, num_sequences = self.block_tables, self.kv_lengths.numel()
        device = tables.device
        for name, dtype, shape in (
            ("block_tables", torch.int32, (num_sequences, *tables.shape[-1:])),
            ("kv_lengths", torch.int32, (num_sequences,)),
            ("query_starts", torch.int32, (num_sequences + 1,)),
            ("slots", torch.int64, (self.slots.numel(),)),
        ):
            tensor: torch.Tensor = getattr(self, name)
            if tensor.dtype != dtype or tensor.shape != shape:
                raise ValueError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}; in a batch of "
                    f"{num_sequences} sequences it must be {dtype} {_SHAPES[name]}"
                )
            if tensor.device != device:
                raise ValueError(f"{name} is on {tensor.device}; the block tables are on {device}")
        if tables.stride(1) != 1 and tables.shape[1] > 1:
            raise ValueError("block_tables must be contiguous in its last dimension")
        for name in ("kv_lengths", "query_starts"):
            if not getattr(self, name).is_contiguous():
                raise ValueError(f"{name} must be contiguous")
        for name in ("max_query_length", "max_kv_length"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")

    @classmethod
    def of(
        cls,
        page_table: PageTable,
        query_lengths: ArrayLike = 1,
        device: torch.device | str = "cpu",
        max_kv_length: int | None = None,
        share: bool | None = None,
    ) -> AttentionBatch:
        """Make a batch from a page table that already counts the query tokens.

        Args:
            page_table: the sequences' block tables and lengths.
            query_lengths: query tokens of each sequence, one number for all or one a
                sequence, from 0 to the sequence's length.
            device: where the tensors go.
            max_kv_length: what a sequence may grow to through `advance` and `update`; the block
                tables get room for it. None is the longest sequence of now.
            share: read blocks that sequences share once: True always, so that a graph captured
                over this batch does it in every later step; False never; None where it pays, which
                on a CPU is nowhere.

        Raises:
            ValueError: a query length is no whole number, negative or above the sequence's length;
                a sequence is longer than `max_kv_length` or its block table; or there is not one of
                each for each sequence.

        """
        step = Step.of(page_table, query_lengths)
        if max_kv_length is None:
            max_kv_length = step.max_kv_length
        if max_kv_length < step.max_kv_length:
            raise ValueError(
                f"max_kv_length is {max_kv_length}; the longest sequence has {step.max_kv_length} "
                "tokens"
            )
        width = max(page_table.block_tables.shape[1], -(-max_kv_length // page_table.block_size))
        sizes = page_table.num_sequences, step.slots.size, width
        memory = BatchMemory(*sizes, torch.device(device), has_own=share is not False)
        memory.write(step)
        sharing = None
        if share is not False:
            sharing = Sharing(SharedNow(page_table, step.query_lengths), always=share is True)
        is_full = bool((page_table.num_tokens == max_kv_length).all())
        return cls(
            block_tables=memory.block_tables,
            kv_lengths=memory.kv_lengths,
            query_starts=memory.query_starts,
            slots=memory.slots,
            max_query_length=step.max_query_length,
            max_kv_length=max_kv_length,
            arrivals=memory.arrivals,
            sharing=sharing,
            memory=memory,
            is_full=is_full,
            known_lengths=(
                KnownLengths.of(step.query_lengths, page_table.num_tokens)
                if step.max_query_length > 1 or not is_full
                else None
            ),
            block_size=page_table.block_size,
        )

    @cached_property
    def num_sequences(self) -> int:
        """Sequences, padding included."""
        return self.kv_lengths.shape[0]

    @cached_property
    def num_query_tokens(self) -> int:
        """Query tokens of all sequences together."""
        return self.slots.shape[0]

    @cached_property
    def signature(self) -> Hashable:
        """Equal for batches with tables of one shape of which the host knew the same lengths."""
        tables = self.block_tables
        return (
            *(tables.shape, tables.stride(0), self.max_query_length, self.max_kv_length),
            *(self.is_full, self.expected_kv_length, self.known_lengths, self.has_tickets),
        )

    @property
    def expected_kv_length(self) -> int:
        """Tokens to divide work by: `likely_kv_length`, or the bound."""
        likely = self.likely_kv_length
        return self.max_kv_length if likely is None else likely

    @property
    def expects_shared(self) -> bool:
        """Whether reading shared blocks once would spare half of K and V, as far as is known."""
        return self.likely_shared or (self.sharing is not None and self.sharing.spares_half)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.block_tables.device

    def without_sharing(self) -> AttentionBatch:
        """Return the same batch, of the same tensors, that reads blocks for each sequence.

        What it is told by `advance` or `update` the batch that shares does not learn: that one's
        plans are of its own last step. What is shared is searched for, if no plan has done it.
        """
        return replace(self, sharing=None, likely_shared=self.expects_shared)

    def counters(self, count: int) -> torch.Tensor:
        """Return int32 zeros for a kernel that leaves zeros: `arrivals`, or new ones.

        Args:
            count: how many, at least; with `has_tickets` the last `NUM_TICKETS` are not among them.

        """
        arrivals = self.arrivals
        if arrivals is not None:
            others = NUM_TICKETS if self.has_tickets else 0
            if arrivals.numel() - others >= count:
                return arrivals
        return torch.zeros(count, dtype=torch.int32, device=self.device)

    def zeros(self, count: int) -> torch.Tensor:
        """Return float32 [count] zeros for a kernel that leaves zeros: the batch's, or new ones.

        The batch's are made when they are first asked for, of its `memory`; without `arrivals`,
        its launches need not run one after the other, and none are shared.
        """
        if self.memory is not None and self.arrivals is not None:
            return self.memory.zeros(count)
        return torch.zeros(count, dtype=torch.float32, device=self.device)

    @property
    def has_tickets(self) -> bool:
        """Whether `tickets` are the batch's own, which no kernel that takes `counters` uses."""
        return self.arrivals is not None and self.arrivals.numel() == NUM_ARRIVALS

    def tickets(self) -> torch.Tensor:
        """Return int32 [NUM_TICKETS] zeros for a kernel that leaves zeros: its own, or new ones."""
        if self.has_tickets and self.arrivals is not None:
            return self.arrivals[-NUM_TICKETS:]
        return torch.zeros(NUM_TICKETS, dtype=torch.int32, device=self.device)

    def advance(self, page_table: PageTable, query_lengths: ArrayLike = 1) -> None:
        """Go on to a step's page table in place, for the next graph replay.

        The same as `update` with a batch made of it, in less time: the host puts the step's numbers
        together, and one copy brings them. Of a block manager's page table, only entries that are
        new since the step before go to the device. Nothing waits for the GPU: the copy is in the
        current stream, behind what reads the numbers of the step before.

        Args:
            page_table: the sequences' block tables and lengths, which already count the query
                tokens: of as many sequences as this batch has, within its bounds.
            query_lengths: query tokens of each sequence, one number for all or one a sequence; as
                many in all as this batch has.

        Raises:
            ValueError: it does not fit; nothing was changed.

        """
        step = Step.of(page_table, query_lengths)
        self._require_blocks(page_table.block_size)
        self._require_bounds(step.max_query_length, step.max_kv_length)
        size = page_table.num_sequences
        self._require_shapes(((size,), (size + 1,), step.slots.shape))
        self._require_width(page_table.block_tables.shape[1])
        memory = self._own_memory
        if memory is None:  # only `update` can write to tensors that lie anywhere
            self.update(AttentionBatch.of(page_table, query_lengths, self.device))
            return
        if self.sharing is None:
            memory.write(step, goes_on=memory.goes_on_in(page_table))
        else:
            self.sharing.advance(step, self, memory)

    def update(self, other: AttentionBatch) -> None:
        """Copy another batch into this one's tensors in place, for the next graph replay.

        Args:
            other: a batch of the same number of sequences and query tokens, whose lengths keep
                within this batch's bounds; its block tables may be narrower. It may be on another
                device.

        Raises:
            TypeError: it is a page table, which is for `advance`.
            ValueError: it does not fit; nothing was changed.

        """
        if isinstance(other, PageTable):
            raise TypeError(
                "update takes an AttentionBatch and was given a PageTable: call "
                "advance(page_table), or make a batch of it first, with "
                "AttentionBatch.of(page_table)"
            )
        self._require_blocks(other.block_size)
        self._require_bounds(other.max_query_length, other.max_kv_length)
        self._require_shapes(other._shapes)
        width = other.block_tables.shape[1]
        self._require_width(width)
        memory, of_other = self._own_memory, other._own_memory
        if memory is not None and of_other is not None:
            memory.copy(of_other)
        else:
            self.block_tables[:, :width].copy_(other.block_tables)
            for name in _FIELDS[1:]:
                getattr(self, name).copy_(getattr(other, name))
            if self.memory is not None:  # some of its tensors may have been written
                self.memory.forget()
        if self.sharing is not None:
            self.sharing.follow(None if other.sharing is None else other.sharing.now, self)

    def check_integrity(self, cache: LayerCache, window: int | None = None) -> None:
        """Look at what the tensors hold; waits for the GPU, so that it is for tests and debugging.

        Args:
            cache: whose blocks the tables name.
            window: of the attention; entries of blocks that no query sees are not looked at.

        Raises:
            ValueError: something is not as the class says, in a sentence that names the first
                sequence of which that is so.

        """
        check_contents(self, cache, window)

    def place_of_own(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return own lengths and tables that `advance` fills for one plan; None if it cannot."""
        return None if self._own_memory is None else self._own_memory.take_own()

    @cached_property
    def _own_memory(self) -> BatchMemory | None:
        """`memory`, unless a tensor was replaced by one that lies elsewhere."""
        memory = self.memory
        if memory is not None and all(
            getattr(self, name) is getattr(memory, name) for name in _FIELDS
        ):
            return memory
        return None

    def _require_blocks(self, block_size: int | None) -> None:
        if None not in (block_size, self.block_size) and block_size != self.block_size:
            raise ValueError(
                f"the page table is of blocks of {block_size} tokens; this batch was made for "
                f"{self.block_size}"
            )

    def _require_bounds(self, max_query_length: int, max_kv_length: int) -> None:
        for name, given in (
            ("max_query_length", max_query_length),
            ("max_kv_length", max_kv_length),
        ):
            if given > getattr(self, name):
                raise ValueError(
                    f"{name} is {given}; this batch was made for at most {getattr(self, name)}"
                )

    @cached_property
    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(getattr(self, name).shape) for name in _FIELDS[1:])

    def _require_shapes(self, shapes: tuple[tuple[int, ...], ...]) -> None:
        if shapes == self._shapes:
            return
        for name, given, made in zip(_FIELDS[1:], shapes, self._shapes, strict=True):
            if given != made:
                raise ValueError(f"{name} has shape {given}; this batch was made with {made}")

    def _require_width(self, width: int) -> None:
        if width > self.block_tables.shape[1]:
            raise ValueError(
                f"the block tables are {width} blocks wide; this batch was made with "
                f"{self.block_tables.shape[1]}"
            )
