"""The tests of one engine: throughput, a sweep over concurrent users, memory."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from pagedattn.memory import KVMemory
from pagedattn.serving.clients import Engine, LoadRun, run_clients
from pagedattn.serving.load import Load, sharegpt_load, synthetic_load, trace_load
from pagedattn.serving.measures import is_saturated
from pagedattn.serving.memory import EngineMemory, Gauges, MemorySample, MemoryWatch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pagedattn.config import ModelConfig
    from pagedattn.serving.settings import EngineSettings, LoadSettings, Scale

LEAST_REQUESTS = 8
WARM_UP = 2


class MeasuredEngine(Engine, Gauges, Protocol):
    """An engine that also says what it is."""

    settings: EngineSettings
    model: ModelConfig | None
    memory: EngineMemory
    vocab_size: int
    max_model_len: int

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""

    def reset_prefix_cache(self) -> None:
        """Forget all prompts, so that the next run finds none."""

    def prefix_hits(self) -> tuple[int, int]:
        """Prompt tokens looked up so far, and found."""


class Progress(Protocol):
    """Is told what is done, for a bar."""

    def __call__(self, what: str, done: int, total: int) -> None:
        """`done` of `total` requests of a part named `what`."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the calculator says of an engine's memory; bytes, None where the model is not known.

    Attributes:
        weights: of the model.
        kv_pool: what is left for the KV cache, if nothing but the weights took memory.
        blocks: that fit `kv_pool`.
        blocks_of_pool: that fit the pool which the engine says it has.

    """

    weights: int | None
    kv_pool: int | None
    blocks: int | None
    blocks_of_pool: int | None


@dataclass(slots=True)
class MemoryRun:
    """The memory test: what was said at the start, predicted, and seen while clients ran."""

    engine: EngineMemory
    predicted: Prediction
    run: LoadRun
    samples: list[MemorySample]

    @property
    def peak(self) -> MemorySample | None:
        """The sample with most blocks in use."""
        return max(self.samples, key=lambda sample: sample.blocks, default=None)

    @property
    def compared(self) -> list[MemorySample]:
        """Samples at which the block manager knows what is stored."""
        return [sample for sample in self.samples if sample.mirrored is not None]

    @property
    def largest_difference(self) -> int | None:
        """Most blocks that engine and block manager differ by, in the samples compared."""
        differences = [abs(s.blocks - (s.mirrored or 0)) for s in self.compared]
        return max(differences, default=None)


@dataclass(slots=True)
class ServingResult:
    """What was measured of one engine; parts that were not asked for are None or empty."""

    policy: str
    settings: EngineSettings
    load: Load
    throughput: LoadRun | None = None
    sweep: list[LoadRun] = field(default_factory=list)
    memory: MemoryRun | None = None
    hit_rate: float | None = None
    interrupted: bool = False


def make_load(
    engine: MeasuredEngine, settings: LoadSettings, scale: Scale, seed: int, num_requests: int
) -> Load:
    """Make the requests; raises LoadError or EngineError."""
    common = {"max_model_len": engine.max_model_len}
    if settings.path is None:
        return synthetic_load(
            num_requests,
            prompt_tokens=scale.prompt_tokens,
            output_tokens=scale.output_tokens,
            vocab_size=engine.vocab_size,
            shared_prefix=settings.shared_prefix,
            seed=seed,
            **common,
        )
    if settings.kind == "sharegpt":
        return sharegpt_load(
            settings.path,
            num_requests,
            encode=engine.encode,
            max_output_tokens=scale.output_tokens[1],
            **common,
        )
    return trace_load(
        settings.path,
        num_requests,
        kind=settings.kind,
        vocab_size=engine.vocab_size,
        max_output_tokens=scale.output_tokens[1],
        seed=seed,
        **common,
    )


def predict(engine: MeasuredEngine) -> Prediction:
    """Calculate what the engine's memory should be used for."""
    said, settings = engine.memory, engine.settings
    if engine.model is None:
        return Prediction(None, None, None, None)
    memory = KVMemory(
        replace(engine.model, dtype=settings.dtype or engine.model.dtype),
        said.block_size,
        tensor_parallel_size=settings.tensor_parallel_size,
    )
    weights, pool = memory.weight_bytes, None
    share = settings.gpu_memory_utilization
    if said.device_bytes is not None and share is not None and weights is not None:
        pool = max(0, int(share * said.device_bytes) - weights)
    return Prediction(
        weights,
        pool,
        None if pool is None else memory.num_blocks_in(pool),
        None if said.kv_pool is None else memory.num_blocks_in(said.kv_pool),
    )


def measure(
    engine: MeasuredEngine,
    policy: str,
    tests: Sequence[str],
    load: LoadSettings,
    scale: Scale,
    seed: int,
    progress: Progress,
    clock: Callable[[], float] = time.perf_counter,
) -> ServingResult:
    """Run the tests that were asked for; Ctrl-C ends them and keeps what was measured.

    Each run begins with an empty prefix cache, so that no run finds the prompts of the one before.
    """
    most = max(scale.requests, scale.requests_a_user * max(scale.users), LEAST_REQUESTS)
    requests = make_load(engine, load, scale, seed, most)
    result = ServingResult(
        policy, engine.settings, replace(requests, requests=requests.requests[: scale.requests])
    )

    def run(what: str, count: int, users: int, watch: MemoryWatch | None = None) -> LoadRun:
        engine.reset_prefix_cache()
        chosen = requests.requests[:count]
        total = len(chosen)
        done = run_clients(
            engine,
            chosen,
            min(users, total),
            clock=clock,
            progress=lambda completed: progress(what, completed, total),
            watch=watch,
        )
        result.interrupted |= done.interrupted
        return done

    if run("warm-up", WARM_UP, WARM_UP).interrupted:
        return result
    if "throughput" in tests:
        before = engine.prefix_hits()
        result.throughput = run("throughput", scale.requests, scale.requests)
        lookups, hits = (b - a for a, b in zip(before, engine.prefix_hits(), strict=True))
        result.hit_rate = hits / lookups if lookups else None
    if "memory" in tests and not result.interrupted:
        watch = MemoryWatch.of(engine, engine.memory, prefix_caching=engine.settings.prefix_caching)
        seen = run("memory", scale.requests, scale.requests, watch)
        result.memory = MemoryRun(engine.memory, predict(engine), seen, watch.samples)
    if "scaling" in tests and not result.interrupted:
        for users in scale.users:
            count = max(LEAST_REQUESTS, scale.requests_a_user * users)
            result.sweep.append(run(f"{users} users", count, users))
            if result.interrupted or is_saturated(result.sweep):
                break
    return result
