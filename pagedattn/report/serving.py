"""Rows of serving engines: throughput, a sweep over users, memory, as tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pagedattn.report.tables import Table
from pagedattn.report.text import MISSING, clean, duration, number, percent, plural

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pagedattn.report.rows import Row
    from pagedattn.report.summary import Summary

KNEE = 0.9
_GIB = 2**30
_RATES = ["requests/s", "tokens/s in", "out", "total"]
_WAITS = ["first token p50", "p90", "p99", "between tokens p50", "p90", "p99"]


@dataclass(frozen=True, slots=True)
class Engine:
    """What one engine did with one model and load; `title` names the two."""

    title: str
    implementation: str
    throughput: Row | None
    sweep: tuple[Row, ...]
    memory: Row | None

    @property
    def knee(self) -> Row | None:
        """The fewest users that get 90 % of the sweep's highest output tokens/s.

        More wait longer for hardly more tokens. None if the last step of the sweep is needed for
        that: it ended before the knee.
        """
        rates = [row.output_tokens_per_s or 0.0 for row in self.sweep]
        enough = KNEE * max(rates, default=0.0)
        before_last = zip(self.sweep[:-1], rates, strict=False)
        return next((row for row, rate in before_last if rate >= enough > 0), None)


def engines(summary: Summary) -> list[Engine]:
    """Put the rows of each engine together, in the order of the rows."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in summary.serving:
        key = (row.model or "", row.workload, row.implementation)
        found.setdefault(key, []).append(row)
    return [_engine(rows) for rows in found.values()]


def _engine(rows: list[Row]) -> Engine:
    first = rows[0]
    by_name = {row.operation: row for row in rows}
    sweep = sorted(
        (row for row in rows if row.operation == "users"), key=lambda row: row.num_users or 0
    )
    title = ", ".join(clean(name) for name in (first.model or "", first.workload) if name)
    return Engine(
        f"{title} on {clean(first.device)}",
        first.implementation,
        by_name.get("throughput"),
        tuple(sweep),
        by_name.get("memory"),
    )


def serving_tables(summary: Summary) -> list[Table]:
    """Make a table for each model and load: all requests at once, by users, and memory."""
    tables = []
    by_title: dict[str, list[Engine]] = {}
    for engine in engines(summary):
        by_title.setdefault(engine.title, []).append(engine)
    for title, group in by_title.items():
        measured = [engine for engine in group if engine.throughput is not None]
        if measured:
            tables.append(_throughput(title, measured))
        tables += [_sweep(engine) for engine in group if engine.sweep]
        tables += [_memory(engine, engine.memory) for engine in group if engine.memory is not None]
    return tables


def _rates(row: Row) -> list[str]:
    tokens = (row.prompt_tokens_per_s or 0.0) + (row.output_tokens_per_s or 0.0)
    rates = (row.requests_per_s, row.prompt_tokens_per_s, row.output_tokens_per_s, tokens)
    return [number(rate) for rate in rates]


def _waits(row: Row) -> list[str]:
    values: Iterable[float | None] = (
        *(row.first_token_p50_us, row.first_token_p90_us, row.first_token_p99_us),
        *(row.inter_token_p50_us, row.inter_token_p90_us, row.inter_token_p99_us),
    )
    return [MISSING if value is None else duration(value) for value in values]


def _throughput(title: str, group: list[Engine]) -> Table:
    rows = [engine.throughput for engine in group if engine.throughput is not None]
    count = max(row.num_requests or 0 for row in rows)
    lines = [
        [row.implementation, *_rates(row), *_waits(row), percent(row.prefix_hit_rate)]
        for row in rows
    ]
    header = ["engine", *_RATES, *_WAITS, "prefix hits"]
    return Table(f"{title}: {plural(count, 'request')} at once", header, lines, 1)


def _sweep(engine: Engine) -> Table:
    lines = [
        [f"{row.num_users}{' (knee)' if row is engine.knee else ''}", *_rates(row), *_waits(row)]
        for row in engine.sweep
    ]
    ended = "" if engine.knee is not None else "; the sweep ends before the knee"
    title = f"{engine.title}: concurrent users, {engine.implementation}{ended}"
    return Table(title, ["users", *_RATES, *_WAITS], lines, 0)


def _memory(engine: Engine, row: Row) -> Table:
    lines = [
        ["weights", *_bytes(row.weights_bytes, row.predicted_weights_bytes)],
        ["KV pool", *_bytes(row.kv_pool_bytes, row.predicted_kv_pool_bytes)],
        ["blocks in that pool", *_counts(row.pool_blocks, row.predicted_pool_blocks)],
        ["blocks, from the device's memory", *_counts(row.pool_blocks, row.predicted_blocks)],
        ["CUDA graphs", *_bytes(row.graphs_bytes, None)],
        ["device, in use after the start", *_bytes(row.in_use_bytes, None)],
        ["most blocks in use", *_counts(row.peak_blocks, row.expected_peak_blocks)],
    ]
    if row.compared_steps:
        equal = f"{row.equal_steps} of {row.compared_steps}"
        lines.append(["steps with equal blocks in use", equal, equal, MISSING])
    if row.last_block_waste is not None:
        waste = f"{100 * row.last_block_waste:.1f} %"
        lines.append(["waste, all of it in last blocks", MISSING, waste, MISSING])
    shown = [line for line in lines if any(cell != MISSING for cell in line[1:])]
    title = f"{engine.title}: memory, {engine.implementation}"
    return Table(title, ["what", "the engine", "pagedattn", "difference"], shown, 1)


def _bytes(said: float | None, predicted: float | None) -> list[str]:
    texts = [MISSING if size is None else f"{size / _GIB:.3f} GiB" for size in (said, predicted)]
    return [*texts, _difference(said, predicted)]


def _counts(said: int | None, predicted: int | None) -> list[str]:
    texts = [MISSING if count is None else f"{count:,}" for count in (said, predicted)]
    return [*texts, _difference(said, predicted)]


def _difference(said: float | None, predicted: float | None) -> str:
    """How far the prediction is from what the engine says."""
    if said is None or predicted is None or not said:
        return MISSING
    return f"{100 * (predicted - said) / said:+.2f} %"
