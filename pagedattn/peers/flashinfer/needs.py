"""Which of FlashInfer's modules a session of tests and benchmarks will need."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from pagedattn.attention import get_implementation
from pagedattn.peers.flashinfer.common import FlashInferKernel, Traits
from pagedattn.peers.flashinfer.modules import Spec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pagedattn.workloads import AttentionShape

_TORCH_NAMES = {"float8_e4m3": "float8_e4m3fn"}


def traits_of(shape: AttentionShape) -> Traits:
    """Traits of a named shape."""
    query, cache = (
        getattr(torch, _TORCH_NAMES.get(name, name)) for name in (shape.dtype, shape.cache_dtype)
    )
    group = shape.num_query_heads // shape.num_kv_heads
    return Traits(
        *(query, cache, shape.head_size, group, shape.block_size),
        window=shape.window is not None,
        soft_cap=shape.soft_cap is not None,
        alibi=shape.alibi,
        sinks=shape.sinks,
    )


def of_benchmarks(name: str, shapes: Iterable[AttentionShape]) -> set[Spec]:
    """Modules that one of FlashInfer's kernels needs to be timed on these shapes."""
    kernel = get_implementation(name)
    assert isinstance(kernel, FlashInferKernel)
    return {
        spec
        for shape in shapes
        if not (kernel.decode_only and shape.kind != "decode")
        and (shape.shared_prefix or not kernel.needs_shared_prefix)
        and kernel.suits(traits_of(shape))
        for spec in kernel.specs(traits_of(shape))
    }


def of_kv_writes() -> set[Spec]:
    """Modules that turn Q and K, and write K and V."""
    return {
        Spec("flashinfer.jit.rope", "gen_rope_module", ()),
        Spec("flashinfer.jit.page", "gen_page_module", ()),
    }


def of_correctness(name: str, head_sizes: Iterable[int], block_sizes: Iterable[int]) -> set[Spec]:
    """Modules that one of FlashInfer's kernels needs for the correctness suite, in bfloat16.

    Args:
        name: of the kernel.
        head_sizes: each without options.
        block_sizes: the same, with heads of 64; the options are tested with those too, one at a
            time.

    """
    kernel = get_implementation(name)
    assert isinstance(kernel, FlashInferKernel)
    plain = Traits(torch.bfloat16, torch.bfloat16, 64, 4, 16)
    wanted = [replace(plain, head_size=size) for size in head_sizes]
    wanted += [replace(plain, block_size=size) for size in block_sizes]
    alone = (
        replace(plain, window=True),
        replace(plain, soft_cap=True),
        replace(plain, alibi=True),
        replace(plain, sinks=True),
    )
    wanted += [replace(option, group=group) for option in alone for group in (2, 4)]
    wanted.append(replace(plain, cache_dtype=torch.float8_e4m3fn))
    return {spec for traits in wanted if kernel.suits(traits) for spec in kernel.specs(traits)}
