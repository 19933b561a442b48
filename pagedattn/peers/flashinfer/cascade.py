"""FlashInfer's cascade: a prefix that all sequences share is read once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pagedattn.attention import Launch
from pagedattn.peers.flashinfer.common import (
    COMMON_HEAD_SIZES,
    Csr,
    FlashInferKernel,
    imported,
    kept_with,
    workspace,
)
from pagedattn.peers.flashinfer.modules import Spec
from pagedattn.peers.flashinfer.prefill import prefill_spec

if TYPE_CHECKING:
    from pagedattn.attention import AttentionCall
    from pagedattn.peers.flashinfer.common import Traits


class FlashInferCascade(FlashInferKernel):
    """`MultiLevelCascadeAttentionWrapper` with two levels: the shared blocks, and the others.

    Which blocks all sequences share is found in the page table, as preparation. Each level runs
    on the back end of FlashInfer's choice.
    """

    name = "flashinfer_cascade"
    features = frozenset({"soft_cap"})
    needs_shared_prefix = True
    head_sizes = COMMON_HEAD_SIZES

    def specs(self, traits: Traits) -> tuple[Spec, ...]:
        """Name its modules: FlashInfer takes FA3 where it can, and merges by another module."""
        merge = Spec("flashinfer.jit.cascade", "gen_cascade_module", ())
        return prefill_spec("fa3", traits, traits.query_dtype), merge

    def refuse(self, call: AttentionCall) -> str | None:
        """Say what it cannot take, or None."""
        if call.batch.num_sequences < 2 or not shared_blocks(call):
            return "the sequences share no blocks"
        if not call.batch.query_starts.diff().all():
            return "each sequence must have a query token"
        return super().refuse(call)

    def bind(self, call: AttentionCall) -> Launch:
        """Make both levels' plans; `plan` makes them anew, in place."""
        cache, table = call.cache, Csr.of(call)
        shared = shared_blocks(call)
        sequences = call.batch.num_sequences
        indptr = table.indptr
        own = torch.ones(len(table.indices), dtype=torch.bool)
        for begin in indptr[:-1].tolist():
            own[begin : begin + shared] = False
        ends = torch.tensor([0, call.batch.num_query_tokens], dtype=torch.int32)
        levels = (
            [ends, table.query_starts],
            [
                torch.tensor([0, shared], dtype=torch.int32),
                indptr - shared * torch.arange(sequences + 1, dtype=torch.int32),
            ],
            [table.indices[:shared], table.indices[own.to(table.indices.device)]],
            [torch.tensor([cache.block_size], dtype=torch.int32), table.last],
        )
        wrapper = imported().MultiLevelCascadeAttentionWrapper(
            2, workspace(call.query.device, self.name), "HND"
        )
        kept = kept_with(wrapper)
        results: list[torch.Tensor] = []

        def plan() -> None:
            kept.extend(dict(vars(each)) for each in wrapper._batch_prefill_wrappers)
            wrapper.plan(
                *levels,
                *(call.query.shape[1], cache.num_kv_heads, cache.head_size, cache.block_size),
                causal=True,
                sm_scale=call.scale,
                logits_soft_cap=call.soft_cap,
                q_data_type=call.query.dtype,
                kv_data_type=cache.dtype,
            )

        plan()

        def run() -> None:
            results[:] = [wrapper.run(call.query, (cache.key, cache.value))]

        return Launch(run, call.out, plan, lambda: call.out.copy_(results[0]))


def shared_blocks(call: AttentionCall) -> int:
    """How many leading blocks all sequences have in common, each query's own token after them.

    Waits for the GPU.
    """
    batch = call.batch
    first_own = int((batch.kv_lengths - batch.query_starts.diff()).min())
    tables = batch.block_tables[:, : max(0, first_own) // call.cache.block_size]
    same = (tables == tables[:1]).all(0)
    return int(same.long().cumprod(0).sum())
