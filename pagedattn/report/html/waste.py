"""Stacked bars of KV memory: slots that hold a token, and those that hold none.

Two sources. A serving engine's memory row says which share of the slots in its blocks was empty.
An attention row says which workload it ran: if this version's workload of that name has the same
sequences and the same number of operations, its lengths are known, and the rest is counting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from pagedattn.memory import num_blocks_for
from pagedattn.report.html.figure import DataTable, Entry, Figure, Panel, share_text
from pagedattn.report.html.svg import Chart
from pagedattn.report.serving import engines
from pagedattn.report.text import clean, cut, plural
from pagedattn.workloads import find_shape

if TYPE_CHECKING:
    from pagedattn.report.rows import Row
    from pagedattn.report.summary import Summary
    from pagedattn.workloads import AttentionShape

_ABOUT_ENGINES = (
    "Of an engine, the slots of its blocks in use, over the steps that were compared with this "
    "project's block manager; the rows say the share. "
)
_ABOUT_SHAPES = (
    "Of an attention workload, not measured but counted from the lengths of its sequences, which "
    "this version of pagedattn.workloads has: once in blocks, where only the end of a last block "
    "is empty, and once as a system would need it that reserves the longest sequence's length for "
    "each. "
)
_KINDS = ("token", "empty", "reserved")
_WORDS = ("holds a token", "empty end of a last block", "reserved, holds no token")


@dataclass(frozen=True, slots=True)
class Bar:
    """Slots by what they hold, and where the number is from."""

    name: str
    tokens: float
    empty: float
    reserved: float
    source: str

    @property
    def total(self) -> float:
        """All slots of the bar."""
        return self.tokens + self.empty + self.reserved

    @property
    def waste(self) -> float:
        """The share of the slots that holds no token."""
        return 1 - self.tokens / self.total


def draw_waste(summary: Summary) -> Figure:
    """Draw what engines' blocks held, and what this run's workloads need in blocks and without."""
    engine_bars = _engine_bars(summary)
    shapes = known_shapes(summary)
    counted = [bars_of(shape) for shape in shapes]
    wasteful = [pair for pair in counted if any(bar.waste for bar in pair)]
    bars = [*engine_bars, *(bar for pair in wasteful for bar in pair)]
    if not bars:
        reason = (
            "no row says what share of an engine's blocks was empty, and no workload of the run "
            "has sequences of unequal lengths or ends of blocks that are empty"
        )
        return Figure("waste", "KV memory that holds no token", reason=reason)
    about = _ABOUT_ENGINES * bool(engine_bars) + _ABOUT_SHAPES * bool(wasteful)
    rest = len(shapes) - len(wasteful)
    if wasteful and rest:
        about += f"In the other {plural(rest, 'workload')} every slot holds a token either way."
    says = " ".join(_says(bar) for bar in bars)
    legend = [
        Entry(Markup('<span class="swatch use-{}" aria-hidden="true"></span>').format(kind), word)
        for kind, word in zip(_KINDS, _WORDS, strict=True)
    ]
    panel = Panel("", _draw(bars, f"KV memory by what its slots hold. {says}").markup())
    title = "KV memory that holds no token"
    return Figure("waste", title, about.strip(), says, [panel], legend, [_table(bars)])


def _engine_bars(summary: Summary) -> list[Bar]:
    bars = []
    for engine in engines(summary):
        row = engine.memory
        if row is None or row.last_block_waste is None:
            continue
        slots = float((row.peak_blocks or 0) * (row.block_size or 0)) or 1.0
        empty = row.last_block_waste * slots
        name = f"{engine.implementation}, {engine.title}"
        bars.append(Bar(clean(name), slots - empty, empty, 0.0, "the engine's memory row"))
    return bars


def known_shapes(summary: Summary) -> list[AttentionShape]:
    """Return this version's shapes that rows of the run are of, in the order of the rows."""
    found: dict[str, AttentionShape] = {}
    for group in summary.data:
        for case in group.cases:
            try:
                shape = find_shape(case.first.workload)
            except ValueError:  # it is no attention, or of another version
                continue
            if all(_is_of(row, shape) for row in case.rows.values()):
                found[shape.name] = shape
    return list(found.values())


def _is_of(row: Row, shape: AttentionShape) -> bool:
    theirs = (row.area, row.batch, row.context, row.block_size, row.flops)
    ours = (shape.num_sequences, max(shape.kv_lengths), shape.block_size, float(shape.flops))
    return theirs == ("attention", *ours)


def bars_of(shape: AttentionShape) -> tuple[Bar, Bar]:
    """Count a workload's slots in blocks, and with the longest length for each sequence.

    A batch of 5 and 17 tokens in blocks of 16 needs 3 blocks, 48 slots: 26 are empty. With the
    longest for each it needs 34, of which 12 are empty.
    """
    tokens, longest = sum(shape.kv_lengths), max(shape.kv_lengths)
    size = shape.block_size
    slots = size * sum(num_blocks_for(length, size) for length in shape.kv_lengths)
    source = "counted from the workload's lengths"
    return (
        Bar(f"{shape.name}, in blocks of {size}", tokens, slots - tokens, 0, source),
        Bar(
            f"{shape.name}, the longest for each",
            *(tokens, 0, longest * shape.num_sequences - tokens),
            source,
        ),
    )


def _says(bar: Bar) -> str:
    return f"{bar.name}: {share_text(bar.waste)} of the slots hold no token."


def _draw(bars: list[Bar], alt: str) -> Chart:
    row = 38
    chart = Chart(
        430, row * len(bars) + 50, alt, left=14, right=88, top=2, bottom=48, reach=(0.8, 1.3)
    )
    scale = chart.x_scale(0, 1)
    chart.x_axis(scale, [0, 0.25, 0.5, 0.75, 1], lambda x: f"{100 * x:g} %", "share of the slots")
    for place, bar in enumerate(bars):
        y = chart.top + place * row
        chart.text(chart.left, y + 13, cut(bar.name, 56))
        begin = 0.0
        for kind, slots in zip(_KINDS, (bar.tokens, bar.empty, bar.reserved), strict=True):
            end = begin + slots / bar.total
            x = scale.at(begin)
            if slots:
                chart.box(x, y + 18, scale.at(end) - x, 16, f"use-{kind}", bar.name)
            begin = end
        chart.text(chart.right + 8, y + 30, f"{share_text(bar.waste)} empty")
    return chart


def _table(bars: list[Bar]) -> DataTable:
    lines = [
        [
            bar.name,
            bar.source,
            *(share_text(part / bar.total) for part in (bar.tokens, bar.empty, bar.reserved)),
            f"{bar.total:,.0f}",
        ]
        for bar in bars
    ]
    header = ["memory", "where the numbers are from", *_WORDS, "slots"]
    return DataTable("waste-data", "Slots by what they hold", header, lines, 2)
