"""``benchmark_results``: four plots of a calculation on one page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pagedattn.calculator.output import plot_names
from pagedattn.calculator.settings import gib_text, percent
from pagedattn.calculator.users import bound
from pagedattn.calculator.waste import PAGED
from pagedattn.hardware import GIB
from pagedattn.report.style import DPI, INK, ROOF, looks_of, plain_style, save
from pagedattn.report.text import cut

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from pagedattn.calculator.result import Calculation

OFFLOADED = "flexgen"  # bound by a bus, and far below the others

_WIDTH, _HEIGHT = 13.6, 11.6
_LABELS, _PANEL, _GAP, _RIGHT = 1.85, 4.45, 0.45, 0.3
_TOP, _TALL, _BELOW = 2.05, 3.75, 1.35

# cause: label, colour, hatch; colours of Okabe and Ito
_CAUSES = {
    "token_states": ("tokens", "#0072B2", ""),
    "reservation": ("later tokens", "#56B4E9", "//"),
    "internal": ("internal", "#E69F00", ".."),
    "external": ("external", "#D55E00", "\\\\"),
}
_BUDGETS = (("#009E73", ""), ("#CC79A7", "//"))


def write_plot(result: Calculation, folder: Path, formats: tuple[str, ...]) -> list[str]:
    """Write ``benchmark_results.FORMAT`` into a folder; return the names of the files.

    The same calculation gives the same bytes.
    """
    with plain_style():
        figure = draw(result)
        names = plot_names(formats)
        for name in names:
            save(figure, folder / name)
    return names


def draw(result: Calculation) -> Figure:
    """Draw waste by cause, users that fit, throughput and sharing."""
    figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=DPI)
    FigureCanvasAgg(figure)
    settings = result.settings
    memory = settings.memory
    title = f"{cut(settings.model.name, 40)} on {cut(settings.gpu.name, 40)}"
    gpus = memory.tensor_parallel_size
    lines = (
        (
            f"KV cache in {memory.dtype}, {memory.bytes_per_token:,} bytes a token"
            f"{f' on each of {gpus} GPUs' if gpus > 1 else ''}; blocks of {memory.block_size} "
            f"tokens; requests of at most {settings.max_model_len:,} tokens."
        ),
        "Counted by reservations and block managers; no model was run.",
    )
    figure.text(0.25 / _WIDTH, 1 - 0.22 / _HEIGHT, title, size=19, weight="bold", va="top")
    figure.text(0.25 / _WIDTH, 1 - 0.68 / _HEIGHT, "\n".join(lines), size=13, va="top")
    _draw_waste(_axes(figure, 0, 0), result)
    _draw_users(_axes(figure, 1, 0), result)
    _draw_throughput(_axes(figure, 0, 1), result)
    _draw_sharing(_axes(figure, 1, 1), result)
    return figure


def _axes(figure: Figure, column: int, row: int) -> Axes:
    left = _LABELS + column * (_PANEL + _GAP + _LABELS)
    top = _TOP + row * (_TALL + _BELOW)
    axes = figure.add_axes(
        (left / _WIDTH, 1 - (top + _TALL) / _HEIGHT, _PANEL / _WIDTH, _TALL / _HEIGHT),
        label=f"panel{column}{row}",
    )
    axes.tick_params(labelsize=12)
    return axes


def _title(axes: Axes, text: str, above: float = 34) -> None:
    """Write a panel's title so many points above it, from the left end of its labels."""
    axes.annotate(
        text,
        (0, 1),
        xycoords="axes fraction",
        xytext=(-72 * _LABELS + 18, above),
        textcoords="offset points",
        fontsize=14.5,
        fontweight="bold",
    )


def _legend(axes: Axes, handles: list[Patch]) -> None:
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=((0.25 - _LABELS) / _PANEL, 1.0),
        ncols=len(handles),
        frameon=False,
        fontsize=12,
        columnspacing=1.2,
        handlelength=1.6,
        borderaxespad=0.35,
    )


def _draw_waste(axes: Axes, result: Calculation) -> None:
    rows = result.waste.systems
    _title(axes, f"Where KV memory goes, {result.waste.mean_tokens:.0f} tokens held a request")
    _legend(axes, [_patch(*look) for look in _CAUSES.values()])
    for place, row in enumerate(rows):
        left = 0.0
        for cause, (_, colour, hatch) in _CAUSES.items():
            share = 100 * row.shares.get(cause, 0.0)
            axes.barh(place, share, left=left, height=0.72, color=colour, hatch=hatch, linewidth=0)
            left += share
        text = "no room" if row.reason else percent(row.shares["token_states"])
        inside = not row.reason and row.shares["token_states"] > 0.16
        _note(axes, text, 1.0, place, "white" if inside else INK, on_bar=not row.reason)
    _systems_axis(axes, [row.system for row in rows])
    axes.set_xlim(0, 100)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.set_xlabel("share of the KV memory; written: the share that holds tokens", fontsize=12)


def _note(axes: Axes, text: str, x: float, y: float, colour: str, *, on_bar: bool) -> None:
    box = {"boxstyle": "square,pad=0.12", "fc": "white", "lw": 0, "alpha": 0.85}
    axes.annotate(
        text,
        (x, y),
        xytext=(3, 0),
        textcoords="offset points",
        va="center_baseline",
        fontsize=12,
        fontweight="bold",
        color=colour,
        bbox=box if on_bar and colour == INK else None,
    )


