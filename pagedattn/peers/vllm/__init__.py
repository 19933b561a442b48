"""vLLM's own attention kernels as implementations: FlashAttention 3, Triton and CUDA.

vLLM is imported when the first of them is used.
"""

from pagedattn.peers.vllm.cuda import VllmCuda
from pagedattn.peers.vllm.flash_attention import VllmFlashAttention3
from pagedattn.peers.vllm.triton import VllmTriton

__all__ = ["VllmCuda", "VllmFlashAttention3", "VllmTriton"]
