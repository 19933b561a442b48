"""What a command that launches the CUDA kernels itself needs, told in one sentence."""

from __future__ import annotations

from pagedattn.report.values import ResultsError


def require_kernels(done: str) -> None:
    """Raise ResultsError where a package or the GPU is missing.

    Args:
        done: what a launch is to be, for example "traced".

    """
    # here: nothing of it is needed to say how a command is used
    try:
        import matplotlib  # noqa: F401  # told before the GPU is used
        import pandas  # noqa: F401
    except ImportError as error:
        raise ResultsError(
            f"The picture needs pandas and matplotlib ({error}): pip install 'pagedattn[plot]'."
        ) from None
    import torch

    if not torch.cuda.is_available():
        raise ResultsError(f"A launch can only be {done} on a GPU, and torch sees none.")
    try:
        from pagedattn.attention.cuda import unavailable
    except ImportError as error:
        raise ResultsError(
            f"The kernels need Triton ({error}): pip install 'pagedattn[gpu]'."
        ) from None

    if reason := unavailable(torch.device("cuda")):
        raise ResultsError(f"The implementation cuda cannot be {done} here: {reason}.")
