"""vLLM's own attention kernels as implementations: FlashAttention 3, Triton and CUDA.

They are called as vLLM 0.24 calls them (`vllm/v1/attention/backends/flash_attn.py` and
`triton_attn.py`). vLLM is imported when the first of them is used.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING

import torch

from pagedattn.attention.launch import Launch

if TYPE_CHECKING:
    from types import ModuleType

    from pagedattn.attention.call import AttentionCall
    from pagedattn.kv_cache import LayerCache

HALVES = (torch.float16, torch.bfloat16)
_SPLIT_BELOW = 128  # programs: fewer, and vLLM's Triton kernel splits a sequence's keys
_SEGMENTS = 16
_PARTITION = 512
_LONGEST_UNCUT = 8192


def _missing(call: AttentionCall) -> str | None:
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    if not call.query.is_cuda:
        return "vLLM's kernels need a CUDA GPU"
    return call.beyond(())


def _imported(module: str) -> ModuleType:
    """Import a module of vLLM's, and leave to PyTorch what vLLM takes from it.

    `vllm.platforms.cuda` switches PyTorch's cuDNN attention off for the whole process, which would
    make every control slower that is timed after it.
    """
    if "vllm.platforms.cuda" not in sys.modules:
        allowed = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
        importlib.import_module("vllm.platforms.cuda")
        torch.backends.cuda.enable_cudnn_sdp(allowed)
    return importlib.import_module(module)


class _VllmKernel:
    """What the three have in common: they write K and V with vLLM's CUDA kernel."""

    name: str

    def attention(self, call: AttentionCall) -> None:
        """Plan, then write causal attention into `out`."""
        self.prepare(call).run()

    def prepare(self, call: AttentionCall) -> Launch:
        """Bind the inputs; see `pagedattn.attention.launch.Launch`."""
        raise NotImplementedError

    def write_kv(
        self, key: torch.Tensor, value: torch.Tensor, cache: LayerCache, slots: torch.Tensor
    ) -> None:
        """Write K and V of tokens into their slots with `reshape_and_cache_flash`.

        Slots below 0 are skipped; those past the cache are not checked.
        """
        ops = _imported("vllm._custom_ops")
        one = torch.ones((), device=key.device)
        ops.reshape_and_cache_flash(
            key, value, cache.key.transpose(1, 2), cache.value.transpose(1, 2), slots, "auto", one,
            one,
        )  # fmt: skip


class VllmFlashAttention3(_VllmKernel):
    """FlashAttention 3 as vLLM ships it, its schedule worked out before the launch."""

    name = "vllm_flash_attention_3"

    def unsupported(self, call: AttentionCall) -> str | None:
        """Say what it cannot take, or None."""
        query, cache = call.query, call.cache
        if missing := _missing(call):
            return missing
        if query.dtype not in HALVES:
            return f"FlashAttention 3 takes float16 and bfloat16, not {query.dtype}"
        if torch.cuda.get_device_capability(query.device)[0] != 9:
            return "FlashAttention 3 needs a GPU of the Hopper generation"
        if cache.head_size % 8 or cache.head_size > 256:
            return f"FlashAttention 3 takes head sizes up to 256 by eights, not {cache.head_size}"
        return None

    def prepare(self, call: AttentionCall) -> Launch:
        """Make the schedule; `plan` makes it anew, in place."""
        query, cache, batch, out = call.query, call.cache, call.batch, call.out
        flash = _imported("vllm.vllm_flash_attn")

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
            )
            return made

        planned = schedule()
        # [num_blocks, block_size, num_kv_heads, head_size], by strides
        key, value = cache.key.transpose(1, 2), cache.value.transpose(1, 2)

        def run() -> None:
            flash.flash_attn_varlen_func(
                query,
                key,
                value,
                out=out,
                cu_seqlens_q=batch.query_starts,
                max_seqlen_q=batch.max_query_length,
                seqused_k=batch.kv_lengths,
                max_seqlen_k=batch.max_kv_length,
                softmax_scale=call.scale,
                causal=True,
                block_table=batch.block_tables,
                scheduler_metadata=planned,
                fa_version=3,
            )

        return Launch(run, out, lambda: planned.copy_(schedule()))


