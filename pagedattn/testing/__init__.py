"""Random paged inputs, poison and error budgets: for this project's tests and for yours."""

from pagedattn.testing.inputs import AttentionInputs, make_inputs, make_rotation
from pagedattn.testing.tolerance import (
    ErrorBudget,
    check_attention,
    error_budget,
    error_of,
    lse_budget,
    lse_error,
)

__all__ = [
    "AttentionInputs",
    "ErrorBudget",
    "check_attention",
    "error_budget",
    "error_of",
    "lse_budget",
    "lse_error",
    "make_inputs",
    "make_rotation",
]
