"""FlashInfer's cuDNN back end: cuDNN's attention over a page table."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import TYPE_CHECKING

import torch

from pagedattn.attention import Launch
from pagedattn.peers.flashinfer.common import WORKSPACE_BYTES, FlashInferKernel, imported

if TYPE_CHECKING:
    from pagedattn.attention import AttentionCall
    from pagedattn.peers.flashinfer.common import Traits
    from pagedattn.peers.flashinfer.modules import Spec


@cache
def _workspace(device: torch.device) -> torch.Tensor:
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


class FlashInferCudnn(FlashInferKernel):
    """`cudnn_batch_prefill_with_kv_cache`, for batches of any kind.

    cuDNN builds a graph for each shape, which FlashInfer keeps by lengths, heads and sizes alone.
    """

    name = "flashinfer_cudnn"
    features = frozenset({"lse"})

    def specs(self, traits: Traits) -> tuple[Spec, ...]:
        """Nothing is compiled: cuDNN brings its kernels."""
        del traits
        return ()

    def missing(self, device: torch.device) -> str | None:
        """Say what the machine lacks, or None."""
        if missing := super().missing(device):
            return missing
        if importlib.util.find_spec("cudnn") is None:
            return "cuDNN's Python frontend is not installed"
        return None

    def refuse(self, call: AttentionCall) -> str | None:
        """Say what it cannot take, or None."""
        if call.scale != call.cache.head_size**-0.5:
            return "FlashInfer takes one cuDNN graph for all scales, the first that it met"
        if not call.batch.kv_lengths.all():
            return "FlashInfer's cuDNN back end takes no empty sequence"
        return super().refuse(call)

    def bind(self, call: AttentionCall) -> Launch:
        """Bind the arguments; there is nothing to plan."""
        prefill = imported("flashinfer.cudnn").cudnn_batch_prefill_with_kv_cache
        query, cache_, batch = call.query, call.cache, call.batch
        sequences = batch.num_sequences
        width = -(-batch.max_kv_length // cache_.block_size)
        tables = batch.block_tables[:, :width].contiguous()
        kv_lengths = batch.kv_lengths.view(sequences, 1, 1, 1)
        query_lengths = batch.query_starts.diff().view(sequences, 1, 1, 1)
        row = query.shape[1] * query.shape[2]  # elements of a query token
        offsets = (batch.query_starts.long() * row).view(sequences + 1, 1, 1, 1)
        padded = None
        if call.lse is not None:
            shape = (sequences, batch.max_query_length, query.shape[1])
            padded = torch.empty(shape, dtype=torch.float32, device=query.device)
        tokens = torch.arange(batch.num_query_tokens, device=query.device)
        owners = torch.searchsorted(batch.query_starts[1:].long(), tokens, right=True)
        places = tokens - batch.query_starts[owners]

        def run() -> None:
            prefill(
                query,
                cache_.key,
                cache_.value,
                call.scale,
                _workspace(query.device),
                max_token_per_sequence=batch.max_query_length,
                max_sequence_kv=batch.max_kv_length,
                actual_seq_lens_q=query_lengths,
                actual_seq_lens_kv=kv_lengths,
                block_tables=tables,
                causal=True,
                return_lse=padded is not None,
                batch_offsets_q=offsets,
                batch_offsets_o=offsets,
                out=call.out,
                lse=padded,
                is_cuda_graph_compatible=True,
            )
            if call.lse is not None and padded is not None:
                call.lse.copy_(padded[owners, places])

        return Launch(run, call.out)
