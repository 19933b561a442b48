"""One benchmark row of attention: inputs, launches, the error that it must keep to."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from pagedattn.attention import Launch, attention, get_implementation
from pagedattn.attention.cascade import plan_of
from pagedattn.attention.reference import reference_attention
from pagedattn.benchmarking.gpu_timing import LaunchGraph, rotation_size
from pagedattn.benchmarking.step_times import time_steps
from pagedattn.kv_cache import FP8
from pagedattn.testing import (
    AttentionInputs,
    ErrorBudget,
    error_budget,
    error_of,
    known_roundings,
    make_rotation,
    zero_nan,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from pagedattn.benchmarking.roofs import Roofs
    from pagedattn.workloads import AttentionShape

FASTER_THAN_POSSIBLE = 0.9


@dataclass
class AttentionCase:
    """A workload on a device, for several implementations.

    Attributes:
        shape: the workload.
        rotation: batches over disjoint blocks, together larger than twice the L2 on a GPU.
        roofs: measured limits of the GPU; None on a CPU.
        is_finite: whether unused slots hold zeros, and not NaN any more.
        budgets: errors allowed, by the type that is rounded to and whether parts are rounded.

    """

    shape: AttentionShape
    rotation: list[AttentionInputs]
    roofs: Roofs | None
    is_finite: bool = False
    budgets: dict[tuple[torch.dtype | None, bool], ErrorBudget] = field(default_factory=dict)

    @classmethod
    def of(cls, shape: AttentionShape, device: str, roofs: Roofs | None = None) -> AttentionCase:
        """Make the inputs of a workload."""
        count = 1
        if device == "cuda":
            least = 0.0 if roofs is None else roofs.limit_seconds(shape.kv_bytes, shape.flops)
            count = rotation_size(shape.kv_bytes, least_seconds=least)
        return cls(shape, make_rotation(shape, count, device=device), roofs)

    @cached_property
    def exact(self) -> torch.Tensor:
        """Attention over the first batch in float64."""
        exact, _ = reference_attention(self.rotation[0].call(), torch.float64)
        return exact

    def unsupported(self, name: str) -> str | None:
        """Why an implementation or control cannot run this case, or None."""
        return get_implementation(name).unsupported(self.rotation[0].call())

    def launches(self, name: str) -> list[Launch]:
        """One launch for each batch of the rotation; each returns its result.

        An implementation that reads shared blocks once does so where that pays, from a plan that is
        made here for each batch.

        For an implementation that multiplies unused slots by 0, they become zeros; this changes
        the cache for good.

        Raises:
            UnsupportedError: the implementation finds out now that it cannot take them.

        """
        implementation = get_implementation(name)
        if getattr(implementation, "reads_unused_slots", False) and not self.is_finite:
            zero_nan(self.rotation[0].cache)  # all batches' cache
            self.is_finite = True
        prepare = getattr(implementation, "prepare", None)

        def launch(inputs: AttentionInputs) -> Launch:
            call = inputs.call()
            if prepare is not None:
                prepared: Launch = prepare(call)
                return prepared
            plan_of(implementation, call)
            return Launch(
                lambda: attention(
                    inputs.query,
                    inputs.cache,
                    inputs.batch,
                    out=call.out,
                    implementation=name,
                    **inputs.options,
                ),
                call.out,
            )

        return [launch(inputs) for inputs in self.rotation]

    def planning_columns(self, name: str, launch: Launch) -> dict[str, float]:
        """Columns of what a step costs before its first launch: `batch_us` and `plan_us`.

        `plan_us` is what there is to do besides having lengths and tables on the device. Of a
        launch with a `plan`, as FlashInfer's have, that is timed: it is given the table's entries
        on the device, and lengths on the host, which it copies itself. For this project's decode it
        is what sharing adds to a step, and is left out where nothing is shared; bringing lengths
        and tables to the device is `batch_us`, which no peer's row has, as there it is preparation.

        Args:
            name: implementation.
            launch: one of `launches(name)`.

        """
        if launch.plan is not None:
            return {"plan_us": LaunchGraph.seconds_to_plan(launch.plan) * 1e6}
        implementation = get_implementation(name)
        if hasattr(implementation, "prepare") or self.shape.kind != "decode":
            return {}
        times = time_steps(self.shape, self.rotation[0].call(), implementation)
        columns = {"batch_us": times.batch * 1e6}
        if times.plan is not None:
            columns["plan_us"] = times.plan * 1e6
        return columns

    def budget(self, name: str) -> ErrorBudget:
        """Error allowed to an implementation on the first batch: larger if it is known to round."""
        known = self._roundings(name)
        if known not in self.budgets:
            self.budgets[known] = error_budget(self.rotation[0], self.exact, *known)
        return self.budgets[known]

    def _roundings(self, name: str) -> tuple[torch.dtype | None, bool]:
        return known_roundings(get_implementation(name), self.rotation[0].call())

    def error(self, name: str, result: torch.Tensor) -> ErrorBudget:
        """Error of an implementation's result on the first batch.

        Raises:
            AssertionError: it is above the budget, or something is NaN.

        """
        error, budget = error_of(result, self.exact), self.budget(name)
        assert budget.covers(error), f"the error {error} is above the budget {budget}"
        return error

    def describe(
        self, name: str, error: ErrorBudget, seconds: float | None, peak_bytes: int | None
    ) -> dict[str, Any]:
        """Columns of a row for pytest-benchmark's `extra_info`, of options those that it has.

        The limit is that of products of 16 bits, to which K and V of fp8 are widened, but for an
        implementation that rounds queries and weights to fp8: that of products in fp8.

        Args:
            name: implementation.
            error: what `error` returned.
            seconds: median of a launch; None if nothing was timed.
            peak_bytes: memory that a launch allocates on top of its inputs.

        Raises:
            AssertionError: the row is faster than the memory or the matrix units allow, so
                something was not done or not measured.

        """
        shape = self.shape
        query_bytes = 2 * self.rotation[0].query.nbytes
        row: dict[str, Any] = {
            "area": "attention",
            "implementation": name,
            "workload": shape.name,
            "device": self.rotation[0].query.device.type,
            "kind": shape.kind,
            "batch": shape.num_sequences,
            "context": max(shape.kv_lengths),
            "num_query_heads": shape.num_query_heads,
            "num_kv_heads": shape.num_kv_heads,
            "head_size": shape.head_size,
            "block_size": shape.block_size,
            "dtype": shape.cache_dtype,
            **self._options(),
            "bytes": shape.kv_bytes + query_bytes,
            "flops": shape.flops,
            "error": error.relative,
            "error_budget": self.budget(name).relative,
        }
        if peak_bytes is not None:
            row["peak_memory_bytes"] = peak_bytes
        if seconds:
            row["gb_per_s"] = row["bytes"] / seconds * 1e-9
            row["tflop_per_s"] = shape.flops / seconds * 1e-12
        if self.roofs is not None:
            in_fp8 = self._roundings(name)[0] == FP8
            limit = self.roofs.limit_seconds(row["bytes"], shape.flops, in_fp8=in_fp8)
            row["limit_us"] = limit * 1e6
            row["measured_read_gb_per_s"] = self.roofs.read_gb_per_s
            if seconds:
                row["share_of_bandwidth"] = row["gb_per_s"] / self.roofs.read_gb_per_s
                assert seconds > FASTER_THAN_POSSIBLE * limit, (
                    f"{seconds * 1e6:.1f} µs is less than the limit of {limit * 1e6:.1f} µs"
                )
        return row

    def _options(self) -> dict[str, float]:
        shape = self.shape
        options = {
            "window": shape.window,
            "soft_cap": shape.soft_cap,
            "alibi": shape.num_query_heads if shape.alibi else None,
            "sinks": shape.num_query_heads if shape.sinks else None,
        }
        return {name: value for name, value in options.items() if value is not None}


def peak_memory(launch: Callable[[], object]) -> int:
    """Bytes of GPU memory that one launch allocates at most, its inputs not counted."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    launch()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
