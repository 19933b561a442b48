"""How plots look: a fixed colour, marker and hatch for each implementation, and stable files."""

from __future__ import annotations

import math
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from pagedattn.report.text import cut

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

DPI = 130
INK = "#222222"
GRID = "#dddddd"
ROOF = "#777777"

# Okabe and Ito, https://jfly.uni-koeln.de/color/: told apart by colour-blind readers
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
HATCHES = ("", "//", "..", "\\\\", "xx", "--", "++", "oo")
_PLACES = {
    "triton": 0,
    "pagedattn": 0,
    "torch": 1,
    "sdpa_contiguous": 2,
    "vllm": 3,
    "flashinfer": 4,
    "flash_attention": 5,
    "index_put": 6,
    "cuda": 7,
}


@dataclass(frozen=True, slots=True)
class Look:
    """How one implementation is drawn."""

    label: str
    colour: str
    marker: str
    hatch: str


def looks_of(implementations: list[str]) -> dict[str, Look]:
    """Give each implementation its look.

    Known names always have the same one. Another name's follows from the name alone, unless one
    before it in alphabetical order has it already; then it takes the next that is free. The ninth
    and later ones repeat a colour with another marker and hatch.
    """
    places: dict[str, int] = {}
    for name in sorted(implementations, key=lambda name: (name not in _PLACES, name)):
        wanted = _PLACES.get(name)
        if wanted is None:
            first = zlib.crc32(name.encode()) % len(COLOURS)
            turned = [(first + step) % len(COLOURS) for step in range(len(COLOURS))]
            later = range(len(COLOURS), len(COLOURS) + len(implementations))
            taken = set(places.values())
            wanted = next(place for place in (*turned, *later) if place not in taken)
        places[name] = wanted
    return {name: _look(name, place) for name, place in places.items()}


def _look(name: str, place: int) -> Look:
    turn, i = divmod(place, len(COLOURS))
    marker, hatch = ((group[(i + 3 * turn) % len(group)]) for group in (MARKERS, HATCHES))
    return Look(label(name, 32), COLOURS[i], marker, hatch)


def label(text: str, length: int = 54) -> str:
    """Return a name for a plot: one line, cut, not starting with matplotlib's sign for hidden."""
    text = cut(text, length)
    return f" {text}" if text.startswith("_") else text


@contextmanager
def plain_style() -> Iterator[None]:
    """Draw with this project's settings, whatever the user's own are; restores them."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        # a name may have letters that the font lacks; they show as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.family": ["DejaVu Sans"],
                "font.size": 11,
                "text.parse_math": False,
                "text.color": INK,
                "axes.labelcolor": INK,
                "axes.edgecolor": "#888888",
                "axes.titlesize": 12,
                "axes.titleweight": "bold",
                "axes.titlelocation": "left",
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.axisbelow": True,
                "axes.grid": True,
                "grid.color": GRID,
                "grid.linewidth": 0.8,
                "xtick.color": INK,
                "ytick.color": INK,
                "hatch.linewidth": 0.7,
                "hatch.color": "white",
                "figure.facecolor": "white",
                "savefig.facecolor": "white",
                "svg.hashsalt": "pagedattn",
            }
        )
        yield


class Page:
    """A figure laid out in inches from its top left corner; it starts with title and legend."""

    def __init__(self, width: float, title: str, subtitle: str, handles: list[Artist]) -> None:
        self.width = width
        self._boxes: list[tuple[Axes, float, float, float, float]] = []
        self.figure = Figure(figsize=(width, 1.0), dpi=DPI)
        FigureCanvasAgg(self.figure)
        lines = _wrapped(subtitle, int(width * 12.5))
        self._texts = [(title, 0.18, 15.0, "bold"), ("\n".join(lines), 0.5, 10.5, "normal")]
        self._legend_top = 0.62 + 0.19 * len(lines)
        self._handles = handles
        widest = max(len(str(handle.get_label())) for handle in handles)
        columns = max(1, min(len(handles), int((width - 0.3) / (0.62 + 0.092 * widest))))
        self._legend_columns = columns
        self.top = self._legend_top + 0.27 * math.ceil(len(handles) / columns) + 0.1

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Add axes whose frame has this place and size, in inches."""
        axes = self.figure.add_axes((0.1, 0.1, 0.5, 0.5), label=f"axes{len(self._boxes)}")
        self._boxes.append((axes, left, top, width, height))
        return axes

    def finish(self, height: float) -> Figure:
        """Set the page's height in inches and put everything in its place."""
        self.figure.set_size_inches(self.width, height)
        for axes, left, top, width, tall in self._boxes:
            axes.set_position(
                (left / self.width, 1 - (top + tall) / height, width / self.width, tall / height)
            )
        for text, top, size, weight in self._texts:
            self.figure.text(
                0.2 / self.width, 1 - top / height, text, size=size, weight=weight, va="top"
            )
        self.figure.legend(
            handles=self._handles,
            loc="upper left",
            bbox_to_anchor=(0.1 / self.width, 1 - self._legend_top / height),
            ncols=self._legend_columns,
            frameon=False,
            borderaxespad=0,
            columnspacing=1.4,
            handlelength=1.8,
        )
        return self.figure


def _wrapped(text: str, length: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > length:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def marker_handle(look: Look) -> Artist:
    """Return a legend entry with the implementation's marker on its line."""
    return Line2D(
        [],
        [],
        color=look.colour,
        marker=look.marker,
        label=look.label,
        markersize=7,
        mec=INK,
        mew=0.6,
    )


def bar_handle(look: Look) -> Artist:
    """Return a legend entry with the implementation's bar."""
    return Patch(facecolor=look.colour, hatch=look.hatch, label=look.label, edgecolor="white")


def line_handle(text: str, style: Literal["-", "--"], colour: str = INK) -> Artist:
    """Return a legend entry for a line that is no implementation's."""
    return Line2D([], [], color=colour, linestyle=style, linewidth=1.8, label=text)


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Return at most `most` round places from low to high on a logarithmic axis.

    >>> log_ticks(9, 1500, 8), log_ticks(9, 150, 4)
    ([10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0], [10.0, 20.0, 50.0, 100.0])
    """
    low_power, high_power = math.floor(math.log10(low)), math.ceil(math.log10(high))
    candidates: list[list[float]] = [
        [digit * 10.0**power for power in range(low_power, high_power + 1) for digit in digits]
        for digits in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,))
    ]
    span = max(1, (high_power - low_power) // most + 1)
    candidates.append([10.0**power for power in range(low_power, high_power + 1, span)])
    inside = [[tick for tick in ticks if low <= tick <= high] for ticks in candidates]
    fitting = [ticks for ticks in inside if len(ticks) <= most]
    return max(fitting, key=len)


def power_ticks(values: Iterable[float], most: int) -> list[float]:
    """Return at most `most` powers of two that span the values, or the values if they are few.

    >>> power_ticks([512, 1024, 65536], 4), power_ticks([100, 300], 4)
    ([1024.0, 4096.0, 16384.0, 65536.0], [100, 300])
    """
    distinct = sorted(set(values))
    if len(distinct) <= 2:
        return distinct
    low, high = math.ceil(math.log2(distinct[0])), math.floor(math.log2(distinct[-1]))
    step = max(1, math.ceil((high - low + 1) / most))
    return [2.0**power for power in range(high, low - 1, -step)][::-1] or distinct[:1]


def save(figure: Figure, path: Path) -> None:
    """Write the figure in the format of the path's suffix, without a date or a program's name."""
    metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
    figure.savefig(path, dpi=DPI, metadata=metadata)
