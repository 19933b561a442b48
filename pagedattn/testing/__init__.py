"""Random paged inputs, poison and error budgets: for this project's tests and for yours."""

from pagedattn.testing.covering import pairwise
from pagedattn.testing.finite import finite, zero_nan
from pagedattn.testing.inputs import (
    AttentionInputs,
    last_queries,
    make_inputs,
    make_rotation,
    page_table_of,
)
from pagedattn.testing.support import Finding, features, probe
from pagedattn.testing.tolerance import (
    ErrorBudget,
    check_attention,
    error_budget,
    error_of,
    known_roundings,
    lse_budget,
    lse_error,
)

__all__ = [
    "AttentionInputs",
    "ErrorBudget",
    "Finding",
    "check_attention",
    "error_budget",
    "error_of",
    "features",
    "finite",
    "known_roundings",
    "last_queries",
    "lse_budget",
    "lse_error",
    "make_inputs",
    "make_rotation",
    "page_table_of",
    "pairwise",
    "probe",
    "zero_nan",
]
