"""A figure to draw on in inches: boxes, words, arrows and charts in one look.

Words are at least 12 points high, so that they can be read when the figure, 1400 pixels wide, is
shown at half its width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse, FancyArrowPatch, Rectangle

from pagedattn.report.style import COLOURS, DPI, INK

if TYPE_CHECKING:
    from collections.abc import Iterable

    from matplotlib.axes import Axes
    from matplotlib.text import Text

WIDTH = 1400 / DPI
MARGIN = 0.3
SMALL, BODY, HEADING, TITLE = 12.0, 12.5, 13.5, 18.0
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, BLACK = COLOURS
GREY = "#555555"
PALE = "#f1f1f1"
HATCH = "#8a8a8a"
DARK_RED = "#a84a00"  # red enough, and dark enough to write with

Across = Literal["left", "center", "right"]
Down = Literal["top", "center", "bottom", "baseline", "center_baseline"]


def tint(colour: str, strength: float = 0.3) -> str:
    """Return a colour mixed with white, pale enough to carry black letters."""
    red, green, blue = (1 - strength * (1 - part) for part in to_rgb(colour))
    return to_hex((red, green, blue))


class Canvas:
    """A figure of a fixed width; places are inches from its top left corner.

    Attributes:
        figure: what is drawn on.
        top: where the drawing may begin, below title and subtitle.

    """

    def __init__(self, height: float, title: str, subtitle: str) -> None:
        self.height = height
        self.figure = Figure(figsize=(WIDTH, height), dpi=DPI)
        FigureCanvasAgg(self.figure)
        self._axes = self.figure.add_axes((0, 0, 1, 1), label="page")
        self._axes.set_axis_off()
        self._axes.set_xlim(0, WIDTH)
        self._axes.set_ylim(height, 0)
        self.write(MARGIN, 0.33, title, size=TITLE, weight="bold", across="left")
        lines = self.wrap(subtitle, WIDTH - 2 * MARGIN, BODY)
        self.write(MARGIN, 0.62, "\n".join(lines), across="left", down="top")
        self.top = 0.72 + 0.245 * len(lines)

    def box(
        self,
        left: float,
        top: float,
        width: float,
        height: float,
        text: str = "",
        *,
        fill: str = "white",
        edge: str = INK,
        line: float = 1.0,
        style: Literal["-", "--"] = "-",
        hatch: str = "",
        size: float = SMALL,
        weight: str = "normal",
        colour: str = INK,
        layer: float = 2.0,
    ) -> None:
        """Draw a rectangle, with words in its middle that must fit it."""
        self._axes.add_patch(
            Rectangle(
                (left, top),
                width,
                height,
                facecolor=fill,
                edgecolor=edge,
                linewidth=line,
                linestyle=style,
                zorder=layer,
            )
        )
        if hatch:
            # drawn apart, as a patch has one colour for edge and hatch
            self._axes.add_patch(
                Rectangle(
                    (left, top),
                    width,
                    height,
                    fill=False,
                    edgecolor=HATCH,
                    hatch=hatch,
                    linewidth=0,
                    zorder=layer + 0.1,
                )
            )
        if text:
            middle = left + width / 2, top + height / 2
            self.write(*middle, text, size=size, weight=weight, colour=colour)

    def badge(self, x: float, y: float, text: str, *, fill: str = INK) -> None:
        """Draw a disc around one or two white letters."""
        patch = Ellipse((x, y), 0.27, 0.27, facecolor=fill, edgecolor="none", zorder=4)
        self._axes.add_patch(patch)
        self.write(x, y, text, weight="bold", colour="white")

    def write(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = BODY,
        weight: str = "normal",
        colour: str = INK,
        across: Across = "center",
        down: Down = "center_baseline",
    ) -> Text:
        """Write words at a place."""
        return self._axes.text(
            x,
            y,
            text,
            fontsize=size,
            fontweight=weight,
            color=colour,
            horizontalalignment=across,
            verticalalignment=down,
            linespacing=1.3,
            zorder=5,
        )

    def label(self, x: float, y: float, text: str, *, across: Across = "left") -> Text:
        """Write words on a white ground, over a pattern."""
        words = self.write(x, y, text, size=SMALL, across=across)
        words.set_bbox({"boxstyle": "square,pad=0.15", "facecolor": "white", "linewidth": 0})
        return words

    def arrow(
        self,
        start: tuple[float, float],
        end: tuple[float, float],
        *,
        colour: str = INK,
        bend: float = 0.0,
        line: float = 1.6,
        style: Literal["-", "--"] = "-",
    ) -> None:
        """Draw an arrow; a positive `bend` curves it to the left of its way."""
        self._axes.add_patch(
            FancyArrowPatch(
                start,
                end,
                arrowstyle="-|>",
                connectionstyle=f"arc3,rad={bend}",
                mutation_scale=14,
                shrinkA=0,
                shrinkB=0,
                color=colour,
                linewidth=line,
                linestyle=style,
                zorder=3,
            )
        )

    def line(
        self,
        start: tuple[float, float],
        end: tuple[float, float],
        colour: str = GREY,
        *,
        width: float = 1.0,
        style: Literal["-", ":"] = "-",
    ) -> None:
        """Draw a line without a head."""
        xs, ys = zip(start, end, strict=True)
        self._axes.plot(xs, ys, color=colour, linewidth=width, linestyle=style, zorder=3)

    def marker(self, x: float, y: float, marker: str, **look: Any) -> None:
        """Draw a marker, with matplotlib's properties of a line, as charts have them."""
        self._axes.plot([x], [y], marker, zorder=4, **look)

    def route(self, points: list[tuple[float, float]], *, colour: str = DARK_RED) -> None:
        """Draw an arrow along straight lines from point to point."""
        xs, ys = zip(*points[:-1], strict=True)
        self._axes.plot(xs, ys, color=colour, linewidth=2.0, zorder=3, solid_joinstyle="miter")
        self.arrow(points[-2], points[-1], colour=colour, line=2.0)

    def chart(self, left: float, top: float, width: float, height: float) -> Axes:
        """Add axes whose frame has this place and size."""
        axes = self.figure.add_axes(
            (left / WIDTH, 1 - (top + height) / self.height, width / WIDTH, height / self.height),
            label=f"chart{len(self.figure.axes)}",
        )
        axes.tick_params(labelsize=SMALL)
        return axes

    def key(
        self, left: float, y: float, entries: Iterable[tuple[str, str, str]], gap: float = 0.3
    ) -> float:
        """Write a legend on one line: words, fill and hatch of each; return where it ends."""
        for text, fill, hatch in entries:
            self.box(left, y - 0.1, 0.3, 0.2, fill=fill, hatch=hatch, line=0.8)
            words = self.write(left + 0.39, y, text, size=SMALL, across="left")
            left += 0.39 + self.width_of(words) + gap
        return left

    def width_of(self, words: Text) -> float:
        """Return the width of what was written."""
        return float(words.get_window_extent().width) / DPI

    def wrap(self, text: str, width: float, size: float = SMALL) -> list[str]:
        """Break words into lines that are at most `width` wide."""
        probe = self.write(0, 0, "", size=size)
        lines = [""]
        for word in text.split():
            longer = f"{lines[-1]} {word}".strip()
            probe.set_text(longer)
            if lines[-1] and self.width_of(probe) > width:
                lines.append(word)
            else:
                lines[-1] = longer
        probe.remove()
        return lines
