"""What the adapters to FlashInfer share: its page table, its workspace, and what it lacks here."""

from __future__ import annotations

import importlib
import importlib.util
import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

from pagedattn.peers.adapter import FP8, TANH_ERROR, Adapter, is_decode
from pagedattn.peers.flashinfer.modules import failed

if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

    from pagedattn.attention import AttentionCall
    from pagedattn.peers.flashinfer.modules import Spec

WORKSPACE_BYTES = 512 << 20
LN_2 = math.log(2.0)
COMMON_HEAD_SIZES = (64, 128, 256)
"""Its merge of partial results is compiled for these alone; an FA2 prefill over heads of 80, which
merges nothing, ends with an illegal instruction on an H100 (FlashInfer 0.6.12)."""


def imported(module: str = "flashinfer") -> ModuleType:
    """Import FlashInfer, or a module of it."""
    return importlib.import_module(module)


@cache
def workspace(device: torch.device, name: str) -> torch.Tensor:
    """Memory for partial results, zeroed, one for each back end: its launches run one by one."""
    del name
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def kept_with(wrapper: object) -> list[object]:
    """Return a list that lives as long as a wrapper of FlashInfer's.

    Planning anew puts other tensors into the wrapper, and a captured launch goes on to read those
    of the plan that it was captured with.
    """
    kept: list[object] = []
    vars(wrapper)["kept_for_graphs"] = kept
    return kept


@dataclass(frozen=True)
class Traits:
    """What FlashInfer compiles a module for.

    Attributes:
        query_dtype: of queries and results.
        cache_dtype: of K and V.
        head_size: of both.
        group: query heads a KV head.
        block_size: tokens a block.
        window: whether there is one; as for the others.
        soft_cap: the same.
        alibi: the same.
        sinks: the same.

    """

    query_dtype: torch.dtype
    cache_dtype: torch.dtype
    head_size: int
    group: int
    block_size: int
    window: bool = False
    soft_cap: bool = False
    alibi: bool = False
    sinks: bool = False

    @classmethod
    def of(cls, call: AttentionCall) -> Traits:
        """Take them from a call."""
        asked = {name: name in call.features for name in ("window", "soft_cap", "alibi", "sinks")}
        return cls(
            call.query.dtype,
            call.cache.dtype,
            call.cache.head_size,
            call.query.shape[1] // call.cache.num_kv_heads,
            call.cache.block_size,
            **asked,
        )

    @property
    def features(self) -> frozenset[str]:
        """Those of `pagedattn.attention.call.FEATURES` that a module is compiled for."""
        asked = {
            "fp8": self.cache_dtype == FP8,
            "window": self.window,
            "soft_cap": self.soft_cap,
            "alibi": self.alibi,
            "sinks": self.sinks,
        }
        return frozenset(name for name, is_asked in asked.items() if is_asked)


