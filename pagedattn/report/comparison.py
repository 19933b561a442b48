"""Bookkeeping beside a peer's: how many times faster each call is, and what the caches find."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pagedattn.report.summary import implementations_of
from pagedattn.report.tables import Table
from pagedattn.report.text import MISSING, clean, duration, plural, times

if TYPE_CHECKING:
    from pagedattn.report.rows import Row
    from pagedattn.report.summary import Case, Group, Summary


@dataclass(frozen=True, slots=True)
class HitRates:
    """What the prefix caches of one workload found, by implementation and size of the pool.

    `ideal` is the hit rate of a cache that forgets nothing, None if it is not known.
    """

    title: str
    ideal: float | None
    rows: dict[str, dict[int, Row]]

    @property
    def pools(self) -> list[int]:
        """The sizes of the pools in blocks, rising."""
        return sorted({pool for rows in self.rows.values() for pool in rows})


def comparison_tables(summary: Summary) -> list[Table]:
    """Make a table for each bookkeeping area that has a peer: a line for each case of both.

    Times are medians of a call. «a over b» is the median of b over that of a.
    """
    return [
        _comparison(group, group.peer) for group in summary.bookkeeping if group.peer is not None
    ]


def _comparison(group: Group, peer: str) -> Table:
    cases = group.compared
    names = [name for name in implementations_of(cases) if name != peer]
    is_split = any(case.rows[peer].hashing_us is not None for case in cases)
    hashing = [f"{peer}, hashing of it"] if is_split else []
    header = ["operation", "workload", "sequences", *names, peer, *hashing]
    header += [f"{name} over {peer}" for name in names]
    lines = []
    for case in cases:
        row = case.rows[peer]
        sequences = MISSING if row.num_sequences is None else str(row.num_sequences)
        line = [row.operation or MISSING, row.workload, sequences]
        line += [_median(case, name) for name in (*names, peer)]
        if is_split:
            line.append(MISSING if row.hashing_us is None else duration(row.hashing_us))
        lines.append(line + [times(case.speedup(name, peer)) for name in names])
    return Table(f"{group.title}, beside {peer}", header, lines, 2)


def _median(case: Case, name: str) -> str:
    return duration(case.rows[name].median_us) if name in case.rows else MISSING


def hit_rates(summary: Summary) -> list[HitRates]:
    """Collect the rows of prefix caches, those that were asked for the same blocks together."""
    found: dict[tuple[object, ...], dict[str, dict[int, Row]]] = {}
    for group in summary.bookkeeping:
        for case in group.cases:
            for name, row in case.rows.items():
                if row.hit_rate is None or not row.pool_blocks:
                    continue
                asked = (row.num_requests, row.num_lookup_blocks, row.block_size, row.device)
                found.setdefault(asked, {}).setdefault(name, {})[row.pool_blocks] = row
    return [_hit_rates(rows) for rows in found.values()]


def _hit_rates(rows: dict[str, dict[int, Row]]) -> HitRates:
    first = next(iter(next(iter(rows.values())).values()))
    parts = ["prefix cache hit rates"]
    if first.num_requests is not None:
        parts.append(f"{first.num_requests:,} requests")
    parts.append(f"{first.num_lookup_blocks:,} blocks")
    if first.block_size is not None:
        parts[-1] += f" of {plural(first.block_size, 'token')}"
    return HitRates(", ".join(parts), first.ideal_hit_rate, dict(sorted(rows.items())))


def hit_rate_tables(summary: Summary) -> list[Table]:
    """Make a table for each workload of prefix caches: a line for each size of the pool.

    Hit rates are shares of the blocks looked up; the ideal is that of a cache that forgets
    nothing.
    """
    return [_hit_rate_table(rates) for rates in hit_rates(summary)]


def _hit_rate_table(rates: HitRates) -> Table:
    names = list(rates.rows)
    header = ["pool blocks", *names, "ideal", *(f"{clean(name)} evicted" for name in names)]
    lines = []
    for pool in rates.pools:
        rows = [rates.rows[name].get(pool) for name in names]
        evicted = [row.num_evicted_blocks if row else None for row in rows]
        lines.append(
            [
                f"{pool:,}",
                *(share_text(row.hit_rate if row else None) for row in rows),
                share_text(rates.ideal),
                *(MISSING if count is None else f"{count:,}" for count in evicted),
            ]
        )
    return Table(rates.title, header, lines, 0)


def share_text(share: float | None) -> str:
    """Return a hit rate as a percentage with one decimal, or a dash for None."""
    return MISSING if share is None else f"{100 * share:.1f} %"
