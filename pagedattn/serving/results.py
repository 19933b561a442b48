"""Results in the shape of pytest-benchmark's files, which ``tools/plot.py`` reads."""

from __future__ import annotations

import datetime
import statistics
import subprocess
from typing import TYPE_CHECKING, Any

import numpy as np

from pagedattn.benchmarking import describe_machine
from pagedattn.serving.measures import percentiles

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pagedattn.serving.benchmark import MemoryRun, ServingResult
    from pagedattn.serving.clients import LoadRun

POOL_SAMPLES = 300
_VERSION = "5.1.0"


def as_results(results: Sequence[ServingResult], model: str, device: str) -> dict[str, Any]:
    """Return the whole file: a benchmark for each run that received anything.

    Args:
        results: of one or several engines.
        model: its name for readers.
        device: ``cuda`` or ``cpu``.

    """
    benchmarks = []
    for result in results:
        for operation, run in _runs(result):
            if not run.output_tokens:
                continue
            row = _benchmark(result, operation, run, model, device)
            benchmarks.append(row)
    return {
        "machine_info": {"pagedattn": describe_machine() | {"measured": {}}},
        "commit_info": _commit(),
        "benchmarks": benchmarks,
        "datetime": datetime.datetime.now(datetime.UTC).isoformat(),
        "version": _VERSION,
    }


def _runs(result: ServingResult) -> list[tuple[str, LoadRun]]:
    runs = [] if result.throughput is None else [("throughput", result.throughput)]
    runs += [("users", run) for run in result.sweep]
    return runs if result.memory is None else [*runs, ("memory", result.memory.run)]


def _benchmark(
    result: ServingResult, operation: str, run: LoadRun, model: str, device: str
) -> dict[str, Any]:
    engine = f"vllm, {result.policy}" if result.policy else "vllm"
    name = f"serving[{model}-{result.load.name}-{engine}-{operation}-{run.users}]"
    extra: dict[str, Any] = {
        "area": "serving",
        "implementation": engine,
        "workload": f"{result.load.name}: {result.load.note}",
        "operation": operation,
        "device": device,
        "model": model,
        "num_users": run.users,
        "num_requests": run.completed,
        "requests_per_s": run.per_second(run.completed),
        "prompt_tokens_per_s": run.per_second(run.prompt_tokens),
        "output_tokens_per_s": run.per_second(run.output_tokens),
        "interrupted": run.interrupted,
    }
    for what, values in (("first_token", run.first_token_s), ("inter_token", run.inter_token_s)):
        for rank, seconds in (percentiles(values) or {}).items():
            extra[f"{what}_p{rank}_us"] = 1e6 * seconds
    if operation == "throughput" and result.hit_rate is not None:
        extra["prefix_hit_rate"] = result.hit_rate
    if operation == "memory" and result.memory is not None:
        extra |= _memory(result.memory)
    samples = run.inter_token_s or run.first_token_s
    return {
        "group": "serving",
        "name": name,
        "fullname": f"tools/vllm_real_benchmark.py::{name}",
        "params": None,
        "param": None,
        "extra_info": extra,
        "options": {},
        "stats": _stats(samples),
    }


def _memory(memory: MemoryRun) -> dict[str, Any]:
    said, predicted, peak = memory.engine, memory.predicted, memory.peak
    compared = memory.compared
    slots = said.block_size * sum(sample.mirrored or 0 for sample in compared)
    row: dict[str, Any] = {
        "block_size": said.block_size,
        "pool_blocks": said.num_blocks,
        "device_bytes": said.device_bytes,
        "in_use_bytes": said.in_use,
        "weights_bytes": said.weights,
        "kv_pool_bytes": said.kv_pool,
        "graphs_bytes": None if said.graphs is None else max(0, said.graphs),
        "predicted_weights_bytes": predicted.weights,
        "predicted_kv_pool_bytes": predicted.kv_pool,
        "predicted_blocks": predicted.blocks,
        "predicted_pool_blocks": predicted.blocks_of_pool,
        "compared_steps": len(compared),
        "equal_steps": sum(sample.blocks == sample.mirrored for sample in compared),
        "pool_over_time": _thinned(memory),
    }
    if peak is not None:
        row["peak_blocks"] = peak.blocks
        row["expected_peak_blocks"] = peak.mirrored
    if slots:
        row["last_block_waste"] = sum(sample.empty_slots or 0 for sample in compared) / slots
    return row


def _thinned(memory: MemoryRun) -> list[list[float | None]]:
    """At most so many samples, evenly over the steps, the last one among them."""
    count = len(memory.samples)
    chosen = np.unique(np.linspace(0, count - 1, min(count, POOL_SAMPLES)).astype(int))
    samples = [memory.samples[i] for i in chosen.tolist()]
    return [[sample.seconds, sample.blocks, sample.mirrored] for sample in samples]


def _stats(samples: Sequence[float]) -> dict[str, Any]:
    q1, median, q3 = np.percentile(np.asarray(samples), (25, 50, 75)).tolist()
    return {
        "min": min(samples),
        "max": max(samples),
        "mean": statistics.fmean(samples),
        "stddev": statistics.pstdev(samples),
        "q1": q1,
        "median": max(median, 1e-9),
        "q3": q3,
        "iqr": q3 - q1,
        "rounds": len(samples),
        "iterations": 1,
    }


def _commit() -> dict[str, Any]:
    """The commit that this was run from, as far as git knows one."""

    def git(*words: str) -> str | None:
        try:
            answer = subprocess.run(
                ["git", *words], capture_output=True, text=True, check=True, timeout=10
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return answer.stdout.strip()

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return {"id": "unversioned", "project": "pagedattn"}
    return {"id": commit, "dirty": bool(git("status", "--porcelain")), "project": "pagedattn"}
