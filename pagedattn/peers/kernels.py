"""The peers' kernels among the implementations of attention."""

from __future__ import annotations

from pagedattn.attention.registry import implementation_names, register
from pagedattn.peers.contiguous import CudnnContiguous, SdpaContiguous
from pagedattn.peers.flashinfer import (
    FlashInferCascade,
    FlashInferCudnn,
    FlashInferDecode,
    FlashInferDecodeTensorCores,
    FlashInferFa2,
    FlashInferFa3,
    FlashInferPersistent,
    FlashInferXqa,
)
from pagedattn.peers.vllm import VllmCuda, VllmFlashAttention3, VllmTriton

VLLM_KERNELS = (VllmFlashAttention3.name, VllmTriton.name, VllmCuda.name)
"""vLLM's."""

_FLASHINFER = (
    FlashInferDecode,
    FlashInferDecodeTensorCores,
    FlashInferFa2,
    FlashInferFa3,
    FlashInferPersistent,
    FlashInferXqa,
    FlashInferCudnn,
    FlashInferCascade,
)
FLASHINFER_KERNELS = tuple(kernel.name for kernel in _FLASHINFER)
"""FlashInfer's."""

CONTIGUOUS_KERNELS = (SdpaContiguous.name, CudnnContiguous.name)
"""Controls on contiguous memory: PyTorch's choice, and cuDNN."""

PEERS = (*VLLM_KERNELS, *FLASHINFER_KERNELS, *CONTIGUOUS_KERNELS)
"""All of them, in the order in which they are run."""


def register_kernels() -> None:
    """Make the peers' kernels known to `pagedattn.attention` by name, as any other's.

    Whether a kernel can be used, `unsupported` says. A second call changes nothing.
    """
    ours = (
        VllmFlashAttention3,
        VllmTriton,
        VllmCuda,
        *_FLASHINFER,
        SdpaContiguous,
        CudnnContiguous,
    )
    for kernel in ours:
        if kernel.name not in implementation_names():
            register(kernel())
