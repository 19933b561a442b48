"""What a run says: its cases, the baseline, the best implementation of each case."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pagedattn.report.rows import BOOKKEEPING_AREAS, SERVING_AREA, Row
from pagedattn.report.text import clean, plural
from pagedattn.report.values import ResultsError

if TYPE_CHECKING:
    from collections.abc import Iterable

_BASELINES = ("sdpa_contiguous", "torch")
_BOOKKEEPING_PEERS = ("vllm",)
_AREA_TITLES = {
    "attention": "attention",
    "shared_prefix": "shared prefix",
    "kv_write": "KV write",
    "kv_cache": "KV cache",
    "block_manager": "block manager",
    "page_table": "page table",
}


@dataclass(frozen=True, slots=True)
class Case:
    """The same work under one or more implementations, by name in alphabetical order."""

    label: str
    rows: dict[str, Row]

    @property
    def first(self) -> Row:
        """Any of its rows, for what they share."""
        return next(iter(self.rows.values()))

    @property
    def best(self) -> Row:
        """The row with the smallest median, the first by name among equal ones."""
        return min(self.rows.values(), key=lambda row: (row.median_us, row.implementation))

    def speedup(self, implementation: str, baseline: str) -> float | None:
        """Return the baseline's median over the implementation's; None if one is absent."""
        if implementation not in self.rows or baseline not in self.rows:
            return None
        return self.rows[baseline].median_us / self.rows[implementation].median_us


@dataclass(frozen=True, slots=True)
class Group:
    """The cases of one area on one device, in the order of tables."""

    title: str
    area: str
    device: str
    cases: tuple[Case, ...]

    @property
    def implementations(self) -> list[str]:
        """The implementations of its cases, by name."""
        return implementations_of(self.cases)

    @property
    def peer(self) -> str | None:
        """The other system that bookkeeping is measured beside; None for data or without one."""
        if self.area not in BOOKKEEPING_AREAS:
            return None
        beside = [
            name
            for name in _BOOKKEEPING_PEERS
            if any(name in case.rows and len(case.rows) > 1 for case in self.cases)
        ]
        return next(iter(beside), None)

    @property
    def compared(self) -> list[Case]:
        """The cases that have the peer and another implementation."""
        return [case for case in self.cases if self.peer in case.rows and len(case.rows) > 1]


@dataclass(frozen=True, slots=True)
class Summary:
    """A run's groups; `baseline` is None if the run compares nothing; `serving` are engines."""

    data: tuple[Group, ...]
    bookkeeping: tuple[Group, ...]
    baseline: str | None
    serving: tuple[Row, ...] = ()

    @property
    def data_cases(self) -> list[Case]:
        """The cases that move data on a device: all areas but bookkeeping."""
        return [case for group in self.data for case in group.cases]

    @property
    def implementations(self) -> list[str]:
        """All implementations of the run, by name."""
        cases = (case for group in (*self.data, *self.bookkeeping) for case in group.cases)
        return sorted({*implementations_of(cases), *(row.implementation for row in self.serving)})


def implementations_of(cases: Iterable[Case]) -> list[str]:
    """Return the names of the implementations of these cases, sorted."""
    return sorted({name for case in cases for name in case.rows})


def summarise(rows: tuple[Row, ...], baseline: str | None = None) -> Summary:
    """Group sorted rows into cases, and choose the baseline unless it is named.

    The choice is ``sdpa_contiguous`` if more than half of the data workloads have it, else
    ``torch`` likewise, else the implementation that most of them have. Raises ResultsError for a
    baseline that the run does not have.
    """
    serving = tuple(row for row in rows if row.area == SERVING_AREA)
    groups = _groups(tuple(row for row in rows if row.area != SERVING_AREA))
    bookkeeping = tuple(group for group in groups if group.cases[0].first.is_bookkeeping)
    data = tuple(group for group in groups if not group.cases[0].first.is_bookkeeping)
    cases = [case for group in data for case in group.cases]
    known = implementations_of(cases) or implementations_of(
        case for group in bookkeeping for case in group.cases
    )
    if baseline is None:
        baseline = _choose_baseline(cases)
    elif baseline not in known:
        names = ", ".join(clean(name) for name in known)
        raise ResultsError(
            f"The baseline must be an implementation of this run, one of {names}, "
            f"not {clean(baseline)!r}."
        )
    return Summary(data, bookkeeping, baseline, serving)


def _choose_baseline(cases: list[Case]) -> str | None:
    counts = {name: sum(name in case.rows for case in cases) for name in implementations_of(cases)}
    for name in _BASELINES:
        if 2 * counts.get(name, 0) > len(cases):
            return name
    return max(counts, key=lambda name: counts[name], default=None)


def _groups(rows: tuple[Row, ...]) -> list[Group]:
    """Put rows of the same work together.

    A second row of one implementation for the same work makes a second case, numbered.
    """
    by_group: dict[tuple[str, str], dict[tuple[object, ...], list[dict[str, Row]]]] = {}
    taken: Counter[tuple[object, ...]] = Counter()
    for row in rows:
        cases = by_group.setdefault((row.area, row.device), {})
        key = (row.workload, row.operation, row.num_sequences, row.length_distribution)
        twins = cases.setdefault(key, [])
        same = (row.area, row.device, key, row.implementation)
        if taken[same] == len(twins):
            twins.append({})
        twins[taken[same]][row.implementation] = row
        taken[same] += 1
    return [_group(area, device, list(work.values())) for (area, device), work in by_group.items()]


def _group(area: str, device: str, work: list[list[dict[str, Row]]]) -> Group:
    """Name a group and its cases; what all cases of bookkeeping share is said in the title."""
    names = [_names(next(iter(twins[0].values()))) for twins in work]
    common: list[str] = []
    if area in BOOKKEEPING_AREAS and len(names) > 1:
        common = [name for name in names[0][1:] if all(name in other[1:] for other in names)]
    title = ", ".join([f"{_AREA_TITLES.get(area, clean(area))} on {clean(device)}", *common])
    cases = [
        Case(
            " · ".join(name for name in parts if name not in common)
            + (f" #{place}" if place > 1 else ""),
            dict(sorted(twin.items())),
        )
        for parts, twins in zip(names, work, strict=True)
        for place, twin in enumerate(twins, start=1)
    ]
    return Group(title, area, device, tuple(cases))


def _names(row: Row) -> list[str]:
    """Return what names a row's case, the operation first if it has one."""
    names = [row.operation or "", row.workload]
    if row.is_bookkeeping:
        if row.num_sequences is not None:
            names.append(plural(row.num_sequences, "sequence"))
        names.append(row.length_distribution or "")
    return list(dict.fromkeys(clean(name) for name in names if clean(name)))


def shared(case: Case, name: str) -> object:
    """Return what the case's rows say of a column, of the first row that says it, or None."""
    values = (getattr(row, name) for row in case.rows.values())
    return next((value for value in values if value is not None), None)
