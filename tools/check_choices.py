#!/usr/bin/env python3
"""Check that the CUDA kernels choose well how a batch is divided, on this GPU.

``python tools/check_choices.py`` draws batches, launches each in the ways among which the kernels
choose, and tells how much longer the chosen way takes than the fastest. ``--try
prefill_estimate.UNEVEN=0,0.25`` tells too what other constants would have chosen.
docs/IMPLEMENTATION.md says how choices are made.
"""

import argparse
import importlib.util
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if importlib.util.find_spec("pagedattn") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pagedattn.report.arguments import Parser, count, positive
from pagedattn.report.needs import require_kernels
from pagedattn.report.output import require_folder, write_into
from pagedattn.report.text import clean, cut
from pagedattn.report.values import ResultsError
from pagedattn.workloads import DRAWN_KINDS, drawn_shapes

if TYPE_CHECKING:
    from pagedattn.benchmarking.choices import TimedWays

DEFAULT_OUT = Path("figures") / "local"
NAME = "choices"
MOST_PROCESSES = 8
PROCESS_BYTES = 12 << 30


def main(arguments: list[str] | None = None) -> int:
    """Check choices; return 0, or 2 after one sentence on stderr."""
    parser = Parser(prog="check_choices.py", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--kinds",
        type=kinds_of,
        metavar="KIND,...",
        default=list(DRAWN_KINDS),
        help=f"of batches: {', '.join(DRAWN_KINDS)}; default: all",
    )
    parser.add_argument(
        "--batches",
        type=positive,
        metavar="N",
        default=8,
        help="of each kind; default: %(default)s",
    )
    parser.add_argument(
        "--seed", type=count, metavar="N", default=0, help="of what is drawn; default: 0"
    )
    parser.add_argument(
        "--try",
        dest="tried",
        action="append",
        metavar="MODULE.NAME=VALUE,...",
        default=[],
        help="a constant of pagedattn.attention.cuda, such as prefill_estimate.UNEVEN=0,0.25, and "
        "values that it is to have; of several, all combinations",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=DEFAULT_OUT, help="default: %(default)s"
    )
    try:
        options = parser.parse_args(arguments)
        require_kernels("timed")
        check(options)
    except ResultsError as error:
        print(clean(str(error)), file=sys.stderr)
        return 2
    return 0


def kinds_of(text: str) -> list[str]:
    """Return the kinds that a list names; argparse shows the error."""
    kinds = text.split(",")
    for kind in kinds:
        if kind not in DRAWN_KINDS:
            raise argparse.ArgumentTypeError(
                f"there is no kind {cut(kind, 40)!r}: they are {', '.join(DRAWN_KINDS)}"
            )
    return list(dict.fromkeys(kinds))


def check(options: argparse.Namespace) -> None:
    """Time, print and write; raise ResultsError if that ends early, after showing what there is."""
    import torch

    from pagedattn.benchmarking.choices import compile_ways, grid_of, time_ways

    try:
        tried = grid_of(options.tried)
    except ValueError as error:
        raise ResultsError(f"{error}.") from None
    require_folder(options.out)
    shapes = drawn_shapes(options.kinds, options.batches, options.seed)
    found: list[TimedWays] = []
    doing, ended = "compiling", None
    try:
        print(f"{len(shapes)} batches: compiling their ways", flush=True)
        # by fork a process would have a context of the GPU that it cannot use
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(num_processes(len(shapes)), spawn) as pool:
            list(pool.map(compile_ways, shapes))
        for i, shape in enumerate(shapes):
            doing = shape.name
            found.append(time_ways(shape, tried))
            torch.cuda.empty_cache()
            print(f"{i + 1} of {len(shapes)}: {found[-1]}", flush=True)
    except (ValueError, RuntimeError, ImportError, AssertionError, KeyboardInterrupt) as error:
        told = str(error).strip().partition("\n")[0].rstrip(".:") or "interrupted"
        ended = f"It ended at {doing}: {told}."
    if found:
        show(found, options.out)
    if ended is not None:
        raise ResultsError(ended)


def num_processes(num_batches: int) -> int:
    """Return how many processes compile: each has a batch's K and V and as much again."""
    import torch

    free, _ = torch.cuda.mem_get_info()
    return max(1, min(MOST_PROCESSES, os.cpu_count() or 1, num_batches, free // PROCESS_BYTES))


def show(found: "list[TimedWays]", out: Path) -> None:
    """Print tables, and write every way and the picture; raise ResultsError if that fails."""
    import torch

    from pagedattn.benchmarking.choices import kind_table, loss_table, to_frame, trial_table
    from pagedattn.benchmarking.choices_plot import draw_choices
    from pagedattn.report.style import plain_style, save

    for table in (kind_table(found), trial_table(found), loss_table(found)):
        if table.lines:
            print(f"\n{table.as_text()}")

    def write(folder: Path) -> None:
        to_frame(found).to_csv(
            folder / f"{NAME}.csv", index=False, float_format="%.3f", lineterminator="\n"
        )
        with plain_style():
            save(draw_choices(found, torch.cuda.get_device_name()), folder / f"{NAME}.png")

    written, _ = write_into(out, (), write)
    print(f"\nWritten to {clean(str(out))}: {', '.join(written)}")


if __name__ == "__main__":
    sys.exit(main())
