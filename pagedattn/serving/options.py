"""The options of ``tools/vllm_real_benchmark.py``, and what they ask for."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import NoReturn

from pagedattn.report.arguments import count, positive, whole
from pagedattn.serving.settings import ON_A_CPU, ON_A_GPU, POLICIES, TESTS, LoadSettings

DEFAULT_MODEL = "facebook/opt-125m"
DEFAULT_OUT = Path("figures") / "local"
DEFAULT_UTILIZATION = 0.9
DATASETS = ("synthetic", "sharegpt", "azure", "mooncake")
FORMATS = ("png", "svg")
PREFIX_TO_SHARE = 256

_EXAMPLES = """\
examples:
  python tools/fetch_model.py
  python tools/vllm_real_benchmark.py --model models/SmolLM2-135M-Instruct
      a small real model, on a GPU or a CPU
  python tools/vllm_real_benchmark.py --model llama-3-8b --load-format dummy
      random weights in the shape of Llama-3-8B: nothing is downloaded but vLLM itself
  python tools/vllm_real_benchmark.py --model models/SmolLM2-135M-Instruct --compare policy
      the same load with prefix caching off and on, several block sizes, eager and CUDA graphs
"""


class UsageError(ValueError):
    """The command cannot be carried out; the message is one sentence with the next step."""


class _Parser(argparse.ArgumentParser):
    """Raises what argparse finds wrong, so that it is told in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help shows what is allowed.")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = _Parser(
        prog="vllm_real_benchmark.py",
        description="Run real inference on vLLM and measure throughput, what waiting users see, "
        "and what memory is really used, beside what this project's calculator and block manager "
        "say. On a GPU, or at a reduced scale on a CPU.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--test", choices=(*TESTS, "all"), default="all", help="default: %(default)s"
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        choices=(*POLICIES, "policy"),
        default=[],
        metavar="WHAT",
        help=f"start several engines that differ in {', '.join(POLICIES)}; policy is all of them",
    )
    _add_engine(parser.add_argument_group("engine"))
    _add_load(parser.add_argument_group("load"))
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json", type=Path, metavar="FILE", help="results file, which tools/plot.py reads"
    )
    output.add_argument(
        "--out",
        type=Path,
        default=DEFAULT_OUT,
        metavar="DIR",
        help="folder for the plots (default: %(default)s)",
    )
    output.add_argument(
        "--formats",
        type=_formats,
        default=FORMATS,
        metavar="LIST",
        help="png, svg or png,svg (default: both)",
    )
    output.add_argument("--no-plot", action="store_true", help="draw nothing")
    return parser


def _add_engine(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME",
        help="hub name, folder, or with --load-format dummy a preset (default: %(default)s)",
    )
    group.add_argument(
        "--load-format",
        choices=("auto", "dummy"),
        default="auto",
        help="dummy: random weights (default: %(default)s)",
    )
    group.add_argument("--block-size", type=positive, metavar="TOKENS", help="default: vLLM's")
    group.add_argument(
        "--max-model-len",
        type=positive,
        metavar="TOKENS",
        help=f"longest request (default: {ON_A_GPU.max_model_len}, on a CPU "
        f"{ON_A_CPU.max_model_len}, or the model's maximum if that is less)",
    )
    group.add_argument(
        "--gpu-memory-utilization",
        type=_share,
        default=DEFAULT_UTILIZATION,
        metavar="SHARE",
        help="share of the GPU's memory that vLLM may take (default: %(default)s)",
    )
    group.add_argument(
        "--prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether prompts that begin alike share blocks (default: they do)",
    )
    group.add_argument(
        "--tensor-parallel-size",
        type=positive,
        default=1,
        metavar="GPUS",
        help="default: %(default)s",
    )
    group.add_argument("--attention-backend", metavar="NAME", help="vLLM's name of one")
    group.add_argument(
        "--enforce-eager",
        action=argparse.BooleanOptionalAction,
        help="no CUDA graphs and no compilation (default: on a CPU, where compiling takes longer "
        "than the run)",
    )
    group.add_argument("--seed", type=_seed, default=0, help="default: %(default)s")


def _add_load(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dataset",
        nargs="+",
        default=["synthetic"],
        metavar=("KIND", "FILE"),
        help="synthetic, sharegpt FILE, azure FILE or mooncake FILE (default: synthetic)",
    )
    group.add_argument(
        "--requests",
        type=positive,
        metavar="N",
        help=f"of throughput and memory (default: {ON_A_GPU.requests}, on a CPU "
        f"{ON_A_CPU.requests})",
    )
    group.add_argument(
        "--users",
        type=_users,
        metavar="LIST",
        help="steps of the scaling test, as 1,8,64 (default: powers of two up to "
        f"{ON_A_GPU.users[-1]}, on a CPU {ON_A_CPU.users[-1]}); it stops when more users bring "
        "nothing more",
    )
    group.add_argument(
        "--prompt-tokens",
        type=_range,
        metavar="A-B",
        help="of a synthetic prompt, without what is shared",
    )
    group.add_argument("--output-tokens", type=_range, metavar="A-B", help="to generate")
    group.add_argument(
        "--shared-prefix",
        type=count,
        default=0,
        metavar="TOKENS",
        help="that all synthetic prompts begin with (default: 0, and with --compare "
        f"prefix-caching {PREFIX_TO_SHARE} or a quarter of the longest request)",
    )
    group.add_argument(
        "--block-sizes",
        type=_users,
        metavar="LIST",
        help="that --compare block-size takes (default: 16,32,64, on a CPU 32,64,128)",
    )


def _seed(text: str) -> int:
    return whole(text, 0, 2**32, "a whole number of 0 or more and below 2**32")


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, not {text!r}")
    return value


def _users(text: str) -> tuple[int, ...]:
    try:
        values = [positive(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"must be whole numbers of 1 or more as 1,8,64, not {text!r}"
        ) from None
    return tuple(sorted(set(values)))


def _range(text: str) -> tuple[int, int]:
    try:
        low, _, high = text.partition("-")
        values = positive(low), positive(high or low)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"must be A-B, whole numbers of 1 or more as 100-1024, not {text!r}"
        ) from None
    if values[0] > values[1]:
        raise argparse.ArgumentTypeError(f"must rise, as 100-1024, not {text!r}")
    return values


def _formats(text: str) -> tuple[str, ...]:
    asked = [name.strip().lower() for name in text.split(",")]
    if not set(asked) <= set(FORMATS):
        raise argparse.ArgumentTypeError(f"must be png, svg or png,svg, not {text!r}")
    return tuple(name for name in FORMATS if name in asked)


def load_settings(options: argparse.Namespace) -> LoadSettings:
    """Return which requests were asked for; raise UsageError."""
    kind, *rest = options.dataset
    if kind not in DATASETS:
        raise UsageError(f"--dataset must be one of {', '.join(DATASETS)}, not {kind!r}.")
    if kind == "synthetic":
        if rest:
            raise UsageError("--dataset synthetic takes no file.")
        return LoadSettings(shared_prefix=options.shared_prefix)
    if len(rest) != 1:
        raise UsageError(f"--dataset {kind} needs one file: --dataset {kind} FILE.")
    if options.shared_prefix:
        raise UsageError("--shared-prefix is for the synthetic load.")
    path = Path(rest[0])
    if not path.is_file():
        raise UsageError(f"--dataset {kind}: there is no file {path}.")
    return LoadSettings(kind, path)
