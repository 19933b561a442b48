"""Draws figures by their names, and writes them."""

from __future__ import annotations

import importlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import matplotlib
from PIL import Image

from pagedattn.report.concepts.canvas import HATCH
from pagedattn.report.style import plain_style, save

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from matplotlib.figure import Figure

    from pagedattn.report.concepts import Concept


# a package above this one draws it; it is found by its name, and only when it is drawn
_ELSEWHERE = {"benchmark_results": "pagedattn.calculator.concept"}


@contextmanager
def concept_style() -> Iterator[None]:
    """Draw with this project's settings, and patterns that show on a pale ground."""
    with plain_style():
        matplotlib.rcParams["hatch.color"] = HATCH
        yield


def draw_concept(name: Concept) -> Figure:
    """Draw a figure with its usual scene."""
    module = importlib.import_module(_ELSEWHERE.get(name, f"pagedattn.report.concepts.{name}"))
    with concept_style():
        return cast("Figure", module.draw(module.scene()))


def write_concepts(names: tuple[Concept, ...], folder: Path, formats: tuple[str, ...]) -> None:
    """Write ``NAME.FORMAT`` into `folder` for each name; the same bytes every time."""
    for name in names:
        figure = draw_concept(name)
        for suffix in formats:
            path = folder / f"{name}.{suffix}"
            with concept_style():
                save(figure, path)
            if suffix == "png":
                _pack(path)


def _pack(path: Path) -> None:
    """Write a PNG again with a palette of 256 colours, which is a third as long."""
    with Image.open(path) as image:
        packed = image.convert("RGB").quantize(
            256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE
        )
        dpi = image.info["dpi"]
    packed.save(path, optimize=True, dpi=dpi)
