"""Plain SVG: axes, marks and lines; colours are the page's classes, text is escaped here.

Classes ``s0`` to ``s7`` are the implementations' colours, in the order of `style.COLOURS`.
"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from pagedattn.report.style import COLOURS, MARKERS
from pagedattn.report.text import clean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pagedattn.report.style import Look

LETTER = 7.0
"""About the mean width of a letter of the 11.5 pixels that labels have."""


def esc(text: str) -> str:
    """Return text from a file so that SVG and HTML show it as it is, in attributes too."""
    return html.escape(clean(text), quote=True)


def px(value: float) -> str:
    """Return a length with one decimal, and without one that is zero.

    >>> px(12.04), px(3.25), px(-0.01)
    ('12', '3.2', '0')
    """
    return f"{value:z.1f}".removesuffix(".0")


@dataclass(frozen=True, slots=True)
class Scale:
    """A range of values and the pixels that it is drawn over."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Return the pixel of a value, kept inside of the range."""
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = (value - low) / (high - low) if high > low else 0.5
        return self.begin + share * (self.end - self.begin)


def colour_of(look: Look) -> str:
    """Return the class of an implementation's colour."""
    return f"s{COLOURS.index(look.colour)}"


class Chart:
    """A picture of which the frame starts `left` and `top` pixels from its corner."""

    def __init__(
        self,
        width: float,
        height: float,
        alt: str,
        *,
        left: float = 70,
        right: float = 16,
        top: float = 12,
        bottom: float = 44,
        reach: tuple[float, float] = (0.72, 1.0),
    ) -> None:
        self.alt = clean(alt)
        # how far the page may scale it, before its letters become too small or too large
        self.narrowest, self.widest = reach[0] * width, reach[1] * width
        self._size = (width, height)
        self.left, self.right = left, width - right
        self.top, self.bottom = top, height - bottom
        self._parts: list[str] = []

    def x_scale(self, low: float, high: float, *, log: bool = False) -> Scale:
        """Lay a range of values along the frame's width."""
        return Scale(low, high, self.left, self.right, log)

    def y_scale(self, low: float, high: float, *, log: bool = False) -> Scale:
        """Lay a range of values along the frame's height, rising."""
        return Scale(low, high, self.bottom, self.top, log)

    def x_axis(
        self, scale: Scale, ticks: Iterable[float], say: Callable[[float], str], title: str
    ) -> None:
        """Draw the lower edge, with a line up and a word for each tick."""
        for tick in ticks:
            x = scale.at(tick)
            self.line([(x, self.top), (x, self.bottom)], "grid")
            self.text(x, self.bottom + 16, say(tick), anchor="middle")
        self.line([(self.left, self.bottom), (self.right, self.bottom)], "axis")
        if title:
            middle = (self.left + self.right) / 2
            self.text(middle, self.bottom + 35, title, anchor="middle", kind="label")

    def y_axis(
        self, scale: Scale, ticks: Iterable[float], say: Callable[[float], str], title: str
    ) -> None:
        """Draw the left edge, with a line across and a word for each tick."""
        for tick in ticks:
            y = scale.at(tick)
            self.line([(self.left, y), (self.right, y)], "grid")
            self.text(self.left - 7, y + 4, say(tick), anchor="end")
        self.line([(self.left, self.top), (self.left, self.bottom)], "axis")
        if title:
            middle = (self.top + self.bottom) / 2
            self._parts.append(
                f'<text class="label" text-anchor="middle" '
                f'transform="translate(14 {px(middle)}) rotate(-90)">{esc(title)}</text>'
            )

    def text(
        self, x: float, y: float, text: str, *, anchor: str = "start", kind: str = "tick"
    ) -> None:
        """Write a line of text whose baseline is at `y`."""
        self._parts.append(
            f'<text class="{kind}" x="{px(x)}" y="{px(y)}" text-anchor="{anchor}">'
            f"{esc(text)}</text>"
        )

    def line(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """Join points by straight lines."""
        if len(points) > 1:
            path = " ".join(f"{px(x)},{px(y)}" for x, y in points)
            self._parts.append(f'<polyline class="{kind}" points="{path}"/>')

    def box(
        self, x: float, y: float, width: float, height: float, kind: str, title: str = ""
    ) -> None:
        """Draw a filled rectangle; `title` is what a mouse over it shows."""
        place = f'x="{px(x)}" y="{px(y)}" width="{px(max(0.0, width))}" height="{px(height)}"'
        self._parts.append(f'<rect class="{kind}" {place}>{_title(title)}</rect>')

    def mark(
        self, x: float, y: float, look: Look, *, hollow: bool = False, title: str = ""
    ) -> None:
        """Draw an implementation's marker; `title` is what a mouse over it shows."""
        kind = f"mark {colour_of(look)}{' hollow' if hollow else ''}"
        place = f'transform="translate({px(x)} {px(y)})"'
        path = MARKS[MARKERS.index(look.marker)]
        self._parts.append(f'<path class="{kind}" {place} d="{path}">{_title(title)}</path>')

    def markup(self, *, identity: str = "") -> Markup:
        """Return the picture, its sentence being what a screen reader says of it."""
        width, height = self._size
        name = f' id="{esc(identity)}"' if identity else ""
        return Markup(  # all text went through esc
            f'<svg{name} role="img" aria-label="{esc(self.alt)}" '
            f'viewBox="0 0 {px(width)} {px(height)}" width="{px(width)}" height="{px(height)}" '
            f'style="max-width:{px(self.widest)}px;min-width:{px(self.narrowest)}px">'
            f"{''.join(self._parts)}</svg>"
        )


def _title(text: str) -> str:
    return f"<title>{esc(text)}</title>" if text else ""


MARKS = (
    "M4.5 0A4.5 4.5 0 1 1-4.5 0A4.5 4.5 0 1 1 4.5 0Z",  # o
    "M-4-4H4V4H-4Z",  # s
    "M0-5.5L5.5 0L0 5.5L-5.5 0Z",  # D
    "M0-5.2L5 4H-5Z",  # ^
    "M0 5.2L-5-4H5Z",  # v
    "M-1.8-5H1.8V-1.8H5V1.8H1.8V5H-1.8V1.8H-5V-1.8H-1.8Z",  # P
    "M0-2.4L2.6-5L5-2.6L2.4 0L5 2.6L2.6 5L0 2.4L-2.6 5L-5 2.6L-2.4 0L-5-2.6L-2.6-5Z",  # X
    "M0-6L1.6-2H6L2.5 1L3.8 5.4L0 2.8L-3.8 5.4L-2.5 1L-6-2H-1.6Z",  # *
)
"""A path of about 10 pixels for each of `style.MARKERS`, around the origin."""


def key(look: Look) -> Markup:
    """Return an implementation's marker on its line, for a legend beside its name."""
    colour, path = colour_of(look), MARKS[MARKERS.index(look.marker)]
    return Markup(  # no text of a file is in it
        f'<svg class="key" aria-hidden="true" viewBox="-13 -8 26 16" width="26" height="16">'
        f'<path class="curve {colour}" d="M-12 0H12"/>'
        f'<path class="mark {colour}" d="{path}"/></svg>'
    )
