"""What attention needs to know of a batch: tensors made from a page table and its slots."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from pagedattn.attention.cascade.plan import Sharing
from pagedattn.page_table import PageTable

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

NUM_ARRIVALS = 8192
"""Counters of a batch: 16 a program of the decode kernel, two programs a multiprocessor."""


@dataclass(frozen=True)
class AttentionBatch:
    """A batch of sequences, each with its query tokens at its end.

    Decode has one query token a sequence, prefill all of a sequence's tokens, a chunk or a
    verification something between; a batch may mix them. The query tokens of all sequences lie
    one after the other: sequence i has the rows `query_starts[i]` to `query_starts[i + 1]`.

    The tensors are read when a kernel runs, not when it is launched, so a captured CUDA graph
    follows what `update` writes into them.

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
        is_full: whether all sequences have `max_kv_length` tokens, as far as the host knows. A
            kernel begins earlier if it is told; results do not depend on it.
        arrivals: int32 [NUM_ARRIVALS] of zeros on a GPU, or None. Kernels count here who has come
            to merge a sequence, or which piece of work is next, and leave zeros: so launches of
            one batch must run one after the other, as a step's layers do. Without, a kernel that
            needs counters makes them, which is one more launch.
        sharing: which blocks sequences share, so that they are read once where that pays, or None.
            Where there is one, tensors may be changed by `update` alone.

    """

    block_tables: torch.Tensor
    kv_lengths: torch.Tensor
    query_starts: torch.Tensor
    slots: torch.Tensor
    max_query_length: int
    max_kv_length: int
    is_full: bool = False
    arrivals: torch.Tensor | None = None
    sharing: Sharing | None = None

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
            max_kv_length: what a sequence may grow to through `update`; the block tables get room
                for it. None is the longest sequence of now.
            share: read blocks that sequences share once: True always, so that a graph captured
                over this batch does it after every `update`; False never; None where it pays, which
                on a CPU is nowhere.

        Raises:
            ValueError: a query length is negative or above the sequence's length, or a sequence
                is longer than `max_kv_length`.

        """
        longest = int(page_table.num_tokens.max(initial=0))
        if max_kv_length is None:
            max_kv_length = longest
        if max_kv_length < longest:
            raise ValueError(
                f"max_kv_length is {max_kv_length}; the longest sequence has {longest} tokens"
            )
        tables = page_table.block_tables
        missing = -(-max_kv_length // page_table.block_size) - tables.shape[1]
        if missing > 0:
            tables = np.pad(tables, ((0, 0), (0, missing)))
        slots = page_table.slots(query_lengths)
        lengths = np.broadcast_to(np.asarray(query_lengths, np.int64), page_table.num_tokens.shape)
        sharing = None
        if share is not False:
            sharing = Sharing(page_table, lengths, always=share is True)
        starts = np.zeros(lengths.size + 1, dtype=np.int32)
        np.cumsum(lengths, out=starts[1:])
        return cls(
            # also on a CPU a copy, since `update` writes there
            block_tables=torch.from_numpy(tables).to(device, copy=True),
            kv_lengths=torch.from_numpy(page_table.num_tokens.astype(np.int32)).to(device),
            query_starts=torch.from_numpy(starts).to(device),
            slots=torch.from_numpy(slots).to(device),
            max_query_length=int(lengths.max(initial=0)),
            max_kv_length=max_kv_length,
            is_full=bool((page_table.num_tokens == max_kv_length).all()),
            arrivals=(
                torch.zeros(NUM_ARRIVALS, dtype=torch.int32, device=device)
                if torch.device(device).type == "cuda"
                else None
            ),
            sharing=sharing,
        )

    @property
    def num_sequences(self) -> int:
        """Sequences, padding included."""
        return self.kv_lengths.shape[0]

    @property
    def num_query_tokens(self) -> int:
        """Query tokens of all sequences together."""
        return self.slots.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.block_tables.device

    def without_sharing(self) -> AttentionBatch:
        """Return the same batch, of the same tensors, that reads blocks for each sequence."""
        return replace(self, sharing=None)

    def counters(self, count: int) -> torch.Tensor:
        """Return int32 zeros for a kernel that leaves zeros: `arrivals`, or new ones.

        Args:
            count: how many, at least.

        """
        if self.arrivals is not None and self.arrivals.numel() >= count:
            return self.arrivals
        return torch.zeros(count, dtype=torch.int32, device=self.device)

    def update(self, other: AttentionBatch) -> None:
        """Copy another batch into this one's tensors in place, for the next graph replay.

        Args:
            other: a batch of the same number of sequences and query tokens, whose lengths keep
                within this batch's bounds; its block tables may be narrower.

        Raises:
            TypeError: it is a page table, of which a batch has to be made first.
            ValueError: it does not fit; nothing was changed.

        """
        if isinstance(other, PageTable):
            raise TypeError(
                "update takes an AttentionBatch and was given a PageTable: make a batch of it "
                "first, with AttentionBatch.of(page_table)"
            )
        for name in ("max_query_length", "max_kv_length"):
            if getattr(other, name) > getattr(self, name):
                raise ValueError(
                    f"{name} is {getattr(other, name)}; this batch was made for at most "
                    f"{getattr(self, name)}"
                )
        for field in ("kv_lengths", "query_starts", "slots"):
            if getattr(self, field).shape != getattr(other, field).shape:
                raise ValueError(
                    f"{field} has shape {tuple(getattr(other, field).shape)}; this batch was "
                    f"made with {tuple(getattr(self, field).shape)}"
                )
        width = other.block_tables.shape[1]
        if width > self.block_tables.shape[1]:
            raise ValueError(
                f"the block tables are {width} blocks wide; this batch was made with "
                f"{self.block_tables.shape[1]}"
            )
        self.block_tables[:, :width].copy_(other.block_tables)
        for field in ("kv_lengths", "query_starts", "slots"):
            getattr(self, field).copy_(getattr(other, field))
        if self.sharing is not None:
            self.sharing.update(other.sharing, self)
