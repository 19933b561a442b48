"""The peers' kernels among the implementations of attention."""

from __future__ import annotations

from pagedattn.attention.registry import implementation_names, register
from pagedattn.peers.vllm_kernels import VllmCuda, VllmFlashAttention3, VllmTriton

VLLM_KERNELS = (VllmFlashAttention3.name, VllmTriton.name, VllmCuda.name)


def register_kernels() -> None:
    """Make the peers' kernels known to `pagedattn.attention` by name, as any other's.

    Whether a kernel can be used, `unsupported` says. A second call changes nothing.
    """
    for kernel in (VllmFlashAttention3(), VllmTriton(), VllmCuda()):
        if kernel.name not in implementation_names():
            register(kernel)
