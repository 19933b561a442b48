#!/usr/bin/env python3
"""See where the time of one launch of a CUDA kernel goes, program by program.

``python tools/trace_kernel.py decode-B1-8k`` launches a row over cold inputs, by a kernel
that notes when its programs come to named moments. It prints them, and writes a picture and the
moments of each program into figures/local/. docs/IMPLEMENTATION.md says how to read them.
"""

import argparse
import difflib
import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("pagedattn") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pagedattn.config import ConfigError
from pagedattn.report.arguments import Parser
from pagedattn.report.needs import require_kernels
from pagedattn.report.output import write_into
from pagedattn.report.text import clean, cut, duration, number
from pagedattn.report.values import ResultsError
from pagedattn.workloads import GPU_SHAPES, AttentionShape, shape_of_name

DEFAULT_OUT = Path("figures") / "local"


def main(arguments: list[str] | None = None) -> int:
    """Trace a row; return 0, or 2 after one sentence on stderr."""
    parser = Parser(prog="trace_kernel.py", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "row",
        metavar="ROW",
        help="a row of the benchmarks, such as decode-B1-8k; docs/BENCHMARK_RESULTS.md names them, "
        "and others may be named alike, such as chunk-512-over-8k-h28x4",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=DEFAULT_OUT, help="default: %(default)s"
    )
    try:
        options = parser.parse_args(arguments)
        shape = shape_of(options.row)
        require_kernels("traced")
        trace(shape, options)
    except ResultsError as error:
        print(clean(str(error)), file=sys.stderr)
        return 2
    return 0


def shape_of(name: str) -> AttentionShape:
    """Return the row's shape; raise ResultsError if there is none, or it is several launches."""
    shapes = {shape.name: shape for shape in GPU_SHAPES}
    try:
        shape = shapes.get(name) or shape_of_name(name)
    except ConfigError as error:
        raise ResultsError(f"{name}: {error}") from None
    if shape is None:
        near = difflib.get_close_matches(name, shapes, n=5, cutoff=0.5)
        rows = f"near it are {', '.join(near)}" if near else "one is decode-B1-8k"
        raise ResultsError(f"There is no row {cut(name, 80)!r}: {rows}.")
    if shape.shared_prefix:
        raise ResultsError(
            f"{name} is several launches, as its sequences share blocks that are read once: "
            f"only a row of one launch can be traced."
        )
    return shape


def trace(shape: AttentionShape, options: argparse.Namespace) -> None:
    """Launch, print and write; raise ResultsError if the row or the folder cannot be used."""
    import torch

    from pagedattn.benchmarking.launch_trace import (
        clock_step_ns,
        moment_table,
        phase_table,
        to_frame,
        typical,
    )
    from pagedattn.benchmarking.trace_plot import draw_trace
    from pagedattn.benchmarking.tracing import trace_row
    from pagedattn.report.style import plain_style, save

    try:
        found = trace_row(shape)
    except torch.OutOfMemoryError:
        raise ResultsError(f"{shape.name} needs more memory than this GPU has free.") from None
    except ValueError as error:
        raise ResultsError(f"{shape.name} cannot be traced: {error}.") from None
    one = typical(found.traces)
    cost = (
        f"a launch takes {number(found.usual_seconds * 1e6)} µs, "
        f"and {number(found.seconds * 1e6)} µs while it notes moments"
    )
    rate = f"{number(one.read_gb_per_s(shape.kv_bytes))} GB/s"
    read = f"{number(shape.kv_bytes * 1e-6)} MB of K and V at {rate} from first asked to last there"
    print(moment_table(found.traces, f"{shape.name}: {cost}").as_text())
    print(f"\n{phase_table(found.traces, read).as_text()}")
    print(f"\nThe clock moves in steps of {clock_step_ns(found.traces)} ns.")

    def write(folder: Path) -> None:
        to_frame(found.traces).to_csv(
            folder / f"{shape.name}.csv", index=False, float_format="%.3f", lineterminator="\n"
        )
        with plain_style():
            subtitle = (
                f"{torch.cuda.get_device_name()}: the median of {len(found.traces)} launches, "
                f"{duration(one.span_us)} from first start to last end; {read}."
            )
            save(draw_trace(one, shape.name, subtitle), folder / f"{shape.name}.png")

    written, _ = write_into(options.out, (), write)
    print(f"\nWritten to {clean(str(options.out))}: {', '.join(written)}")


if __name__ == "__main__":
    sys.exit(main())
