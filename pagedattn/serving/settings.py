"""What is run: the engine's options, the same for every policy that is compared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

TESTS = ("throughput", "scaling", "memory")
POLICIES = ("prefix-caching", "block-size", "cuda-graphs")


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How an engine is started; None leaves a value to the engine.

    Attributes:
        model: hub name, folder, or a preset's name with `load_format` ``dummy``.
        load_format: ``auto``, or ``dummy`` for random weights.
        block_size: tokens a block.
        max_model_len: tokens of the longest request.
        gpu_memory_utilization: share of the device's memory that the engine may take.
        prefix_caching: whether blocks are found again.
        tensor_parallel_size: GPUs.
        attention_backend: the engine's name of one.
        dtype: of weights and KV cache.
        enforce_eager: whether to do without CUDA graphs and compilation.
        seed: of weights and sampling.

    """

    model: str
    load_format: str = "auto"
    block_size: int | None = None
    max_model_len: int | None = None
    gpu_memory_utilization: float | None = None
    prefix_caching: bool = True
    tensor_parallel_size: int = 1
    attention_backend: str | None = None
    dtype: str | None = None
    enforce_eager: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Policy:
    """One way to run the same load; `name` tells it from the others, and is "" without others."""

    name: str
    settings: EngineSettings


def policies(
    settings: EngineSettings, compare: tuple[str, ...], *, block_sizes: tuple[int, ...], gpu: bool
) -> list[Policy]:
    """List the engines to start: one, or the settings varied in each thing to compare.

    Each comparison changes one thing and leaves the others as they were asked for. Without a GPU
    there are no CUDA graphs to compare.
    """
    if not compare:
        return [Policy("", settings)]
    found: dict[EngineSettings, str] = {}
    for what in compare:
        if what == "prefix-caching":
            for on in (False, True):
                name = f"prefix caching {'on' if on else 'off'}"
                found.setdefault(replace(settings, prefix_caching=on), name)
        elif what == "block-size":
            for size in block_sizes:
                found.setdefault(replace(settings, block_size=size), f"blocks of {size}")
        elif what == "cuda-graphs" and gpu:
            for eager in (True, False):
                name = "eager" if eager else "CUDA graphs"
                found.setdefault(replace(settings, enforce_eager=eager), name)
    return [Policy(name, variant) for variant, name in found.items()]


@dataclass(frozen=True, slots=True)
class Scale:
    """How large a run is.

    Attributes:
        requests: of the throughput test.
        prompt_tokens: shortest and longest prompt of a synthetic load.
        output_tokens: fewest and most tokens generated.
        users: steps of the sweep, rising.
        requests_a_user: of each step of the sweep.
        max_model_len: of the engine, where the model allows it.
        block_sizes: that are compared.

    """

    requests: int
    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    users: tuple[int, ...]
    requests_a_user: int
    max_model_len: int
    block_sizes: tuple[int, ...]


ON_A_GPU = Scale(
    requests=256,
    prompt_tokens=(100, 1024),
    output_tokens=(100, 512),
    users=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    requests_a_user=2,
    max_model_len=2048,
    block_sizes=(16, 32, 64),
)
ON_A_CPU = Scale(
    requests=16,
    prompt_tokens=(16, 64),
    output_tokens=(8, 32),
    users=(1, 2, 4, 8),
    requests_a_user=2,
    max_model_len=512,
    block_sizes=(32, 64, 128),
)
"""About a hundredth of the tokens: a CPU computes a few hundred a second."""


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """Which requests: `kind` is ``synthetic``, ``sharegpt``, ``azure`` or ``mooncake``."""

    kind: str = "synthetic"
    path: Path | None = None
    shared_prefix: int = 0
