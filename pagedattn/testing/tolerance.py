"""How wrong a result may be: as wrong as an ordinary computation in the same precision.

The budget of a case is measured on that case. An ordinary computation multiplies the inputs with
float32 sums, as matrix units do, rounds the softmax weights to the inputs' dtype for the second
product, and rounds the result. Its error against float64 is the measure: a kernel may err twice
as much. A kernel may also take its float32 sums in another order; a sum of n terms taken one after
the other errs by about sqrt(n) / 2 roundings (Higham, Accuracy and Stability of Numerical
Algorithms, §2.8), n being the head size. Among few results the ordinary computation may round the
largest ones well by chance, so a single element may always be one unit in the last place of the
largest result off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pagedattn.attention.reference import reference_attention

if TYPE_CHECKING:
    from pagedattn.testing.inputs import AttentionInputs

FACTOR = 2.0


@dataclass(frozen=True)
class ErrorBudget:
    """An error, or the largest that is allowed.

    Attributes:
        relative: Euclidean norm of the difference, over the norm of the exact result.
        largest: largest absolute difference of an element.

    """

    relative: float
    largest: float

    def covers(self, error: ErrorBudget) -> bool:
        """Whether an error is within this budget; NaN never is."""
        return error.relative <= self.relative and error.largest <= self.largest


def error_of(result: torch.Tensor, exact: torch.Tensor) -> ErrorBudget:
    """Error of a result against the exact one, both in any dtype and of one shape."""
    if exact.numel() == 0:
        return ErrorBudget(0.0, 0.0)
    difference = result.double() - exact.double()
    norm = float(exact.double().norm())
    relative = float(difference.norm()) / norm if norm else float(difference.norm())
    return ErrorBudget(relative, float(difference.abs().max()))


def error_budget(inputs: AttentionInputs, exact: torch.Tensor) -> ErrorBudget:
    """Error that attention over these inputs may have.

    Args:
        inputs: the case.
        exact: its result in float64.

    Returns:
        FACTOR times the error of the ordinary computation, and the roundings of sums in order;
        `largest` is at least the spacing of `query`'s dtype at the largest result.

    """
    dtype = inputs.query.dtype
    rounded, _ = reference_attention(inputs.call(), torch.float32, weights_dtype=dtype)
    ordinary = error_of(rounded.to(dtype), exact)
    in_order = math.sqrt(inputs.cache.head_size) / 2 * torch.finfo(torch.float32).eps
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    spacing = 2.0 ** math.floor(math.log2(largest)) * torch.finfo(dtype).eps if largest else 0.0
    return ErrorBudget(
        FACTOR * ordinary.relative + in_order,
        max(FACTOR * ordinary.largest + in_order * largest, spacing),
    )


def check_attention(
    result: torch.Tensor, inputs: AttentionInputs
) -> tuple[ErrorBudget, ErrorBudget]:
    """Compare a result with attention in float64.

    Returns:
        The error and the budget.

    Raises:
        AssertionError: the error is above the budget, or something is NaN.

    """
    exact, _ = reference_attention(inputs.call(), torch.float64)
    error, budget = error_of(result, exact), error_budget(inputs, exact)
    assert budget.covers(error), f"the error {error} is above the budget {budget}"
    return error, budget
