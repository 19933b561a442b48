"""FlashInfer's persistent kernel: one launch for batches of any kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pagedattn.attention import Launch
from pagedattn.peers.flashinfer.common import (
    COMMON_HEAD_SIZES,
    LN_2,
    Csr,
    FlashInferKernel,
    imported,
    kept_with,
    scales,
    workspace,
)
from pagedattn.peers.flashinfer.modules import Spec

if TYPE_CHECKING:
    from pagedattn.attention import AttentionCall
    from pagedattn.peers.flashinfer.common import Traits


class FlashInferPersistent(FlashInferKernel):
    """`BatchAttention`: persistent thread blocks over a list of work made on the host."""

    name = "flashinfer_persistent"
    sums_rounded_weights = True
    head_sizes = COMMON_HEAD_SIZES
    features = frozenset({"fp8", "soft_cap", "lse"})

    def specs(self, traits: Traits) -> tuple[Spec, ...]:
        """Name its module."""
        arguments = (
            *(traits.query_dtype, traits.cache_dtype, traits.query_dtype, torch.int32),
            *(traits.head_size, traits.head_size, 0, traits.soft_cap, False),
        )
        return (Spec("flashinfer.jit.attention", "gen_batch_attention_module", arguments),)

    def bind(self, call: AttentionCall) -> Launch:
        """Make the plan; `plan` makes it anew, in place."""
        cache, table, query = call.cache, Csr.of(call), call.query
        wrapper = imported().BatchAttention("HND", str(query.device))
        wrapper.float_workspace_buffer = workspace(query.device, self.name)
        lse = call.lse
        if lse is None:  # it always writes one
            lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
        kept = kept_with(wrapper)

        def plan() -> None:
            kept.append(dict(vars(wrapper)))
            wrapper.plan(
                *(table.query_starts, table.indptr, table.indices, table.lengths),
                *(query.shape[1], cache.num_kv_heads, cache.head_size, cache.head_size),
                cache.block_size,
                causal=True,
                sm_scale=call.scale,
                logits_soft_cap=call.soft_cap,
                q_data_type=query.dtype,
                kv_data_type=cache.dtype,
            )

        plan()
        options = scales(call)

        def run() -> None:
            wrapper.run(
                query,
                (cache.key, cache.value),
                out=call.out,
                lse=lse,
                logits_soft_cap=call.soft_cap or 0.0,
                **options,
            )
            if call.lse is not None:
                lse.mul_(LN_2)  # it is to the base 2

        return Launch(run, call.out, plan)