class FlashInferKernel(Adapter):
    """What all of FlashInfer's back ends have in common.

    Attributes:
        decode_only: whether each sequence must have exactly one query token.
        needs_shared_prefix: whether the sequences must share blocks.
        block_sizes: tokens a block, or None for any.
        head_sizes: the same for heads.
        sums_rounded_weights: whether the softmax's sum is of weights in 16 bits, on matrix units.

    """

    decode_only = False
    needs_shared_prefix = False
    block_sizes: tuple[int, ...] | None = None
    head_sizes: tuple[int, ...] | None = None
    sums_rounded_weights = False
    reads_unused_slots = True

    def lse_error(self, call: AttentionCall) -> float:
        """Error of the log-sum-exp on top of float32's: of its soft cap, and of rounded weights.

        Each weight is off by half of its type's spacing at most, relatively, and so is their sum,
        which is as much, absolutely, in its logarithm.
        """
        error = (call.soft_cap or 0.0) * TANH_ERROR
        if self.sums_rounded_weights:
            error += torch.finfo(call.query.dtype).eps / 2
        return error

    def specs(self, traits: Traits) -> tuple[Spec, ...]:
        """Name the modules that FlashInfer compiles for such calls."""
        raise NotImplementedError

    def suits(self, traits: Traits) -> bool:
        """Whether it has kernels for these sizes and features."""
        return (
            traits.features <= self.features
            and (self.head_sizes is None or traits.head_size in self.head_sizes)
            and (self.block_sizes is None or traits.block_size in self.block_sizes)
        )

    def missing(self, device: torch.device) -> str | None:
        """Say what the machine lacks, or None."""
        if importlib.util.find_spec("flashinfer") is None:
            return "FlashInfer is not installed"
        if device.type != "cuda":
            return "FlashInfer's kernels need a CUDA GPU"
        return None

    def refuse(self, call: AttentionCall) -> str | None:
        """Say what it cannot take, or None."""
        if self.decode_only and not is_decode(call):
            return "it takes one query token a sequence"
        for what, size, sizes in (
            ("heads of size", call.cache.head_size, self.head_sizes),
            ("blocks of", call.cache.block_size, self.block_sizes),
        ):
            if sizes is not None and size not in sizes:
                return f"it takes {what} {', '.join(map(str, sizes))}, not {size}"
        if call.alibi_slopes is not None:
            if call.lse is not None:
                return "with ALiBi its log-sum-exp counts distances from the sequence's first token"
            own = imported("flashinfer.utils").get_alibi_slopes(call.query.shape[1])
            if not torch.allclose(own, call.alibi_slopes.cpu(), rtol=1e-6):
                return "its ALiBi slopes are those of the number of heads, and these are others"
        return next(filter(None, map(failed, self.specs(Traits.of(call)))), None)


@dataclass(frozen=True)
class Csr:
    """A batch's page table as FlashInfer takes it; see `pagedattn.page_table.CsrPageTable`.

    Attributes:
        query_starts: int32 [num_sequences + 1], on the host, as all but `indices` are.
        indptr: int32 [num_sequences + 1].
        indices: int32 [num_entries], on the device.
        last: int32 [num_sequences], tokens of the last block.
        lengths: int32 [num_sequences].

    """

    query_starts: torch.Tensor
    indptr: torch.Tensor
    indices: torch.Tensor
    last: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def of(cls, call: AttentionCall) -> Csr:
        """Take it from a call's batch; waits for the GPU.

        Entries that have left the window mean nothing, but FlashInfer loads whole tiles: they
        are made to name the first block that is still seen.
        """
        batch, block_size = call.batch, call.cache.block_size
        lengths, starts = batch.kv_lengths.cpu(), batch.query_starts.cpu()
        num_blocks = (lengths + block_size - 1) // block_size
        indptr = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        indptr[1:] = num_blocks.cumsum(0)
        columns = torch.arange(batch.block_tables.shape[1])
        columns = columns.expand(len(lengths), -1)
        if call.window is not None:
            first_seen = (lengths - starts.diff() - call.window + 1).clamp(min=0) // block_size
            columns = torch.maximum(columns, first_seen[:, None])
            columns = columns.clamp(max=max(0, batch.block_tables.shape[1] - 1))
        columns = columns.to(batch.device)
        used = torch.arange(batch.block_tables.shape[1]) < num_blocks[:, None]
        indices = batch.block_tables.gather(1, columns)[used.to(batch.device)]
        last = lengths - (num_blocks - 1).clamp(min=0) * block_size
        return cls(starts, indptr, indices.contiguous(), last.to(torch.int32), lengths)


def scales(call: AttentionCall) -> dict[str, float]:
    """FlashInfer's arguments for an fp8 cache with one scale; waits for the GPU."""
    if call.cache.dtype != FP8:
        return {}
    key, value = call.cache.key_scale, call.cache.value_scale
    return {
        "k_scale": 1.0 if key is None else float(key[0]),
        "v_scale": 1.0 if value is None else float(value[0]),
    }


def plain_options(call: AttentionCall) -> dict[str, Any]:
    """Arguments of `plan` that most wrappers share."""
    return {
        "pos_encoding_mode": "NONE" if call.alibi_slopes is None else "ALIBI",
        "window_left": -1 if call.window is None else call.window - 1,
        "logits_soft_cap": call.soft_cap,
        "sm_scale": call.scale,
    }
