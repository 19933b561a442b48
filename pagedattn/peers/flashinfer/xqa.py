"""FlashInfer's XQA back end: decode from TensorRT-LLM."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from pagedattn.attention import Launch
from pagedattn.peers.adapter import FP8
from pagedattn.peers.flashinfer.common import WORKSPACE_BYTES, FlashInferKernel, imported, scales
from pagedattn.peers.flashinfer.modules import Spec

if TYPE_CHECKING:
    from pagedattn.attention import AttentionCall
    from pagedattn.peers.flashinfer.common import Traits


@cache
def _workspace(device: torch.device) -> torch.Tensor:
    """Semaphores, which must be zero and are left so, and memory for partial results."""
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


class FlashInferXqa(FlashInferKernel):
    """`xqa_batch_decode_with_kv_cache`; one query token a sequence.

    Over an fp8 cache it rounds queries and weights to fp8 itself. What several programs make of one
    sequence is handed on in the type of the queries (its mha.cu copies the tile that holds the
    result in 16 bits to its scratch memory), and merged from there.
    """

    name = "flashinfer_xqa"
    features = frozenset({"fp8", "window", "sinks"})
    decode_only = True
    rounds_parts = True
    block_sizes = (16, 32, 64, 128)

    def specs(self, traits: Traits) -> tuple[Spec, ...]:
        """Name its module."""
        arguments = (
            *(traits.query_dtype, traits.cache_dtype, traits.block_size, traits.head_size),
            *(traits.group, traits.window, traits.query_dtype),
        )
        return (Spec("flashinfer.jit.xqa", "gen_xqa_module", arguments),)

    def refuse(self, call: AttentionCall) -> str | None:
        """Say what it cannot take, or None."""
        if call.cache.head_size % 16 or call.cache.head_size > 256:
            return f"it takes head sizes up to 256 by sixteens, not {call.cache.head_size}"
        return super().refuse(call)

    def rounds_to(self, call: AttentionCall) -> torch.dtype | None:
        """The type in which it multiplies."""
        return FP8 if call.cache.dtype == FP8 else None

    def bind(self, call: AttentionCall) -> Launch:
        """Bind the arguments; there is nothing to plan."""
        cache, batch = call.cache, call.batch
        decode = imported("flashinfer.decode").xqa_batch_decode_with_kv_cache
        memory = _workspace(call.query.device)
        tables = batch.block_tables.contiguous()
        lengths = batch.kv_lengths.view(torch.uint32)
        given = scales(call)
        key_scale, value_scale = given.get("k_scale", 1.0), given.get("v_scale", 1.0)

        def run() -> None:
            decode(
                call.query,
                (cache.key, cache.value),
                memory,
                tables,
                lengths,
                batch.max_kv_length,
                bmm1_scale=call.scale * key_scale,
                bmm2_scale=value_scale,
                window_left=-1 if call.window is None else call.window - 1,
                out=call.out,
                sinks=call.sinks,
                kv_layout="HND",
            )

        return Launch(run, call.out)
