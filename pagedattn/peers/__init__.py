"""Other ways to do the same work, measured beside this project's own.

Each says of given inputs, or of the machine, whether it can be used and, if not, why.
"""

from pagedattn.peers.block_managers import ComparedBlockManager, PagedattnBlockManager
from pagedattn.peers.contiguous import CudnnContiguous, IndexPut, SdpaContiguous
from pagedattn.peers.kernels import (
    CONTIGUOUS_KERNELS,
    FLASHINFER_KERNELS,
    PEERS,
    VLLM_KERNELS,
    register_kernels,
)
from pagedattn.peers.vllm_block_manager import VllmBlockManager

__all__ = [
    "CONTIGUOUS_KERNELS",
    "FLASHINFER_KERNELS",
    "PEERS",
    "VLLM_KERNELS",
    "ComparedBlockManager",
    "CudnnContiguous",
    "IndexPut",
    "PagedattnBlockManager",
    "SdpaContiguous",
    "VllmBlockManager",
    "register_kernels",
]
