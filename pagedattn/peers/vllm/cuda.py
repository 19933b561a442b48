"""vLLM's first kernel: PagedAttention of the paper, in CUDA."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pagedattn.attention import Launch
from pagedattn.peers.adapter import FP8, is_decode
from pagedattn.peers.vllm.common import VllmKernel, imported, scales_of

if TYPE_CHECKING:
    from pagedattn.attention import AttentionCall

_PARTITION = 512
_LONGEST_UNCUT = 8192


class VllmCuda(VllmKernel):
    """vLLM's first kernel (SOSP '23, §4.3 and §5.1), in the cache layout that it wants.

    Copying the batch's blocks into that layout is preparation. Which of its two versions runs is
    decided as vLLM did: the second cuts a sequence into partitions of 512 tokens.
    """

    name = "vllm_cuda"
    features = frozenset({"fp8", "alibi"})
    rounds_parts = True  # partitions' results are of the query's type

    def refuse(self, call: AttentionCall) -> str | None:
        """Say what it cannot take, or None."""
        if not is_decode(call):
            return "it takes one query token a sequence"
        if call.cache.head_size not in (32, 64, 80, 96, 112, 120, 128, 192, 256):
            return f"it has no kernel for head_size {call.cache.head_size}"
        if call.cache.block_size not in (8, 16, 32):
            return f"it takes blocks of 8, 16 and 32 tokens, not {call.cache.block_size}"
        return None

    def bind(self, call: AttentionCall) -> Launch:
        """Copy the blocks that the batch names; there is nothing to plan."""
        ops = imported("vllm._custom_ops")
        query, cache, batch, out = call.query, call.cache, call.batch, call.out
        blocks, numbered = torch.unique(batch.block_tables, return_inverse=True)
        tables = numbered.to(torch.int32)
        parts, dtype = (cache.key, cache.value), "auto"
        if cache.dtype == FP8:
            parts, dtype = (cache.key.view(torch.uint8), cache.value.view(torch.uint8)), "fp8_e4m3"
        wide = 16 // cache.key.element_size()
        # [num_blocks, num_kv_heads, head_size / wide, block_size, wide]
        split = (len(blocks), cache.num_kv_heads, cache.block_size, -1, wide)
        key = parts[0][blocks].view(split).transpose(2, 3).contiguous()
        # [num_blocks, num_kv_heads, head_size, block_size]
        value = parts[1][blocks].transpose(2, 3).contiguous()
        sequences, heads, size = query.shape
        partitions = -(-batch.max_kv_length // _PARTITION)
        uncut = batch.max_kv_length <= _LONGEST_UNCUT and (
            partitions == 1 or sequences * heads > _PARTITION
        )
        common = (
            *(query, key, value, cache.num_kv_heads, call.scale, tables, batch.kv_lengths),
            *(cache.block_size, batch.max_kv_length, call.alibi_slopes, dtype, *scales_of(cache)),
        )
        if uncut:
            return Launch(lambda: ops.paged_attention_v1(out, *common), out)
        pieces = torch.empty(
            (sequences, heads, partitions, size), dtype=out.dtype, device=query.device
        )
        sums, peaks = torch.empty(
            (2, sequences, heads, partitions), dtype=torch.float32, device=query.device
        )
        return Launch(lambda: ops.paged_attention_v2(out, sums, peaks, pieces, *common), out)
