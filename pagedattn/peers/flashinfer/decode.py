"""FlashInfer's decode, on CUDA cores and on tensor cores."""

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
    plain_options,
    scales,
    workspace,
)
from pagedattn.peers.flashinfer.modules import Spec
from pagedattn.peers.flashinfer.prefill import prefill_spec

if TYPE_CHECKING:
    from pagedattn.attention import AttentionCall
    from pagedattn.peers.flashinfer.common import Traits


class FlashInferDecode(FlashInferKernel):
    """`BatchDecodeWithPagedKVCacheWrapper` on CUDA cores; one query token a sequence."""

    name = "flashinfer_decode"
    features = frozenset({"fp8", "window", "soft_cap", "alibi", "lse"})
    decode_only = True
    head_sizes = COMMON_HEAD_SIZES
    tensor_cores = False

    def specs(self, traits: Traits) -> tuple[Spec, ...]:
        """Name its module."""
        kind = 2 if traits.alibi else 0
        arguments = (
            *(traits.query_dtype, traits.cache_dtype, traits.query_dtype, torch.int32),
            *(traits.head_size, traits.head_size, kind, traits.window, traits.soft_cap),
        )
        return (Spec("flashinfer.jit.attention", "gen_batch_decode_module", arguments),)

    def bind(self, call: AttentionCall) -> Launch:
        """Make the plan; `plan` makes it anew, in place."""
        cache, table = call.cache, Csr.of(call)
        wrapper = imported().BatchDecodeWithPagedKVCacheWrapper(
            workspace(call.query.device, self.name), "HND", use_tensor_cores=self.tensor_cores
        )
        kept = kept_with(wrapper)

        def plan() -> None:
            kept.append(dict(vars(wrapper)))
            wrapper.plan(
                *(table.indptr, table.indices, table.last),
                *(call.query.shape[1], cache.num_kv_heads, cache.head_size, cache.block_size),
                q_data_type=call.query.dtype,
                kv_data_type=cache.dtype,
                **plain_options(call),
            )

        plan()
        options = scales(call)

        def run() -> None:
            wrapper.run(
                call.query,
                (cache.key, cache.value),
                out=call.out,
                lse=call.lse,
                return_lse=call.lse is not None,
                **options,
            )
            if call.lse is not None:
                call.lse.mul_(LN_2)  # it is to the base 2

        return Launch(run, call.out, plan)


class FlashInferDecodeTensorCores(FlashInferDecode):
    """The same wrapper on tensor cores: its prefill kernel, without a mask."""

    name = "flashinfer_decode_tensor_cores"
    sums_rounded_weights = True
    tensor_cores = True

    def specs(self, traits: Traits) -> tuple[Spec, ...]:
        """Name its module."""
        return (prefill_spec("fa2", traits, traits.query_dtype),)
