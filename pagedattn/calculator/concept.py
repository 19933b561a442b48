"""The calculator's plot as a figure of the tutorial."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pagedattn.calculator import plot
from pagedattn.calculator.cli import DEFAULT_GPU, make_parser, read_settings
from pagedattn.calculator.result import Calculation
from pagedattn.report.style import plain_style

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure


def scene(arguments: Sequence[str] = ("--gpu", DEFAULT_GPU)) -> Calculation:
    """Calculate what the command line would; the same on every machine."""
    settings = read_settings(make_parser().parse_args(list(arguments)))
    return Calculation.of(settings, lambda _: None)


def draw(scene: Calculation) -> Figure:
    """Draw it as the command line does."""
    with plain_style():
        return plot.draw(scene)
