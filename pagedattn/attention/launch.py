"""Work that is made ready once and launched many times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


@dataclass(frozen=True)
class Launch:
    """One batch's attention, its inputs bound.

    An implementation that plans on the host, or keeps K and V in a layout of its own, may offer
    `prepare(call) -> Launch` besides `attention`; then the launch alone is timed, and the planning
    beside it.

    Attributes:
        run: launches the work; may be captured in a CUDA graph.
        out: the call's, written by `run`, as its log-sum-exp is.
        plan: works out anew what a step needs before its first layer; None if there is nothing
            to plan.
        finish: brings a result that `run` has in an order of its own into `out`, where that is no
            part of the work; None if `run` writes `out` itself.

    """

    run: Callable[[], object]
    out: torch.Tensor
    plan: Callable[[], object] | None = None
    finish: Callable[[], object] | None = None

    def __call__(self) -> torch.Tensor:
        """Launch, and return `out` with the result in it."""
        self.run()
        if self.finish is not None:
            self.finish()
        return self.out
