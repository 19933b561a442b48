"""What both launchers share: what decides how a call is launched, and launching it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import ctypes
    from collections.abc import Hashable, Sequence

    import torch
    from numpy.typing import NDArray

    from pagedattn.attention.call import AttentionCall
    from pagedattn.attention.cuda.module import Kernel

LOG2_E = math.log2(math.e)
MOST_WARPS = 16
MOST_MOMENTS = 16


def signature_of(call: AttentionCall) -> Hashable:
    """Return all of a call but where its tensors lie: shapes, strides, types, bounds, options.

    Calls with the same signature are launched in the same way, with other addresses. Of an address
    only its place within 16 bytes counts, on which the kernels' loads depend.
    """
    query, out = call.query, call.out
    return (
        *(query.shape, query.stride(), query.dtype, query.get_device(), query.data_ptr() % 16),
        *(out.stride(), out.dtype, out.data_ptr() % 16),
        *(call.cache.signature, call.batch.signature, reads_again(call)),
        *(call.scale, call.window, call.soft_cap, call.causal),
        *(call.lse is None, call.alibi_slopes is None, call.sinks is None),
    )


def reads_again(call: AttentionCall) -> bool:
    """Whether half of K and V or more were read for another sequence, and come from the L2.

    Of what a window leaves, most is a sequence's own. Under ALiBi nothing is read once, so that no
    plan has searched for what is shared, and it is not worth searching for.
    """
    return call.window is None and call.alibi_slopes is None and call.batch.expects_shared


def table_lines_of(call: AttentionCall) -> int:
    """Return how many lines of a row of the tables to ask for, of 128 bytes or 32 entries each.

    Those that are likely filled; none goes past the row's end, but the only one of a short row.
    """
    batch = call.batch
    blocks = -(-batch.expected_kv_length // call.cache.block_size)
    return min(-(-blocks // 32), max(1, batch.block_tables.shape[1] // 32))


def set_scale(parameters: ctypes.Structure, call: AttentionCall) -> None:
    """Set `scale_log2`, which brings scores to units of log2, and `cap_log2`."""
    parameters.scale_log2 = call.scale * LOG2_E
    if call.soft_cap is not None:
        # the kernels take tanh by an exponential of twice its argument
        parameters.scale_log2 *= 2 / call.soft_cap
        parameters.cap_log2 = call.soft_cap * LOG2_E


def launch(
    kernel: Kernel,
    sizes: tuple[int, int, int],
    parameters: ctypes.Structure,
    tensors: Sequence[tuple[str, torch.Tensor | None]],
    cluster: int = 1,
) -> None:
    """Launch a kernel with the addresses of tensors, which live until it is launched.

    Args:
        kernel: as for `Kernel.launch`, like what follows.
        sizes: programs, threads of a program, and its dynamic shared memory in bytes.
        parameters: fields of the tensors' names are set, but for those that are None.
        tensors: names, and tensors or None.
        cluster: programs of one.

    Raises:
        CudaError: the driver refuses.

    """
    for name, tensor in tensors:
        if tensor is not None:
            setattr(parameters, name, tensor.data_ptr())
    kernel.launch(*sizes, parameters, cluster)


def macros_of_trace(num_programs: int) -> tuple[tuple[str, int], ...]:
    """Return what a kernel is compiled with besides, so that its programs note moments."""
    return (("TRACE", num_programs),)


def marks_of(kernel: Kernel) -> NDArray[np.int64]:
    """Wait for the device and return what the last launch of a traced kernel noted.

    Returns:
        int64 [num_programs, `MOST_WARPS`, `MOST_MOMENTS`], nanoseconds of the GPU's clock when a
        warp came to each `Moment` of trace.cuh; 0 or less where it did not.

    Raises:
        CudaError: the kernel is not traced.

    """
    return kernel.read("marks").view(np.int64).reshape(-1, MOST_WARPS, MOST_MOMENTS)
