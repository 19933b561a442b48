"""The command line of ``tools/paged_attention_benchmark.py``."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pagedattn.calculator.output import check_outputs, write_outputs
from pagedattn.calculator.result import Calculation
from pagedattn.calculator.settings import Settings, check_max_model_len
from pagedattn.calculator.text import as_text
from pagedattn.calculator.workload import Workload, workload_names
from pagedattn.config import ConfigError, ModelConfig, preset_names
from pagedattn.hardware import GIB, GPU, find_gpu, gpu_names, own_gpu
from pagedattn.memory import KV_SCALES, KVMemory
from pagedattn.report.text import clean
from pagedattn.report.values import ResultsError
from pagedattn.workloads import TraceError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

DEFAULT_GPU = "v100-32gb"
DEFAULT_OUT = Path("figures") / "local"
FORMATS = ("png", "svg")
_KV_DTYPES = ("auto", "bfloat16", "float16", "float32", "fp8")
_USUAL_LENGTH = 2048
_MOST_GIB = 1 << 10
_WASTE_TOKENS, _USER_TOKENS = 471, 512  # of 2048; fewer where requests are shorter
_OPTIONS = {
    "gpu": "--gpu",
    "block_size": "--block-size",
    "scales": "--kv-scales",
    "tensor_parallel_size": "--tensor-parallel-size",
}

_EXAMPLES = """\
examples:
  python tools/paged_attention_benchmark.py --gpu v100-32gb
      Llama-2-7B on a V100: the tutorial's numbers, in less than a minute and without a GPU
  python tools/paged_attention_benchmark.py --gpu h100 --model gemma-3-27b --max-model-len 32768
      a model of which most layers have a window
  python tools/paged_attention_benchmark.py --gpu 48 --model path/to/config.json --kv-dtype fp8
      any GPU of 48 GiB, any model of Hugging Face's
  python tools/paged_attention_benchmark.py --gpu a100 --model llama-3-70b --tensor-parallel-size 8
      one of 8 GPUs, each with one of the 8 KV heads
"""


class _Parser(argparse.ArgumentParser):
    """Raises what argparse finds wrong, so that it is told in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help shows what is allowed.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, 2 after one sentence on stderr, or 130 after Ctrl-C."""
    progress = _Progress()
    try:
        options = make_parser().parse_args(arguments)
        formats = () if options.no_plot else options.formats
        settings = read_settings(options)
        check_outputs(options.out, formats, options.json, files_read(options))
        result = Calculation.of(settings, progress)
        written = write_outputs(result, options.out, formats, options.json)
        progress.end()
        _say(as_text(result))
        if written:
            _say(f"\nWritten: {', '.join(written)}")
        sys.stdout.flush()
    except (ConfigError, TraceError, ResultsError) as error:
        progress.end()
        print(clean(str(error)), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        progress.end()
        return 130
    except BrokenPipeError:
        # the reader of our output left; nothing more can be said to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


class _Progress:
    """Tells on stderr what is being done, in one changing line; nothing if it is no terminal."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        self._length = 0

    def __call__(self, text: str) -> None:
        if self._shown:
            sys.stderr.write(f"\r{text:<{self._length}}")
            sys.stderr.flush()
            self._length = len(text)

    def end(self) -> None:
        """Clear the line."""
        if self._length:
            sys.stderr.write(f"\r{'':<{self._length}}\r")
            sys.stderr.flush()
            self._length = 0


def read_settings(options: argparse.Namespace) -> Settings:
    """Return what the options ask for; raise ConfigError or TraceError."""
    model = find_model(options.model)
    longest = options.max_model_len
    if longest is None:
        longest = min(_USUAL_LENGTH, model.max_model_len)
    check_max_model_len(model, longest)
    if options.trace is not None:
        workload = Workload.of_trace(options.trace, longest)
    else:
        workload = Workload.named(options.workload, longest, options.seed)
    kv_dtype = {"auto": None, "fp8": "float8_e4m3"}.get(options.kv_dtype, options.kv_dtype)
    parallel = options.tensor_parallel_size
    with _by_option():
        gpu = _gpu(options.gpu)
        memory = KVMemory(model, options.block_size, kv_dtype, options.kv_scales, parallel)
    return Settings(
        gpu=gpu,
        memory=memory,
        max_model_len=longest,
        utilization=options.gpu_memory_utilization,
        waste_requests=_scaled(workload, "--mean-tokens", options.mean_tokens, _WASTE_TOKENS),
        user_requests=_scaled(workload, "--user-tokens", options.user_tokens, _USER_TOKENS),
        num_users=options.users,
        system_prompt_tokens=options.system_prompt_tokens,
        own_tokens=options.own_tokens,
        seed=options.seed,
        kv_bytes=options.kv_memory,
        weight_bytes=options.weights,
    )


def files_read(options: argparse.Namespace) -> list[Path]:
    """Return the files that :func:`read_settings` reads: a model's and a trace."""
    files = []
    if _preset(options.model) is None:
        model = Path(options.model)
        files.append(model / "config.json" if model.is_dir() else model)
    if options.trace is not None:
        files.append(options.trace)
    return files


def find_model(name: str) -> ModelConfig:
    """Return a preset, or the model of a ``config.json`` or of the folder that holds it."""
    preset = _preset(name)
    if preset is not None:
        return preset
    if Path(name).exists() or name.endswith(".json"):
        return ModelConfig.from_hf(name)
    raise ConfigError(
        f"--model must be the path of a config.json or one of {', '.join(preset_names())}, "
        f"not {name!r}."
    )