class VllmTriton(_VllmKernel):
    """vLLM's unified Triton kernel, with the buffers that let it split small decode batches."""

    name = "vllm_triton"

    def unsupported(self, call: AttentionCall) -> str | None:
        """Say what it cannot take, or None."""
        return _missing(call)

    def prepare(self, call: AttentionCall) -> Launch:
        """Allocate the buffers; there is nothing to plan."""
        query, cache, batch, out = call.query, call.cache, call.batch, call.out
        ops = _imported("vllm.v1.attention.ops.triton_unified_attention")
        most = _SPLIT_BELOW // cache.num_kv_heads  # sequences
        parts = (most, query.shape[1], _SEGMENTS)
        padded = 1 << (cache.head_size - 1).bit_length()
        sums = torch.empty((*parts, padded), dtype=torch.float32, device=query.device)
        peaks, totals = torch.empty((2, *parts), dtype=torch.float32, device=query.device)
        key, value = cache.key.transpose(1, 2), cache.value.transpose(1, 2)

        def run() -> None:
            ops.unified_attention(
                q=query,
                k=key,
                v=value,
                out=out,
                cu_seqlens_q=batch.query_starts,
                max_seqlen_q=batch.max_query_length,
                seqused_k=batch.kv_lengths,
                max_seqlen_k=batch.max_kv_length,
                softmax_scale=call.scale,
                causal=True,
                window_size=(-1, -1),
                block_table=batch.block_tables,
                softcap=0.0,
                q_descale=None,
                k_descale=None,
                v_descale=None,
                seq_threshold_3D=most,
                num_par_softmax_segments=_SEGMENTS,
                softmax_segm_output=sums,
                softmax_segm_max=peaks,
                softmax_segm_expsum=totals,
            )

        return Launch(run, out)


class VllmCuda(_VllmKernel):
    """vLLM's first kernel (SOSP '23, §4.3 and §5.1), in the cache layout that it wants.

    Copying the batch's blocks into that layout is preparation. Which of its two versions runs is
    decided as vLLM did: the second cuts a sequence into partitions of 512 tokens.
    """

    name = "vllm_cuda"

    def unsupported(self, call: AttentionCall) -> str | None:
        """Say what it cannot take, or None."""
        cache, batch = call.cache, call.batch
        if missing := _missing(call):
            return missing
        if batch.max_query_length != 1 or batch.num_query_tokens != batch.num_sequences:
            return "it takes one query token a sequence"
        if cache.head_size not in (32, 64, 80, 96, 112, 120, 128, 192, 256):
            return f"it has no kernel for head_size {cache.head_size}"
        if cache.block_size not in (8, 16, 32):
            return f"it takes blocks of 8, 16 and 32 tokens, not {cache.block_size}"
        return None

    def prepare(self, call: AttentionCall) -> Launch:
        """Copy the blocks that the batch names; there is nothing to plan."""
        query, cache, batch, out = call.query, call.cache, call.batch, call.out
        ops = _imported("vllm._custom_ops")
        blocks, numbered = torch.unique(batch.block_tables, return_inverse=True)
        tables = numbered.to(torch.int32)
        wide = 16 // query.element_size()
        # [num_blocks, num_kv_heads, head_size / wide, block_size, wide]
        split = (len(blocks), cache.num_kv_heads, cache.block_size, -1, wide)
        key = cache.key[blocks].view(split).transpose(2, 3).contiguous()
        # [num_blocks, num_kv_heads, head_size, block_size]
        value = cache.value[blocks].transpose(2, 3).contiguous()
        one = torch.ones((), device=query.device)
        sequences, heads, size = query.shape
        partitions = -(-batch.max_kv_length // _PARTITION)
        uncut = batch.max_kv_length <= _LONGEST_UNCUT and (
            partitions == 1 or sequences * heads > _PARTITION
        )
        common = (
            *(query, key, value, cache.num_kv_heads, call.scale, tables, batch.kv_lengths),
            *(cache.block_size, batch.max_kv_length, None, "auto", one, one),
        )
        if uncut:
            return Launch(lambda: ops.paged_attention_v1(out, *common), out)
        parts = torch.empty(
            (sequences, heads, partitions, size), dtype=out.dtype, device=query.device
        )
        sums, peaks = torch.empty(
            (2, sequences, heads, partitions), dtype=torch.float32, device=query.device
        )
        return Launch(lambda: ops.paged_attention_v2(out, sums, peaks, parts, *common), out)
