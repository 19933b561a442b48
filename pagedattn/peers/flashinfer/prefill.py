"""FlashInfer's prefill for batches of any kind, by its FA2 and FA3 back ends."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from pagedattn.attention import Launch
from pagedattn.peers.adapter import FP8
from pagedattn.peers.flashinfer.common import (
    COMMON_HEAD_SIZES,
    LN_2,
    Csr,
    FlashInferKernel,
    Traits,
    imported,
    kept_with,
    plain_options,
    scales,
    workspace,
)
from pagedattn.peers.flashinfer.modules import Spec

if TYPE_CHECKING:
    from pagedattn.attention import AttentionCall

_SINKS = "pagedattn.peers.flashinfer.prefill"


def prefill_spec(backend: str, traits: Traits, query_dtype: torch.dtype) -> Spec:
    """Name the module of one of the two back ends.

    Args:
        backend: `fa2` or `fa3`.
        traits: of the calls.
        query_dtype: in which the kernel multiplies.

    """
    if traits.sinks:
        return Spec(_SINKS, "sinks_module", (backend, replace(traits, group=1, block_size=1)))
    arguments = (
        *(backend, query_dtype, traits.cache_dtype, traits.query_dtype, torch.int32),
        *(traits.head_size, traits.head_size, 2 if traits.alibi else 0),
        *(traits.window, traits.soft_cap, False),
    )
    return Spec("flashinfer.jit.attention", "gen_batch_prefill_module", arguments)


def sinks_arguments(backend: str, traits: Traits) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of FlashInfer's customised module with sinks.

    FlashInfer's own wrapper with sinks names its modules without the head size, so that two of
    them in one process would be one.
    """
    variants = imported("flashinfer.jit.attention.variants")
    dtype = traits.query_dtype
    name = (
        f"pagedattn_sinks_{backend}_{str(dtype).removeprefix('torch.')}_{traits.head_size}"
        f"_window_{traits.window}"
    )
    arguments = [
        *(name, dtype, dtype, dtype, torch.int32, traits.head_size, traits.head_size),
        *(["sink"], ["float"], ["sm_scale"], ["double"]),
        *("AttentionSink", variants.attention_sink_decl[backend]),
    ]
    return arguments, {
        "use_sliding_window": traits.window,
        "use_fp16_qk_reduction": False,
        "pos_encoding_mode": 0,
    }


def sinks_module(backend: str, traits: Traits) -> Any:
    """Make FlashInfer's description of the module with sinks."""
    arguments, options = sinks_arguments(backend, traits)
    modules = imported("flashinfer.jit.attention")
    return modules.gen_customize_batch_prefill_module(backend, *arguments, **options)


class FlashInferFa2(FlashInferKernel):
    """`BatchPrefillWithPagedKVCacheWrapper` with the FA2 back end."""

    name = "flashinfer_fa2"
    sums_rounded_weights = True
    head_sizes = COMMON_HEAD_SIZES
    features = frozenset({"fp8", "window", "soft_cap", "alibi", "sinks", "lse"})
    backend = "fa2"

    def specs(self, traits: Traits) -> tuple[Spec, ...]:
        """Name its module."""
        return (prefill_spec(self.backend, traits, traits.query_dtype),)

    def suits(self, traits: Traits) -> bool:
        """Whether it has kernels for these sizes and features."""
        return super().suits(traits) and self.clash(traits.features) is None

    def clash(self, features: frozenset[str]) -> str | None:
        """Say which of its features it does not do together, or None."""
        beside = features & {"fp8", "soft_cap", "alibi"}
        if "sinks" in features and beside:
            return f"its kernel with sinks does not do {' or '.join(sorted(beside))} too"
        return None

    def refuse(self, call: AttentionCall) -> str | None:
        """Say what it cannot take, or None."""
        return self.clash(call.features) or super().refuse(call)

    def bind(self, call: AttentionCall) -> Launch:
        """Make the plan; `plan` makes it anew, in place."""
        cache, table = call.cache, Csr.of(call)
        extra: dict[str, Any] = {}
        tail: tuple[Any, ...] = ()
        if call.sinks is not None:
            arguments, options = sinks_arguments(self.backend, Traits.of(call))
            extra = {"jit_args": arguments, "jit_kwargs": options}
            tail = (call.sinks, call.scale)
        wrapper = imported().BatchPrefillWithPagedKVCacheWrapper(
            workspace(call.query.device, self.name), "HND", backend=self.backend, **extra
        )
        query, more, prepare_query = self._inputs(call)
        kept = kept_with(wrapper)

        def plan() -> None:
            kept.append(dict(vars(wrapper)))
            wrapper.plan(
                *(table.query_starts, table.indptr, table.indices, table.last),
                *(call.query.shape[1], cache.num_kv_heads, cache.head_size, cache.block_size),
                causal=True,
                q_data_type=query.dtype,
                kv_data_type=cache.dtype,
                o_data_type=call.out.dtype,
                **plain_options(call),
            )

        plan()
        options = self._scales(call)

        def run() -> None:
            if prepare_query:
                query.copy_(call.query)
            wrapper.run(
                query,
                (cache.key, cache.value),
                *tail,
                *more,
                out=call.out,
                lse=call.lse,
                return_lse=call.lse is not None,
                **options,
            )
            if call.lse is not None:
                call.lse.mul_(LN_2)  # it is to the base 2

        return Launch(run, call.out, plan)

    def _scales(self, call: AttentionCall) -> dict[str, float]:
        return scales(call)

    def _inputs(self, call: AttentionCall) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], bool]:
        """Queries as the kernel takes them, its further tensors, and whether to convert."""
        return call.query, (), False


class FlashInferFa3(FlashInferFa2):
    """The same wrapper with the FA3 back end.

    Over an fp8 cache it multiplies in fp8, so the launch rounds the queries to fp8 first, with a
    scale of 1.
    """

    name = "flashinfer_fa3"
    sums_rounded_weights = False
    features = frozenset({"fp8", "window", "soft_cap", "sinks", "lse"})
    backend = "fa3"
    scales_per_head = True

    def specs(self, traits: Traits) -> tuple[Spec, ...]:
        """Name its module."""
        over_fp8 = traits.cache_dtype == FP8
        return (prefill_spec("fa3", traits, FP8 if over_fp8 else traits.query_dtype),)

    def refuse(self, call: AttentionCall) -> str | None:
        """Say what it cannot take, or None."""
        if torch.cuda.get_device_capability(call.query.device)[0] != 9:
            return "its FA3 back end needs a GPU of the Hopper generation"
        return super().refuse(call)

    def clash(self, features: frozenset[str]) -> str | None:
        """Say which of its features it does not do together, or None."""
        beside = features & {"window", "soft_cap"}
        if "fp8" in features and beside:
            return f"its kernel for fp8 does not do {' or '.join(sorted(beside))} too"
        return super().clash(features)

    def rounds_to(self, call: AttentionCall) -> torch.dtype | None:
        """The type in which it multiplies."""
        return FP8 if call.cache.dtype == FP8 else None

    def _scales(self, call: AttentionCall) -> dict[str, float]:
        return {}

    def _inputs(self, call: AttentionCall) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], bool]:
        if call.cache.dtype != FP8:
            return call.query, (), False
        query = torch.empty(call.query.shape, dtype=FP8, device=call.query.device)
        ones = torch.ones(query.shape[1], device=query.device)
        given = (call.cache.key_scale, call.cache.value_scale)
        per_head = [
            ones[: call.cache.num_kv_heads] if scale is None else scale.contiguous()
            for scale in given
        ]
        return query, (ones, *per_head), True
