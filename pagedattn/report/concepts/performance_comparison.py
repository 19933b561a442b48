"""How many requests each system batches, and how many tokens it makes, as more requests come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pagedattn.report.concepts.canvas import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    HEADING,
    MARGIN,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    SMALL,
    Canvas,
)
from pagedattn.report.concepts.opt_13b import LABELS, MAX_MODEL_LEN, NUM_SLOTS, STEP_TIME
from pagedattn.report.style import INK, MARKERS
from pagedattn.reservation import Requests, make_reservation, reservation_names, simulate
from pagedattn.workloads import SHAREGPT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RATES = 0.5, 1.0, 1.5, 2.0, 3.0
PAPER_RATE = 2.0
PAPER = {"orca-max": 7.00, "orca-pow2": 9.81, "orca-oracle": 13.62, "paged": 30.42}
"""Mean batches at `PAPER_RATE`: SOSP '23, Figure 13a."""

_COLOURS = {
    "fastertransformer": PURPLE,
    "orca-max": ORANGE,
    "orca-pow2": GREEN,
    "orca-oracle": RED,
    "transformers": BLACK,
    "tgi": SKY,
    "flexgen": "#999999",
    "paged": BLUE,
}
_MARKS = dict(zip(_COLOURS, MARKERS, strict=True))
_MARKER: dict[str, Any] = {"ms": 8, "mec": INK, "mew": 0.6}
_DIAMOND: dict[str, Any] = {"ms": 13, "mfc": "none", "mec": INK, "mew": 1.8}
_WIDE, _TALL = 2.75, 3.75


@dataclass(frozen=True)
class Scene:
    """Runs of each system at each rate.

    Attributes:
        rates: requests a second.
        running: for each system, the mean number of requests in a step at each rate.
        tokens: for each system, tokens generated a second at each rate.
        mean_output: mean number of tokens that a request wants.

    """

    rates: tuple[float, ...]
    running: dict[str, list[float]]
    tokens: dict[str, list[float]]
    mean_output: float


def scene(rates: tuple[float, ...] = RATES, max_steps: int = 8000) -> Scene:
    """Run each system for so many steps at each rate."""
    names = reservation_names()
    running: dict[str, list[float]] = {name: [] for name in names}
    tokens: dict[str, list[float]] = {name: [] for name in names}
    mean_output = 0.0
    for rate in rates:
        rng = np.random.default_rng(0)
        requests = Requests.draw(SHAREGPT, rng, 100_000, rate=rate, max_model_len=MAX_MODEL_LEN)
        mean_output = float(requests.output_tokens.mean())
        for name in names:
            system = make_reservation(name, NUM_SLOTS, MAX_MODEL_LEN)
            run = simulate(system, requests, STEP_TIME, max_steps=max_steps)
            running[name].append(run.mean_running)
            tokens[name].append(run.tokens_per_s)
    return Scene(rates, running, tokens, mean_output)


def draw(scene: Scene) -> Figure:
    """Draw the batches on the left and the tokens on the right."""
    canvas = Canvas(
        6.55,
        "Larger batches, more tokens: a simulation",
        "Nothing here was measured on a GPU: OPT-13B on an A100 of 40 GB, by its numbers; requests "
        "with lengths like ShareGPT's; a step's time fitted to the vLLM of SOSP '23, Figure 13.",
    )
    top = canvas.top + 0.2
    titles = "Requests that run, on average", "Tokens a second"
    for side, (title, values) in enumerate(zip(titles, (scene.running, scene.tokens), strict=True)):
        left = MARGIN + side * 5.2
        canvas.write(left, top, title, size=HEADING, weight="bold", across="left")
        axes = canvas.chart(left + 0.45, top + 0.3, _WIDE, _TALL)
        highest = 1.1 * max(max(ys) for ys in values.values())
        _prepare(axes, scene, highest)
        for name, ys in values.items():
            axes.plot(
                scene.rates,
                ys,
                color=_COLOURS[name],
                marker=_MARKS[name],
                **_MARKER,
                linewidth=3.4 if name == "paged" else 2.0,
                zorder=3 if name == "paged" else 2.5,
            )
        ends = {name: ys[-1] / highest for name, ys in values.items()}
        _write_names(canvas, ends, left + 0.45, top + 0.3)
        x, y = left + 0.55, top + 0.3 + _TALL + 0.82
        if side == 0:
            for batch in PAPER.values():
                axes.plot([PAPER_RATE], [batch], "D", zorder=4, **_DIAMOND)
            note = "SOSP '23, Figure 13a"
            canvas.marker(x, y, "D", **_DIAMOND)
        else:
            asked = [0.0, highest / scene.mean_output]
            axes.plot(asked, [0.0, highest], color=GREY, linestyle=":", linewidth=2.2)
            note = f"asked for: {scene.mean_output:.0f} tokens a request"
            canvas.line((x - 0.2, y), (x + 0.15, y), GREY, width=2.2, style=":")
        canvas.write(x + 0.25, y, note, size=SMALL, across="left")
    return canvas.figure


def _prepare(axes: Axes, scene: Scene, highest: float) -> None:
    axes.set_xlim(0, max(scene.rates) * 1.04)
    axes.set_ylim(0, highest)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.set_xlabel("requests a second", fontsize=SMALL)


def _write_names(canvas: Canvas, ends: dict[str, float], left: float, top: float) -> None:
    """Write each system's name beside the end of its line, at a share of the chart's height."""
    x = left + _WIDE
    previous = top + _TALL + 0.25
    for name, share in sorted(ends.items(), key=lambda end: end[1]):
        end = top + _TALL * (1 - share)
        previous = y = min(end, previous - 0.225)
        canvas.line((x, end), (x + 0.22, y), GREY)
        canvas.marker(x + 0.3, y, _MARKS[name], color=_COLOURS[name], **_MARKER)
        weight = "bold" if name == "paged" else "normal"
        canvas.write(x + 0.41, y, LABELS[name], size=SMALL, weight=weight, across="left")
