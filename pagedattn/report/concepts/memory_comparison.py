"""What each system's KV memory is used for while requests wait, beside the paper's Figure 2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pagedattn.report.concepts.canvas import (
    BLUE,
    GREEN,
    GREY,
    MARGIN,
    ORANGE,
    PALE,
    SMALL,
    WIDTH,
    Across,
    Canvas,
    tint,
)
from pagedattn.report.concepts.opt_13b import KV_GIB, LABELS, MAX_MODEL_LEN, NUM_SLOTS
from pagedattn.reservation import (
    Requests,
    StepTime,
    make_reservation,
    reservation_names,
    simulate,
)
from pagedattn.workloads import SHAREGPT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = {
    "orca-max": {"token_states": 20.4, "reservation": 13.3, "internal": 57.3, "external": 8.9},
    "orca-pow2": {"token_states": 26.8, "reservation": 17.9, "internal": 13.6, "external": 41.6},
    "orca-oracle": {"token_states": 38.2, "reservation": 25.2, "internal": 0.0, "external": 36.6},
    "paged": {"token_states": 96.3},
}
"""SOSP '23, Figure 2, in percent; of vLLM it gives the first share alone."""

_CAUSES = {
    "token_states": ("tokens", tint(BLUE, 0.55), ""),
    "reservation": ("kept for later tokens", tint(GREEN, 0.4), ".."),
    "internal": ("internal waste", tint(ORANGE, 0.5), "//"),
    "external": ("external waste", PALE, "x"),
}
_LEFT = 2.3
_WIDE = WIDTH - MARGIN - _LEFT
_PITCH, _TALL, _THIN = 0.62, 0.34, 0.12


@dataclass(frozen=True)
class Scene:
    """Shares of the KV memory by cause, of each system; they sum to 1."""

    shares: dict[str, dict[str, float]]


def scene(num_requests: int = 600, max_steps: int = 10_000) -> Scene:
    """Watch each system while requests wait, so that no slot is free without need."""
    rng = np.random.default_rng(0)
    requests = Requests.draw(SHAREGPT, rng, num_requests, max_model_len=MAX_MODEL_LEN)
    shares = {}
    for name in reservation_names():
        system = make_reservation(name, NUM_SLOTS, MAX_MODEL_LEN)
        run = simulate(system, requests, StepTime(fixed=1.0), max_steps=max_steps)
        shares[name] = run.use.shares()
    return Scene(shares)


def draw(scene: Scene) -> Figure:
    """Draw a bar for each system, and below it a thin one where the paper has its shares."""
    canvas = Canvas(
        2.3 + _PITCH * len(scene.shares),
        "Where the KV memory goes",
        f"A simulation: OPT-13B, {KV_GIB} GiB for K and V, lengths like ShareGPT's, some requests "
        f"always waiting. FlexGen keeps slots in host memory, too.",
    )
    y = canvas.top + 0.15
    kinds = list(_CAUSES.values())
    left = canvas.key(MARGIN, y, kinds, gap=0.27)
    canvas.box(left, y - _THIN / 2, 0.3, _THIN, fill=kinds[0][1], line=0.8)
    canvas.write(left + 0.39, y, "SOSP '23, Figure 2", size=SMALL, across="left")
    y += 0.32
    for name, shares in scene.shares.items():
        weight = "bold" if name == "paged" else "normal"
        canvas.write(_LEFT - 0.15, y + _TALL / 2, LABELS[name], weight=weight, across="right")
        _draw_bar(canvas, y, shares)
        if name in PAPER:
            _draw_paper(canvas, y + _TALL, PAPER[name])
        y += _PITCH
    for share in range(0, 101, 20):
        x = _LEFT + _WIDE * share / 100
        across: Across = "center" if share < 100 else "right"
        canvas.write(x, y + 0.05, f"{share} %", size=SMALL, colour=GREY, across=across)
    return canvas.figure


def _draw_bar(canvas: Canvas, y: float, shares: dict[str, float]) -> None:
    left = _LEFT
    for cause, (_, fill, hatch) in _CAUSES.items():
        width = _WIDE * shares[cause]
        if width > 0:
            canvas.box(left, y, width, _TALL, fill=fill, hatch=hatch, line=0.8)
        if shares[cause] >= 0.045:
            middle = left + width / 2, y + _TALL / 2
            canvas.label(*middle, f"{100 * shares[cause]:.0f}", across="center")
        left += width


def _draw_paper(canvas: Canvas, y: float, shares: dict[str, float]) -> None:
    left = _LEFT
    for cause, share in shares.items():
        _, fill, hatch = _CAUSES[cause]
        canvas.box(left, y, _WIDE * share / 100, _THIN, fill=fill, hatch=hatch, line=0.8)
        left += _WIDE * share / 100