def _preset(name: str) -> ModelConfig | None:
    try:
        return ModelConfig.preset(name)
    except ConfigError:
        return None


@contextlib.contextmanager
def _by_option() -> Iterator[None]:
    """Name what is wrong as the command line does; sentences begin with a parameter's name."""
    try:
        yield
    except ConfigError as error:
        name, _, rest = str(error).partition(" ")
        raise ConfigError(f"{_OPTIONS.get(name, name)} {rest}") from None


def _gpu(name: str | None) -> GPU:
    if name is not None:
        return find_gpu(name)
    return own_gpu() or find_gpu(DEFAULT_GPU)


def _scaled(workload: Workload, option: str, asked: float | None, usual: int) -> Workload:
    if asked is None and workload.name == "trace":
        return workload
    try:
        if asked is not None:
            return workload.scaled_to(asked)
        return workload.scaled_to(min(usual, usual * workload.max_model_len / _USUAL_LENGTH))
    except ConfigError as error:
        if asked is None:  # requests of a few tokens have no such mean
            return workload
        raise ConfigError(str(error).replace("mean tokens", option, 1)) from None


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = _Parser(
        prog="paged_attention_benchmark.py",
        description="Calculate what a paged KV cache saves: waste by cause, users that fit, and a "
        "shared prompt. The project's own reservations and block manager are filled with requests "
        "and counted; no model is run.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_memory(parser.add_argument_group("memory"))
    _add_requests(parser.add_argument_group("requests"))
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    output.add_argument(
        "--out",
        type=Path,
        default=DEFAULT_OUT,
        metavar="DIR",
        help="folder for benchmark_results (default: %(default)s)",
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


def _add_memory(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--gpu",
        metavar="NAME",
        help=f"{', '.join(gpu_names())}, or a number of GiB (default: this machine's, else "
        f"{DEFAULT_GPU})",
    )
    group.add_argument(
        "--model",
        default="llama-2-7b",
        metavar="NAME",
        help="path of a config.json, or a preset (default: %(default)s)",
    )
    group.add_argument(
        "--max-model-len",
        type=int,
        metavar="TOKENS",
        help="longest request, to which longer ones are cut (default: 2048, or the model's "
        "maximum if that is less)",
    )
    group.add_argument(
        "--block-size", type=int, default=16, metavar="TOKENS", help="default: %(default)s"
    )
    group.add_argument(
        "--kv-dtype",
        choices=_KV_DTYPES,
        default="auto",
        help="of the KV cache (default: auto, the model's)",
    )
    group.add_argument(
        "--kv-scales",
        choices=KV_SCALES,
        default="none",
        help="what has a scale of 4 bytes in an fp8 cache (default: %(default)s)",
    )
    group.add_argument(
        "--tensor-parallel-size", type=int, default=1, metavar="GPUS", help="default: %(default)s"
    )
    group.add_argument(
        "--gpu-memory-utilization",
        type=_number,
        default=0.8,
        metavar="SHARE",
        help="share of the GPU's memory for weights and KV cache (default: %(default)s)",
    )
    group.add_argument(
        "--kv-memory",
        type=_gib,
        metavar="GIB",
        help="memory of the KV cache itself, as vLLM prints it at its start",
    )
    group.add_argument(
        "--weights",
        type=_gib,
        metavar="GIB",
        help="memory of the weights on one GPU (default: from the model's parameters)",
    )


def _add_requests(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--workload",
        choices=workload_names(),
        default="sharegpt",
        help="lengths of requests, scaled to the means below (default: %(default)s)",
    )
    group.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="lengths of a trace instead (Azure CSV or Mooncake JSONL), as they are unless a mean "
        "is given or a request is longer than --max-model-len",
    )
    group.add_argument(
        "--mean-tokens",
        type=_number,
        metavar="TOKENS",
        help="mean tokens that a running request holds in part 1 (default: 471, or 23 %% of "
        "shorter requests)",
    )
    group.add_argument(
        "--user-tokens",
        type=_number,
        metavar="TOKENS",
        help="the same in part 2 (default: 512, or 25 %%)",
    )
    group.add_argument(
        "--users",
        type=int,
        default=100,
        help="that share a prompt in part 3 (default: %(default)s)",
    )
    group.add_argument(
        "--system-prompt-tokens",
        type=int,
        default=500,
        metavar="TOKENS",
        help="that they share (default: %(default)s)",
    )
    group.add_argument(
        "--own-tokens",
        type=int,
        default=100,
        metavar="TOKENS",
        help="that each has besides (default: %(default)s)",
    )
    group.add_argument("--seed", type=_seed, default=0, help="default: %(default)s")


def _number(text: str) -> float:
    value = _float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, not {text!r}")
    return value


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _gib(text: str) -> int:
    value = _float(text)
    if not 0 < value <= _MOST_GIB:
        raise argparse.ArgumentTypeError(
            f"must be a number of GiB above 0 and at most {_MOST_GIB}, not {text!r}"
        )
    return math.floor(value * GIB)


def _seed(text: str) -> int:
    value = int(text) if text.strip().isdecimal() else -1
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be 0 or more and below 2**63, not {text!r}")
    return value


def _formats(text: str) -> tuple[str, ...]:
    asked = [name.strip().lower() for name in text.split(",")]
    if not set(asked) <= set(FORMATS):
        raise argparse.ArgumentTypeError(f"must be png, svg or png,svg, not {text!r}")
    return tuple(name for name in FORMATS if name in asked)


def _say(text: str) -> None:
    """Print, replacing letters that the terminal's encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding))
