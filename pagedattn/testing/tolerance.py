"""How wrong a result may be: as wrong as an ordinary computation in the same precision.

The budget of a case is measured on that case. An ordinary computation multiplies the inputs with
float32 sums, as matrix units do, rounds the softmax weights to the inputs' dtype for the second
product, and rounds the result. Its error against float64 is the measure: a kernel may err twice
as much. A kernel may also take its float32 sums in another order; a sum of n terms taken one after
the other errs by about sqrt(n) / 2 roundings (Higham, Accuracy and Stability of Numerical
Algorithms, §2.8), n being the head size. Among few results the ordinary computation may round the
largest ones well by chance, so a single element may always be one unit in the last place of the
largest result off.

The log-sum-exp is kept in float32 whatever the inputs' dtype, and its budget is an absolute one,
derived from how it is computed; see `lse_budget`.

A kernel that says it rounds queries and softmax weights to a lower type is held to the error of an
ordinary computation that does the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from pagedattn.attention.reference import reference_attention
from pagedattn.attention.registry import get_implementation
from pagedattn.kv_cache import dequantised

if TYPE_CHECKING:
    from pagedattn.attention.call import AttentionCall
    from pagedattn.attention.registry import Implementation
    from pagedattn.testing.inputs import AttentionInputs

FACTOR = 2.0
ROUNDINGS = 4  # ways to round the queries, of whose log-sum-exps the largest error counts


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


def known_roundings(
    implementation: Implementation, call: AttentionCall
) -> tuple[torch.dtype | None, bool]:
    """Return what an implementation says that it rounds: `rounded_to`, `rounds_parts`.

    Args:
        implementation: may have `rounds_to` and `rounds_parts`, see `Implementation`.
        call: of it.

    Raises:
        TypeError: `rounds_to` is no method, or returns no type.

    """
    rounds_to = getattr(implementation, "rounds_to", None)
    lower = None
    if rounds_to is not None:
        name = getattr(implementation, "name", type(implementation).__name__)
        if not callable(rounds_to):
            raise TypeError(f"{name}'s rounds_to must be a method, rounds_to(call).")
        lower = rounds_to(call)
        if not isinstance(lower, torch.dtype | None):
            raise TypeError(
                f"{name}'s rounds_to must return a torch.dtype, or None, not {lower!r}."
            )
    return lower, getattr(implementation, "rounds_parts", False)


def error_budget(
    inputs: AttentionInputs,
    exact: torch.Tensor,
    rounded_to: torch.dtype | None = None,
    rounds_parts: bool = False,
) -> ErrorBudget:
    """Error that attention over these inputs may have.

    Args:
        inputs: the case.
        exact: its result in float64.
        rounded_to: type that the ordinary computation rounds queries and softmax weights to; None
            is the queries' own.
        rounds_parts: whether partial results may be rounded before they are merged, which errs as
            rounding the result once more does.

    Returns:
        FACTOR times the error of the ordinary computation, and the roundings of sums in order;
        `largest` is at least half the spacing of `query`'s dtype at the largest result for each of
        its roundings: the weights', the result's, and the parts' where they are rounded.

    """
    dtype = inputs.query.dtype
    call = inputs.call()
    if rounded_to is not None:
        call = replace(call, query=call.query.to(rounded_to).to(dtype))
    rounded, _ = reference_attention(call, torch.float32, weights_dtype=rounded_to or dtype)
    ordinary = error_of(rounded.to(dtype), exact)
    if rounds_parts:
        once = error_of(exact.to(dtype), exact)
        ordinary = ErrorBudget(
            math.hypot(ordinary.relative, once.relative), math.hypot(ordinary.largest, once.largest)
        )
    in_order = math.sqrt(inputs.cache.head_size) / 2 * torch.finfo(torch.float32).eps
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    spacing = 2.0 ** math.floor(math.log2(largest)) * torch.finfo(dtype).eps if largest else 0.0
    return ErrorBudget(
        FACTOR * ordinary.relative + in_order,
        max(FACTOR * ordinary.largest + in_order * largest, (1.5 if rounds_parts else 1) * spacing),
    )


def lse_budget(
    inputs: AttentionInputs,
    exact_lse: torch.Tensor,
    implementation: str | None = None,
    rounded_to: torch.dtype | None = None,
) -> float:
    """Absolute error that the log-sum-exp over these inputs may have, computed in float32.

    A change of the scores by at most e changes the log-sum-exp by at most e, as its derivatives by
    them are the softmax weights. With eps the spacing of float32 at 1, d the head size, n the keys:

    - a score is a sum of d products, no partial sum of which is above scale * |q| * |k| (Cauchy and
      Schwarz): taken in order, sqrt(d) / 2 * eps of that (Higham, §2.8), and one rounding more;
    - a soft cap lessens errors, and its own is some units in the last place of the cap;
    - ALiBi's product, its unit and its addition round at the largest slope times the distance;
    - the sum of n exponentials, each right to two units, is off by sqrt(n) / 2 * eps and 2 eps of
      itself, which is as much in its logarithm;
    - peak and logarithm are rounded, multiplied into natural units, and added.

    Where queries are rounded to a lower type, FACTOR times the largest error that this makes is
    allowed on top. Of few queries the largest may be small by chance, so they are rounded in
    ROUNDINGS ways: multiplied beforehand by powers of the ROUNDINGS-th root of 2.

    Args:
        inputs: the case.
        exact_lse: its log-sum-exp in float64.
        implementation: name of one whose `lse_error`, if it has that, is allowed on top.
        rounded_to: type that queries are rounded to; None is what `implementation` says, or their
            own.

    """
    cache, batch = inputs.cache, inputs.batch
    used = torch.unique(batch.block_tables).long()
    keys = dequantised(cache.key[used].transpose(1, 2), cache.key_scale, torch.float32)
    # slots that no token is in hold NaN
    longest_key = float(keys.norm(dim=-1).nan_to_num(0.0, 0.0).max()) if used.numel() else 0.0
    longest_query = float(inputs.query.float().norm(dim=-1).max()) if inputs.query.numel() else 0.0
    score = cache.head_size**-0.5 * longest_query * longest_key
    bias = 0.0
    if inputs.alibi_slopes is not None:
        bias = float(inputs.alibi_slopes.abs().max()) * batch.max_kv_length
    finite = exact_lse[exact_lse.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    roundings: float = (
        (math.sqrt(cache.head_size) / 2 + 1) * score
        + 4 * (inputs.soft_cap or 0.0)
        + 2 * bias
        + math.sqrt(batch.max_kv_length) / 2
        + 2
        + 2 * largest
    )
    budget = torch.finfo(torch.float32).eps * roundings
    if implementation is not None:
        made = get_implementation(implementation)
        rounded_to = rounded_to or known_roundings(made, inputs.call())[0]
        if hasattr(made, "lse_error"):
            budget += made.lse_error(inputs.call())
    if rounded_to is not None:
        budget += FACTOR * _lse_error_of_rounding(inputs, exact_lse, rounded_to)
    return budget


def _lse_error_of_rounding(
    inputs: AttentionInputs, exact_lse: torch.Tensor, rounded_to: torch.dtype
) -> float:
    """Largest error of the log-sum-exp of queries that are rounded in some ways."""
    call = inputs.call()
    largest = 0.0
    for way in range(ROUNDINGS):
        factor = 2.0 ** (way / ROUNDINGS)
        query = (call.query.float() * factor).to(rounded_to).float()
        rounded = replace(call, query=query, scale=call.scale / factor)
        _, lse = reference_attention(rounded, torch.float32)
        largest = max(largest, lse_error(lse, exact_lse))
    return largest


def lse_error(lse: torch.Tensor, exact_lse: torch.Tensor) -> float:
    """Largest absolute error of a log-sum-exp; infinite where only one is -inf, or one is NaN."""
    if exact_lse.numel() == 0:
        return 0.0
    error = (lse.double() - exact_lse.double()).abs()
    error[lse.double() == exact_lse.double()] = 0.0  # -inf less -inf is NaN
    return float(error.nan_to_num(math.inf, math.inf).max())


def check_attention(
    result: torch.Tensor,
    inputs: AttentionInputs,
    lse: torch.Tensor | None = None,
    implementation: str | None = None,
    rounded_to: torch.dtype | None = None,
) -> tuple[ErrorBudget, ErrorBudget]:
    """Compare a result, and a log-sum-exp if there is one, with attention in float64.

    Args:
        result: of the case.
        inputs: the case.
        lse: its log-sum-exp, or None.
        implementation: name of what computed it; what it says that it rounds is allowed, see
            `known_roundings` and `lse_budget`.
        rounded_to: see `error_budget`; None is what `implementation` says.

    Returns:
        The error and the budget of the result.

    Raises:
        AssertionError: an error is above its budget, or something is NaN.

    """
    call = inputs.call()
    rounds_parts = False
    if implementation is not None:
        lower, rounds_parts = known_roundings(get_implementation(implementation), call)
        rounded_to = rounded_to or lower
    exact, exact_lse = reference_attention(call, torch.float64)
    error, budget = error_of(result, exact), error_budget(inputs, exact, rounded_to, rounds_parts)
    assert budget.covers(error), f"the error {error} is above the budget {budget}"
    if lse is not None:
        off = lse_error(lse, exact_lse)
        allowed = lse_budget(inputs, exact_lse, implementation, rounded_to)
        assert off <= allowed, f"the log-sum-exp is off by {off}, above the budget of {allowed}"
    return error, budget
