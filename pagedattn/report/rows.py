"""One benchmark of a results file, checked: what was measured, how long it took, how good it is."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from pagedattn.report.text import clean
from pagedattn.report.values import (
    LARGEST,
    ResultsError,
    are_all_numbers,
    count_of,
    expect_number,
    expect_object,
    shown,
    text_of,
)

BOOKKEEPING_AREAS = ("block_manager", "page_table")
SERVING_AREA = "serving"
_AREA_ORDER = (
    *("attention", "shared_prefix", "kv_write", "kv_cache"),
    *BOOKKEEPING_AREAS,
    SERVING_AREA,
)
_DEVICE_ORDER = ("cuda", "cpu")
_KIND_ORDER = ("decode", "mixed", "prefill")
_LONGEST_SECONDS = 1e6

_TEXTS = ("kind", "operation", "length_distribution", "dtype", "model")
_COUNTS = (
    "batch",
    "context",
    "num_sequences",
    "num_query_heads",
    "num_kv_heads",
    "head_size",
    "block_size",
    "window",
    "alibi",
    "sinks",
    "rotation",
    "discarded_rounds",
    "pool_blocks",
    "num_requests",
    "num_lookup_blocks",
    "num_hit_blocks",
    "num_repeated_blocks",
    "num_evicted_blocks",
    "num_users",
    "peak_blocks",
    "expected_peak_blocks",
    "predicted_blocks",
    "predicted_pool_blocks",
    "compared_steps",
    "equal_steps",
)
_NUMBERS = (
    "soft_cap",
    "gb_per_s",
    "tflop_per_s",
    "share_of_bandwidth",
    "measured_read_gb_per_s",
    "limit_us",
    "error",
    "error_budget",
    "host_us",
    "batch_us",
    "hashing_us",
    "median_interval",
    "sm_clock_mhz",
    "requests_per_s",
    "prompt_tokens_per_s",
    "output_tokens_per_s",
    *(f"{what}_p{rank}_us" for what in ("first_token", "inter_token") for rank in (50, 90, 99)),
)
_AMOUNTS = (
    "bytes",
    "flops",
    "peak_memory_bytes",
    "device_bytes",
    "in_use_bytes",
    "weights_bytes",
    "kv_pool_bytes",
    "graphs_bytes",
    "predicted_weights_bytes",
    "predicted_kv_pool_bytes",
)
_SHARES = ("prefix_hit_rate", "last_block_waste")
_DIFFERENCES = ("plan_us",)  # of two times, which noise can bring below 0
_LIMITS: tuple[tuple[tuple[str, ...], dict[str, float]], ...] = (
    (_NUMBERS, {}),
    (_AMOUNTS, {"smallest": 1}),  # there is no part of a byte or of an operation
    (_SHARES, {"most": 1}),
    (_DIFFERENCES, {"least": -LARGEST}),
)


@dataclass(frozen=True, slots=True)
class PoolSample:
    """A serving engine's pool, `seconds` after the first request was sent.

    `expected` blocks are in use in this project's block manager, given the same requests; None
    where that is not known.
    """

    seconds: float
    blocks: float
    expected: float | None


@dataclass(frozen=True, slots=True)
class Row:
    """One case under one implementation; absent values are None, and text is one printable line.

    Times are microseconds of one launch or call, over `rounds` rounds. `batch` counts sequences
    and `context` the tokens of the longest one. `share_of_bandwidth` is a fraction of
    `measured_read_gb_per_s`, 0 to 1. `error` and `error_budget` share the unit that the benchmark
    chose. GB and TFLOP are powers of ten. Of a layer's options, `alibi` and `sinks` count the heads
    that have a slope and a sink.

    `discarded_rounds` more were timed while the clock was low and left out; `sm_clock_mhz` is that
    of the others. `median_interval` is half the width of the median's 95 % interval, as a fraction
    of the median. Launches went through `rotation` inputs in turn.

    `hashing_us` is the part of a median that hashing took, where it is a step of its own. A prefix
    cache of `pool_blocks` blocks was asked by `num_requests` requests for `num_lookup_blocks`, had
    `num_hit_blocks` and evicted `num_evicted_blocks`; one that forgets nothing would have had
    `num_repeated_blocks`.

    `samples_us` has the time of each round, where the file kept them.

    A serving engine ran `model` for `num_users` clients at a time; the row's times are those
    between two tokens of an answer, and `first_token_*` those from sending a request. It kept its
    memory as `*_bytes` say, in `pool_blocks` blocks; `predicted_*` are the calculator's.
    """

    area: str
    device: str
    implementation: str
    workload: str
    kind: str | None
    operation: str | None
    batch: int | None
    context: int | None
    num_sequences: int | None
    length_distribution: str | None
    num_query_heads: int | None
    num_kv_heads: int | None
    head_size: int | None
    block_size: int | None
    dtype: str | None
    window: int | None
    soft_cap: float | None
    alibi: int | None
    sinks: int | None
    median_us: float
    q1_us: float
    q3_us: float
    min_us: float
    max_us: float
    rounds: int
    discarded_rounds: int | None
    median_interval: float | None
    sm_clock_mhz: float | None
    rotation: int | None
    gb_per_s: float | None
    share_of_bandwidth: float | None
    measured_read_gb_per_s: float | None
    tflop_per_s: float | None
    limit_us: float | None
    error: float | None
    error_budget: float | None
    host_us: float | None
    batch_us: float | None
    plan_us: float | None
    hashing_us: float | None
    bytes: float | None
    flops: float | None
    peak_memory_bytes: float | None
    pool_blocks: int | None
    num_requests: int | None
    num_lookup_blocks: int | None
    num_hit_blocks: int | None
    num_repeated_blocks: int | None
    num_evicted_blocks: int | None
    model: str | None
    num_users: int | None
    requests_per_s: float | None
    prompt_tokens_per_s: float | None
    output_tokens_per_s: float | None
    first_token_p50_us: float | None
    first_token_p90_us: float | None
    first_token_p99_us: float | None
    inter_token_p50_us: float | None
    inter_token_p90_us: float | None
    inter_token_p99_us: float | None
    prefix_hit_rate: float | None
    last_block_waste: float | None
    device_bytes: float | None
    in_use_bytes: float | None
    weights_bytes: float | None
    kv_pool_bytes: float | None
    graphs_bytes: float | None
    predicted_weights_bytes: float | None
    predicted_kv_pool_bytes: float | None
    predicted_blocks: int | None
    predicted_pool_blocks: int | None
    peak_blocks: int | None
    expected_peak_blocks: int | None
    compared_steps: int | None
    equal_steps: int | None
    fullname: str
    file: str
    pool_over_time: tuple[PoolSample, ...] = ()
    samples_us: tuple[float, ...] = ()

    @property
    def is_bookkeeping(self) -> bool:
        """Whether the row is of the block manager or the page table, not of data on a device."""
        return self.area in BOOKKEEPING_AREAS

    @property
    def is_compute_bound(self) -> bool:
        """Whether the work has 100 operations a byte or more, so that GB/s say little of it."""
        if not self.bytes or not self.flops or self.tflop_per_s is None:
            return False
        return self.flops >= 100 * self.bytes

    @property
    def hit_rate(self) -> float | None:
        """The share of the blocks looked up that the prefix cache had, 0 to 1."""
        return _share(self.num_hit_blocks, self.num_lookup_blocks)

    @property
    def ideal_hit_rate(self) -> float | None:
        """The hit rate of a prefix cache that forgets nothing."""
        return _share(self.num_repeated_blocks, self.num_lookup_blocks)

    @property
    def sort_key(self) -> tuple[Any, ...]:
        """The order of tables: area, device, kind, size, name; CUDA before CPU."""
        return (
            _place(self.area, _AREA_ORDER),
            _place(self.device, _DEVICE_ORDER),
            _place(self.kind or "", _KIND_ORDER),
            self.operation or "",
            self.batch or 0,
            self.context or 0,
            self.num_sequences or 0,
            self.num_users or 0,
            self.pool_blocks or 0,
            self.workload,
            self.length_distribution or "",
            self.implementation,
            self.fullname,
            self.file,
        )


def _share(part: int | None, whole: int | None) -> float | None:
    return None if part is None or not whole else part / whole


def _place(name: str, order: tuple[str, ...]) -> tuple[int, str]:
    return (order.index(name) if name in order else len(order), name)


def _times_us(stats: dict[str, Any], what: str) -> dict[str, float]:
    names = ("min", "q1", "median", "q3", "max")
    seconds = {name: expect_number(stats.get(name), f"{what} stats.{name}") for name in names}
    if not 0 < seconds["median"] <= _LONGEST_SECONDS or seconds["max"] > _LONGEST_SECONDS:
        raise ResultsError(
            f"{what} stats must be times above 0 and up to {_LONGEST_SECONDS:g} seconds, "
            f"not a median of {seconds['median']:g} and a maximum of {seconds['max']:g}."
        )
    values = [seconds[name] for name in names]
    for i in range(len(names) - 1):
        low, high = values[i : i + 2]
        if low > high and not math.isclose(low, high, rel_tol=1e-9):
            raise ResultsError(
                f"{what} stats must have {names[i]} up to {names[i + 1]}, not {low:g} and {high:g}."
            )
    return {f"{name}_us": seconds[name] * 1e6 for name in names}


def parse_row(benchmark: Any, file: str, roofs: dict[str, float]) -> Row | None:
    """Make a row of one entry of a results file's ``benchmarks``.

    `roofs` is the file's measured read bandwidth in GB/s by device, for rows without their own.
    A row without `gb_per_s`, `tflop_per_s` or `share_of_bandwidth` gets them from `bytes`, `flops`
    and the median if they are known. Returns None for a row of another suite, one whose
    ``extra_info`` has no ``area``, ``implementation`` or ``workload`` that is text. Raises
    ResultsError for one of our rows that is broken.
    """
    benchmark = expect_object(benchmark, "each of benchmarks")
    extra = benchmark.get("extra_info")
    if not isinstance(extra, dict):
        return None
    names = {key: extra.get(key) for key in ("area", "implementation", "workload")}
    if not all(isinstance(name, str) and name.strip() for name in names.values()):
        return None
    fullname = text_of(benchmark.get("fullname"), "each fullname") or ""
    what = f"benchmark {clean(fullname)[:120]!r}:"
    stats = expect_object(benchmark.get("stats"), f"{what} stats")
    texts = {key: text_of(extra.get(key), what, key) for key in _TEXTS}
    counts = {key: count_of(extra.get(key), what, key) for key in _COUNTS}
    numbers = {
        key: None if extra.get(key) is None else expect_number(extra[key], what, key, **limits)
        for keys, limits in _LIMITS
        for key in keys
    }
    rounds = count_of(stats.get("rounds"), f"{what} stats.rounds")
    if not rounds:
        raise ResultsError(f"{what} stats.rounds must be 1 or more, not {rounds}.")
    device = text_of(extra.get("device"), f"{what} device") or "unknown"
    times = _times_us(stats, what)
    _derive(numbers, times["median_us"], roofs.get(device))
    values: dict[str, Any] = {key: clean(str(name)) for key, name in names.items()}
    values |= {"device": device, "rounds": rounds, "fullname": fullname, "file": file}
    values |= texts | counts | numbers | times
    values["samples_us"] = _samples_us(stats.get("data"), times["median_us"], what)
    values["pool_over_time"] = _pool_samples(extra.get("pool_over_time") or [], what)
    return Row(**values)


def _samples_us(data: Any, median_us: float, what: str) -> tuple[float, ...]:
    if data is None or data == []:
        return ()
    if not isinstance(data, list):
        raise ResultsError(f"{what} stats.data must be a list, not {shown(data)}.")
    if not are_all_numbers(data):
        for seconds in data:
            expect_number(seconds, f"{what} stats.data")
    samples = tuple(1e6 * seconds for seconds in data)
    median = statistics.median(samples)
    if not math.isclose(median, median_us, rel_tol=0.01):
        raise ResultsError(
            f"{what} stats.data must have the median of stats, {median_us / 1e6:g} seconds, "
            f"not {median / 1e6:g}."
        )
    return samples


def _pool_samples(entries: Any, what: str) -> tuple[PoolSample, ...]:
    if not isinstance(entries, list):
        raise ResultsError(f"{what} pool_over_time must be a list, not {shown(entries)}.")
    samples = []
    for entry in entries:
        if not isinstance(entry, list) or len(entry) != 3:
            raise ResultsError(f"{what} pool_over_time must hold lists of 3, not {shown(entry)}.")
        seconds, blocks = (expect_number(value, f"{what} pool_over_time") for value in entry[:2])
        expected = None
        if entry[2] is not None:
            expected = expect_number(entry[2], f"{what} pool_over_time")
        samples.append(PoolSample(seconds, blocks, expected))
    return tuple(samples)


def _derive(numbers: dict[str, float | None], median_us: float, roof: float | None) -> None:
    """Fill in what follows from other values: a byte in a microsecond is 1e-3 GB/s."""
    for rate, amount, scale in (("gb_per_s", "bytes", 1e-3), ("tflop_per_s", "flops", 1e-6)):
        total = numbers[amount]
        if numbers[rate] is None and total is not None:
            numbers[rate] = total / median_us * scale
    if numbers["measured_read_gb_per_s"] is None:
        numbers["measured_read_gb_per_s"] = roof
    rate_now, roof_now = numbers["gb_per_s"], numbers["measured_read_gb_per_s"]
    if numbers["share_of_bandwidth"] is None and rate_now is not None and roof_now:
        numbers["share_of_bandwidth"] = rate_now / roof_now
