"""vLLM's unified Triton kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pagedattn.attention import Launch
from pagedattn.peers.adapter import FP8, HALVES
from pagedattn.peers.vllm.common import VllmKernel, by_token, imported, scales_of

if TYPE_CHECKING:
    from pagedattn.attention import AttentionCall

_SPLIT_BELOW = 128  # programs: fewer, and the kernel splits a sequence's keys
_SEGMENTS = 16


class VllmTriton(VllmKernel):
    """The kernel with the buffers that let it split small decode batches.

    Called as vLLM 0.24 does (`vllm/v1/attention/backends/triton_attn.py`). Over an fp8 cache it
    multiplies in the query's type.
    """

    name = "vllm_triton"
    features = frozenset({"fp8", "window", "soft_cap", "alibi", "sinks"})
    dtypes = (*HALVES, torch.float32)
    takes_strides = True

    def refuse(self, call: AttentionCall) -> str | None:
        """Say what it cannot take, or None; waits for the GPU where it splits keys."""
        batch = call.batch
        splits = batch.max_query_length == 1 and batch.num_sequences <= _most(call)
        if splits and not batch.kv_lengths.all():
            return "where it splits keys it gives NaN for sequences without tokens"
        return None

    def bind(self, call: AttentionCall) -> Launch:
        """Allocate the buffers; there is nothing to plan."""
        ops = imported("vllm.v1.attention.ops.triton_unified_attention")
        query, cache, batch = call.query, call.cache, call.batch
        most = _most(call)
        parts = (most, query.shape[1], _SEGMENTS)
        padded = 1 << (cache.head_size - 1).bit_length()
        sums = torch.empty((*parts, padded), dtype=torch.float32, device=query.device)
        peaks, totals = torch.empty((2, *parts), dtype=torch.float32, device=query.device)
        key, value = by_token(cache)
        options: dict[str, Any] = {"k_descale": None, "v_descale": None}
        if cache.dtype == FP8:
            modes = imported("vllm.v1.kv_cache_interface").KVQuantMode
            options = dict(zip(options, scales_of(cache), strict=True))
            options["kv_quant_mode"] = modes.FP8_PER_TENSOR

        def run() -> None:
            ops.unified_attention(
                q=query,
                k=key,
                v=value,
                out=call.out,
                cu_seqlens_q=batch.query_starts,
                max_seqlen_q=batch.max_query_length,
                seqused_k=batch.kv_lengths,
                max_seqlen_k=batch.max_kv_length,
                softmax_scale=call.scale,
                causal=True,
                window_size=(-1, -1) if call.window is None else (call.window - 1, 0),
                block_table=batch.block_tables,
                softcap=call.soft_cap or 0.0,
                q_descale=None,
                alibi_slopes=call.alibi_slopes,
                sinks=call.sinks,
                seq_threshold_3D=most,
                num_par_softmax_segments=_SEGMENTS,
                softmax_segm_output=sums,
                softmax_segm_max=peaks,
                softmax_segm_expsum=totals,
                **options,
            )

        return Launch(run, call.out)


def _most(call: AttentionCall) -> int:
    """Sequences up to which the kernel splits a decode batch's keys."""
    return _SPLIT_BELOW // call.cache.num_kv_heads
