"""How much memory keys and values take, and how little of a reservation is ever written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pagedattn.config import ModelConfig
from pagedattn.hardware import GIB
from pagedattn.memory import kv_bytes_per_token
from pagedattn.report.concepts.canvas import (
    BLUE,
    GREEN,
    GREY,
    HEADING,
    MARGIN,
    ORANGE,
    PURPLE,
    SMALL,
    WIDTH,
    Canvas,
    tint,
)
from pagedattn.report.concepts.opt_13b import KV_GIB, MAX_MODEL_LEN, NUM_SLOTS
from pagedattn.report.text import percent
from pagedattn.reservation import Requests, fill, make_reservation
from pagedattn.workloads import SHAREGPT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODELS = "opt-13b", "llama-2-7b", "llama-3-8b"
NAMES = "OPT-13B", "Llama 2 7B", "Llama 3 8B"

_COLOURS, _STYLES = (PURPLE, BLUE, GREEN), ("-", "--", "-.")
_PROMPT, _OUTPUT, _NEVER = (tint(BLUE, 0.55), ""), (tint(ORANGE, 0.75), ""), ("white", "..")
_LEFT, _WIDE = 5.72, WIDTH - MARGIN - 5.72  # the reservations
_ROW, _TALL = 0.42, 0.32


@dataclass(frozen=True)
class Scene:
    """Bytes of K and V, and what requests write of a reservation.

    Attributes:
        bytes_per_token: of each of `MODELS`.
        max_model_len: slots that are kept for each request.
        num_slots: slots in `opt_13b.KV_GIB` for the first model.
        requests: those that are there, in order of arrival.
        num_fit: how many of them the slots take.
        mean_tokens: mean number of tokens of a request, over many.
        num_drawn: how many.

    """

    bytes_per_token: tuple[int, ...]
    max_model_len: int
    num_slots: int
    requests: Requests
    num_fit: int
    mean_tokens: float
    num_drawn: int


def scene(max_model_len: int = MAX_MODEL_LEN, seed: int = 2) -> Scene:
    """Fill the memory with requests as SOSP '23 has them from ShareGPT, each at its maximum."""
    bytes_per_token = tuple(kv_bytes_per_token(ModelConfig.preset(name)) for name in MODELS)
    rng = np.random.default_rng(seed)
    requests = Requests.draw(SHAREGPT, rng, 100_000, max_model_len=max_model_len)
    filled = fill(make_reservation("orca-max", NUM_SLOTS, max_model_len), requests)
    tokens = requests.prompt_tokens + requests.output_tokens
    return Scene(
        bytes_per_token,
        max_model_len,
        NUM_SLOTS,
        requests,
        filled.num_requests,
        float(tokens.mean()),
        len(requests),
    )


def draw(scene: Scene) -> Figure:
    """Draw growth on the left, reservations on the right, and what follows below."""
    most = f"{scene.max_model_len:,}"
    canvas = Canvas(
        6.72,
        "The KV cache problem",
        "Keys and values take more memory with every token. Nobody knows how long an answer will "
        "be, so a cache that must be contiguous is kept for the longest.",
    )
    top = canvas.top + 0.2
    for left, text in (
        (MARGIN, "K and V of one request, in GiB"),
        (_LEFT, f"{NAMES[0]} in {KV_GIB} GiB: {most} slots for each"),
    ):
        canvas.write(left, top, text, size=HEADING, weight="bold", across="left")
    top += 0.32
    _draw_growth(canvas, scene, top + 0.08)
    bottom = _draw_reservations(canvas, scene, top)
    kinds = ("prompt", *_PROMPT), ("answer", *_OUTPUT), ("never written", *_NEVER)
    canvas.key(_LEFT, bottom + 0.2, kinds)
    never = 1 - scene.mean_tokens / scene.max_model_len
    facts = (
        (f"{scene.bytes_per_token[0] / 1024:g} KiB", f"for one token of {NAMES[0]}"),
        (f"{scene.num_fit} requests", f"and {KV_GIB} GiB are full"),
        (percent(never), f"never written: {scene.num_drawn:,} requests, lengths like ShareGPT's"),
    )
    widths = 2.4, 2.2, 5.17
    left = MARGIN
    for (number, text), width in zip(facts, widths, strict=True):
        canvas.box(left, bottom + 0.5, width, 0.86, fill="#f4f4f4", line=0)
        middle = left + width / 2
        canvas.write(middle, bottom + 0.88, number, size=19, weight="bold", down="baseline")
        canvas.write(middle, bottom + 1.2, text, size=SMALL, down="baseline")
        left += width + 0.2
    return canvas.figure


def _draw_growth(canvas: Canvas, scene: Scene, top: float) -> None:
    """Draw a line for each model, from one token to the maximum."""
    axes = canvas.chart(MARGIN + 0.45, top, 3.15, 8 * _ROW - 0.55)
    tokens = np.array([0, scene.max_model_len])
    for name, size, colour, style in zip(
        NAMES, scene.bytes_per_token, _COLOURS, _STYLES, strict=True
    ):
        axes.plot(tokens, tokens * size / GIB, color=colour, linewidth=3, linestyle=style)
        axes.annotate(
            f"{name}\n{size / 1024:g} KiB a token",
            (tokens[1], tokens[1] * size / GIB),
            xytext=(6, 0),
            textcoords="offset points",
            fontsize=SMALL,
            verticalalignment="center",
            annotation_clip=False,
        )
    most = scene.max_model_len
    axes.set_xlim(0, most)
    axes.set_ylim(0, 1.08 * most * max(scene.bytes_per_token) / GIB)
    axes.set_xticks([0, most // 2, most], ["0", f"{most // 2:,}", f"{most:,}"])
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("tokens", fontsize=SMALL)


def _draw_reservations(canvas: Canvas, scene: Scene, top: float) -> float:
    """Draw a bar for each request that fits, and what is left over; return where they end."""
    scale = _WIDE / scene.max_model_len
    for number in range(scene.num_fit):
        y = top + number * _ROW
        prompt = int(scene.requests.prompt_tokens[number])
        total = prompt + int(scene.requests.output_tokens[number])
        parts = (0, prompt, _PROMPT), (prompt, total, _OUTPUT), (total, scene.max_model_len, _NEVER)
        for start, end, (fill_colour, hatch) in parts:
            left, width = _LEFT + start * scale, (end - start) * scale
            canvas.box(left, y, width, _TALL, fill=fill_colour, hatch=hatch, line=0.8)
        canvas.box(_LEFT, y, _WIDE, _TALL, fill="none", line=1.6, layer=5.5)
        canvas.label(_LEFT + total * scale + 0.12, y + _TALL / 2, f"{total:,} tokens")
    y = top + scene.num_fit * _ROW
    left_over = scene.num_slots - scene.num_fit * scene.max_model_len
    canvas.box(
        _LEFT,
        y,
        left_over * scale,
        _TALL,
        f"{left_over:,} slots left, of no use",
        edge=GREY,
        style="--",
        colour=GREY,
    )
    return y + _TALL
