"""FlashInfer's attention kernels as implementations: all back ends that run on a Hopper GPU.

Called as FlashInfer 0.6.12 documents. FlashInfer is imported when the first of them is used, and
compiles with nvcc what a call needs; `modules` compiles all that a session needs at once. Its
back ends `trtllm-gen` and `cute-dsl` are for later generations, and are not here.
"""

from pagedattn.peers.flashinfer.cascade import FlashInferCascade
from pagedattn.peers.flashinfer.common import FlashInferKernel, Traits
from pagedattn.peers.flashinfer.cudnn import FlashInferCudnn
from pagedattn.peers.flashinfer.decode import FlashInferDecode, FlashInferDecodeTensorCores
from pagedattn.peers.flashinfer.modules import Build, Spec
from pagedattn.peers.flashinfer.persistent import FlashInferPersistent
from pagedattn.peers.flashinfer.prefill import FlashInferFa2, FlashInferFa3
from pagedattn.peers.flashinfer.xqa import FlashInferXqa

__all__ = [
    "Build",
    "FlashInferCascade",
    "FlashInferCudnn",
    "FlashInferDecode",
    "FlashInferDecodeTensorCores",
    "FlashInferFa2",
    "FlashInferFa3",
    "FlashInferKernel",
    "FlashInferPersistent",
    "FlashInferXqa",
    "Spec",
    "Traits",
]
