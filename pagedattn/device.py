"""Which GPU kernels are launched on: that of their tensors, whichever is current."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

_AS_IT_IS = nullcontext()


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which a GPU is the current one, on whose stream kernels are launched.

    Args:
        device: of the tensors; on a CPU, and where it is current already, nothing is changed.

    """
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _AS_IT_IS
    return torch.cuda.device(device)
