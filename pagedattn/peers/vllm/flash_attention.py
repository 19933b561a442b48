"""FlashAttention 3 as vLLM ships it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pagedattn.attention import Launch
from pagedattn.peers.adapter import FP8, TANH_ERROR
from pagedattn.peers.vllm.common import VllmKernel, by_token, imported, scales_of

if TYPE_CHECKING:
    from pagedattn.attention import AttentionCall

_LARGEST_SINK = 88.0  # exp(sink - largest score) is still a float32, for scores from 0 on


class VllmFlashAttention3(VllmKernel):
    """FlashAttention 3, its schedule worked out before the launch.

    Called as vLLM 0.24 does (`vllm/v1/attention/backends/flash_attn.py`). Over an fp8 cache it
    multiplies in fp8, so the launch rounds the queries to fp8 first, with a scale of 1.
    """

    name = "vllm_flash_attention_3"
    features = frozenset({"fp8", "window", "soft_cap", "sinks", "lse"})
    takes_strides = True
    scales_per_head = True
    reads_unused_slots = True

    def refuse(self, call: AttentionCall) -> str | None:
        """Say what it cannot take, or None."""
        cache, query = call.cache, call.query
        if torch.cuda.get_device_capability(query.device)[0] != 9:
            return "FlashAttention 3 needs a GPU of the Hopper generation"
        if cache.head_size % 8 or cache.head_size > 256:
            return f"FlashAttention 3 takes head sizes up to 256 by eights, not {cache.head_size}"
        if cache.dtype == FP8 and query.dtype != torch.bfloat16:
            return "over an fp8 cache its result is bfloat16"
        if call.sinks is not None:
            if query.shape[1] > 64:
                return f"with sinks it takes at most 64 query heads, not {query.shape[1]}"
            if (call.sinks.bfloat16() != call.sinks).any():
                return "its sinks are bfloat16 numbers, and these are not"
            # exp(sink - largest score) goes into a float32 sum; the result is right if that is inf
            if call.lse is not None and (call.sinks > _LARGEST_SINK).any():
                return f"its log-sum-exp may overflow with sinks above {_LARGEST_SINK:g}"
            if call.lse is not None and not call.batch.kv_lengths.all():
                return "its log-sum-exp of a sequence without keys leaves sinks out"
        return None

    def rounds_to(self, call: AttentionCall) -> torch.dtype | None:
        """The type in which it multiplies."""
        return FP8 if call.cache.dtype == FP8 else None

    def lse_error(self, call: AttentionCall) -> float:
        """Error of the log-sum-exp on top of float32's: that of its soft cap's `tanh.approx`."""
        return (call.soft_cap or 0.0) * TANH_ERROR

    def bind(self, call: AttentionCall) -> Launch:
        """Make the schedule; `plan` makes it anew, in place."""
        flash = imported("vllm.vllm_flash_attn")
        cache, batch = call.cache, call.batch
        over_fp8 = cache.dtype == FP8
        query = torch.empty(call.query.shape, dtype=FP8, device=call.query.device)
        query = query if over_fp8 else call.query
        window = (-1, -1) if call.window is None else (call.window - 1, 0)

        def schedule() -> torch.Tensor:
            made: torch.Tensor = flash.get_scheduler_metadata(
                batch_size=batch.num_sequences,
                max_seqlen_q=batch.max_query_length,
                max_seqlen_k=batch.max_kv_length,
                num_heads_q=query.shape[1],
                num_heads_kv=cache.num_kv_heads,
                headdim=cache.head_size,
                cache_seqlens=batch.kv_lengths,
                qkv_dtype=query.dtype,
                cu_seqlens_q=batch.query_starts,
                page_size=cache.block_size,
                causal=True,
                window_size=window,
                has_softcap=call.soft_cap is not None,
            )
            return made

        planned = schedule()
        key, value = by_token(cache)
        options: dict[str, torch.Tensor] = {}
        if over_fp8:
            shape = (batch.num_sequences, cache.num_kv_heads)
            scales = (scale.expand(shape) for scale in scales_of(cache))
            options = dict(zip(("k_descale", "v_descale"), scales, strict=True))
        if call.sinks is not None:
            options["s_aux"] = call.sinks.bfloat16()

        def run() -> None:
            if over_fp8:
                query.copy_(call.query)
            result = flash.flash_attn_varlen_func(
                query,
                key,
                value,
                out=call.out,
                cu_seqlens_q=batch.query_starts,
                max_seqlen_q=batch.max_query_length,
                seqused_k=batch.kv_lengths,
                max_seqlen_k=batch.max_kv_length,
                softmax_scale=call.scale,
                causal=True,
                window_size=list(window),
                softcap=call.soft_cap or 0.0,
                block_table=batch.block_tables,
                return_softmax_lse=call.lse is not None,
                scheduler_metadata=planned,
                fa_version=3,
                **options,
            )
            if call.lse is not None:
                call.lse.copy_(result[1].T)  # [num_query_heads, num_query_tokens]

        return Launch(run, call.out, lambda: planned.copy_(schedule()))
