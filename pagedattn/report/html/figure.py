"""What a section of the page holds: tables, and figures with their sentence and their data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pagedattn.report.html.svg import key
from pagedattn.report.plots import num_drawn
from pagedattn.report.text import MISSING, clean, cut

if TYPE_CHECKING:
    from collections.abc import Iterable

    from markupsafe import Markup

    from pagedattn.report.style import Look
    from pagedattn.report.summary import Group
    from pagedattn.report.tables import Table

MOST_STATIC = 25
"""Lines of a table that are in the page itself; more are shown a page at a time."""


@dataclass(frozen=True, slots=True)
class DataTable:
    """A table that a reader can sort and filter; `about` says what its columns mean.

    All lines are in the page as JSON if there are more than `MOST_STATIC`, or it `is_tool`: then it
    has a box to filter it and buttons to sort it.
    """

    identity: str
    title: str
    header: list[str]
    lines: list[list[str]]
    first_number: int
    about: str = ""
    tool: bool = False
    last_number: int | None = None

    @property
    def kinds(self) -> list[str]:
        """How each column is set: numbers to the right, from `first_number` to `last_number`."""
        last = len(self.header) if self.last_number is None else self.last_number
        places = range(len(self.header))
        return ["number" if self.first_number <= i < last else "text" for i in places]

    @property
    def is_tool(self) -> bool:
        """Whether it has controls."""
        return self.tool or len(self.lines) > MOST_STATIC

    @property
    def shown(self) -> list[list[str]]:
        """The lines that are seen before anything is pressed."""
        return self.lines[:MOST_STATIC] if self.is_tool else self.lines

    @property
    def content(self) -> dict[str, object]:
        """What the page's script gets."""
        lines = [
            [cell if cell.isprintable() else clean(cell) for cell in line] for line in self.lines
        ]
        return {"kinds": self.kinds, "page": MOST_STATIC, "lines": lines}

    def without_empty_columns(self) -> DataTable:
        """Return the table without the columns of numbers that no line has."""
        kept = [
            place
            for place, kind in enumerate(self.kinds)
            if kind == "text" or any(line[place] != MISSING for line in self.lines)
        ]
        dropped = len(self.header) - len(kept)
        return replace(
            self,
            header=[self.header[place] for place in kept],
            lines=[[line[place] for place in kept] for line in self.lines],
            last_number=None if self.last_number is None else self.last_number - dropped,
        )

    @classmethod
    def of(cls, table: Table, identity: str, *, about: str = "", tool: bool = False) -> DataTable:
        """Make one of a report's tables."""
        lines = [[clean(cell) for cell in line] for line in table.lines]
        header = [clean(name) for name in table.header]
        title = clean(table.title)
        return cls(identity, title, header, lines, table.first_number, about, tool)


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture of a figure; `title` stands above it."""

    title: str
    picture: Markup


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of a legend: a mark and what it stands for."""

    mark: Markup
    text: str


@dataclass(frozen=True, slots=True)
class Figure:
    """A plot of the page, or `reason` why the run has nothing to draw.

    `says` is a sentence or two with what is seen in numbers; `data` the numbers drawn.
    """

    identity: str
    title: str
    about: str = ""
    says: str = ""
    panels: list[Panel] = field(default_factory=list)
    legend: list[Entry] = field(default_factory=list)
    data: list[DataTable] = field(default_factory=list)
    reason: str | None = None
    wide: bool = True
    chooser: dict[str, object] | None = None


def legend_of(looks: dict[str, Look], names: Iterable[str]) -> list[Entry]:
    """Make a legend of implementations."""
    return [Entry(key(looks[name]), cut(name, 48)) for name in names]


def left_out(groups: Iterable[Group]) -> str:
    """Say of which groups only the first cases are drawn, or nothing."""
    named = ", ".join(
        f"{group.title}: the first {num_drawn(group)} of {len(group.cases):,}"
        for group in groups
        if num_drawn(group) < len(group.cases)
    )
    return f" Drawn of {named}." if named else ""


def share_text(share: float | None) -> str:
    """Return a fraction as a percentage that keeps a digit below 10 %, or a dash for None."""
    if share is None:
        return MISSING
    return f"{100 * share:.1f} %" if 0 < share < 0.1 else f"{100 * share:.0f} %"