def _draw_users(axes: Axes, result: Calculation) -> None:
    rows, budgets = result.users.systems, result.settings.budgets
    _title(axes, f"Users that fit, {result.users.mean_tokens:.0f} tokens held each")
    labels = [f"{budget.name}, {gib_text(budget.num_bytes)}" for budget in budgets]
    _legend(
        axes,
        [_patch(text, *look) for text, look in zip(labels, _BUDGETS, strict=False)],
    )
    height = 0.76 / len(budgets)
    for place, row in enumerate(rows):
        for number, (budget, (colour, hatch)) in enumerate(zip(budgets, _BUDGETS, strict=False)):
            users = row.users[budget.name]
            y = place - 0.38 + (number + 0.5) * height
            axes.barh(y, users or 0, height=0.94 * height, color=colour, hatch=hatch, linewidth=0)
            text = (
                "no room" if users is None else f"{users:,.1f}" if users < 1000 else f"{users:,.0f}"
            )
            _note(axes, text, users or 0, y, INK, on_bar=False)
    _systems_axis(axes, [row.system for row in rows])
    most = max((users or 0) for row in rows for users in row.users.values())
    axes.set_xlim(0, 1.2 * most or 1)
    _count_axis(axes)
    axes.set_xlabel("users at once; flexgen uses host memory too", fontsize=12)


def _draw_throughput(axes: Axes, result: Calculation) -> None:
    users, settings = result.users, result.settings
    _title(axes, f"Throughput in {gib_text(settings.budgets[-1].num_bytes)}", 12)
    if users.no_run is not None:
        axes.axis("off")
        axes.text(0, 0.9, _broken(f"Not calculated: {users.no_run}."), fontsize=13, va="top")
        return
    ran = [row for row in users.systems if row.mean_running is not None]
    rows = [row for row in ran if row.system != OFFLOADED]
    most = 1.1 * max(row.mean_running or 0 for row in rows)
    running = [most * part / 100 for part in range(101)]
    bounds = [bound(settings, count) for count in running]
    axes.plot(
        running, bounds, color=ROOF, linestyle="--", linewidth=1.8, label="bound of a full batch"
    )
    looks = looks_of([row.system for row in rows])
    for row in rows:
        look = looks[row.system]
        axes.plot(
            [row.mean_running or 0],
            [row.tokens_per_s or 0],
            look.marker,
            color=look.colour,
            markersize=11,
            markeredgecolor=INK,
            markeredgewidth=0.7,
            linestyle="none",
            label=look.label,
            clip_on=False,
            zorder=3,
        )
    axes.set_xlim(0, most)
    axes.set_ylim(0, 1.08 * max(*bounds, *(row.tokens_per_s or 0 for row in rows)))
    _count_axis(axes)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    slow = [f"; {row.system}: {row.tokens_per_s:.3g} tokens/s" for row in ran if row not in rows]
    axes.set_xlabel(f"mean requests in a step{''.join(slow)}", fontsize=12)
    axes.set_ylabel("tokens/s, at most", fontsize=12)
    axes.legend(loc="lower right", fontsize=12, frameon=True, framealpha=0.9, edgecolor="none")


def _draw_sharing(axes: Axes, result: Calculation) -> None:
    sharing, settings = result.sharing, result.settings
    _title(
        axes,
        f"Shared prompt: {settings.system_prompt_tokens:,} tokens, and {settings.own_tokens:,} own",
        12,
    )
    counts = [row.num_users for row in sharing.by_users]
    unit = sharing.bytes_per_block / GIB
    lines = (
        ("each with its own blocks", "#D55E00", "s", [row.separate for row in sharing.by_users]),
        ("sharing blocks", "#0072B2", "o", [row.shared for row in sharing.by_users]),
    )
    for text, colour, marker, blocks in lines:
        axes.plot(
            counts,
            [unit * count for count in blocks],
            color=colour,
            marker=marker,
            markersize=6,
            linewidth=2,
            label=text,
        )
    total = sharing.total
    axes.set_xlim(0, 1.04 * counts[-1])
    axes.set_ylim(0, 1.12 * unit * total.separate)
    axes.annotate(
        f"{percent(total.saved)} saved",
        (counts[-1], unit * (0.4 * total.separate + 0.6 * total.shared)),
        xytext=(-12, -4),
        textcoords="offset points",
        ha="right",
        fontsize=13,
        fontweight="bold",
        bbox={"boxstyle": "square,pad=0.12", "fc": "white", "lw": 0, "alpha": 0.85},
    )
    axes.annotate(
        "",
        (counts[-1], unit * total.shared),
        xytext=(counts[-1], unit * total.separate),
        arrowprops={"arrowstyle": "<->", "color": INK, "shrinkA": 5, "shrinkB": 5},
    )
    _count_axis(axes)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel("users", fontsize=12)
    axes.set_ylabel("GiB of KV memory", fontsize=12)
    axes.legend(loc="upper left", fontsize=12, frameon=False)


def _systems_axis(axes: Axes, systems: list[str]) -> None:
    axes.set_ylim(len(systems) - 0.45, -0.55)
    axes.set_yticks(range(len(systems)), systems, fontsize=12)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    for label in axes.get_yticklabels():
        if label.get_text().startswith(PAGED):
            label.set_fontweight("bold")


def _count_axis(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _patch(text: str, colour: str, hatch: str) -> Patch:
    return Patch(facecolor=colour, hatch=hatch, edgecolor="white", linewidth=0, label=text)


def _broken(text: str) -> str:
    """Break a sentence into lines of about 40 letters."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > 40:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
