"""What a model and a KV cache look like, in numbers: read from a Hugging Face config or a preset.

Every mistake raises :class:`ConfigError` with one sentence that names the key, what was given and
what is allowed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from os import PathLike
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

DTYPE_BYTES: Mapping[str, int] = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3": 1,
}
"""Bytes of one element of each dtype that a KV cache can hold."""

MODEL_DTYPES = ("float16", "bfloat16", "float32")
"""The dtypes that a model can compute in."""

CACHE_DTYPES = tuple(sorted(DTYPE_BYTES))
"""The dtypes that a KV cache can hold."""


class ConfigError(ValueError):
    """A configuration is malformed, incomplete or contradicts itself."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The numbers of a decoder-only transformer that decide what its KV cache costs.

    ``head_size`` is the width of one head; it need not be ``hidden_size / num_query_heads``.
    ``max_model_len`` counts tokens. ``num_parameters`` is ``None`` where it is not known: a
    Hugging Face config does not say it. Raises :class:`ConfigError`.
    """

    name: str
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    max_model_len: int
    dtype: str
    num_parameters: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"name must be a non-empty string, not {short_repr(self.name)}.")
        for key in _COUNTS:
            object.__setattr__(self, key, positive_int(key, getattr(self, key)))
        if self.num_parameters is not None:
            parameters = positive_int("num_parameters", self.num_parameters)
            object.__setattr__(self, "num_parameters", parameters)
        _check_groups("num_query_heads", self.num_query_heads, "num_kv_heads", self.num_kv_heads)
        one_of("dtype", self.dtype, MODEL_DTYPES)

    @property
    def num_queries_per_kv(self) -> int:
        """How many query heads share one KV head: 1 for multi-head attention."""
        return self.num_query_heads // self.num_kv_heads

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | PathLike[str]) -> ModelConfig:
        """Read a Hugging Face ``config.json``: its mapping, its path, or the folder that holds it.

        A nested ``text_config`` is used where there is one. ``head_dim`` and
        ``num_key_value_heads`` are honoured; absent or null, they become ``hidden_size / heads``
        and the number of query heads. Without a dtype the model is ``float32``, as transformers
        has it. Raises :class:`ConfigError`.
        """
        if isinstance(source, Mapping):
            return _from_mapping(source, "model")
        if not isinstance(source, str | PathLike):
            raise ConfigError(
                f"source must be a mapping or the path of a config.json or of its folder, "
                f"not {short_repr(source)}."
            )
        path = Path(source)
        if path.is_dir():
            path = path / "config.json"
        return _from_mapping(_read_json(path), path.absolute().parent.name or "model")

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """Return a well-known model by its short name or its hub id, in any case of letters.

        Raises :class:`ConfigError`, which names the known ones.
        """
        key = name.lower() if isinstance(name, str) else ""
        key = _ALIASES.get(key, key)
        if key not in _PRESETS:
            raise ConfigError(
                f"preset must be one of {', '.join(preset_names())}, not {short_repr(name)}."
            )
        return _PRESETS[key]


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """How a KV cache is cut: ``num_blocks`` blocks of ``block_size`` tokens, in ``dtype``.

    Raises :class:`ConfigError`.
    """

    block_size: int
    num_blocks: int
    dtype: str

    def __post_init__(self) -> None:
        for key in ("block_size", "num_blocks"):
            object.__setattr__(self, key, positive_int(key, getattr(self, key)))
        one_of("dtype", self.dtype, CACHE_DTYPES)

    @property
    def num_slots(self) -> int:
        """How many tokens the cache can hold."""
        return self.block_size * self.num_blocks


def preset_names() -> tuple[str, ...]:
    """Return the short names that :meth:`ModelConfig.preset` knows, in its table's order."""
    return tuple(_PRESETS)


def positive_int(key: str, value: object) -> int:
    """Return ``value`` as a plain ``int``; raise :class:`ConfigError` unless it is one, above 0.

    Booleans are not integers here, nor are floats with a whole value; numpy's integers are.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value <= 0:
        raise ConfigError(f"{key} must be a positive integer, not {short_repr(value)}.")
    return int(value)


def one_of(key: str, value: object, allowed: tuple[str, ...]) -> str:
    """Return ``value``; raise :class:`ConfigError` unless it is one of the allowed strings."""
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{key} must be one of {', '.join(allowed)}, not {short_repr(value)}.")
    return value


_COUNTS = (
    "num_layers",
    "num_query_heads",
    "num_kv_heads",
    "head_size",
    "hidden_size",
    "max_model_len",
)

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_LENGTH = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads")
_DTYPE = ("dtype", "torch_dtype")


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"source must be the path of a config.json or of its folder, "
            f"but {path} cannot be read ({reason})."
        ) from error
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise ConfigError(f"{path} must hold JSON, but it does not ({error}).") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} must hold a JSON object, not {short_repr(loaded)}.")
    return loaded


def _from_mapping(config: Mapping[str, Any], fallback_name: str) -> ModelConfig:
    text = config.get("text_config")
    if text is None:
        text = config
    elif not isinstance(text, Mapping):
        raise ConfigError(f"text_config must be an object, not {short_repr(text)}.")
    if text.get("kv_lora_rank") is not None:
        raise ConfigError(
            f"kv_lora_rank must be absent, not {short_repr(text['kv_lora_rank'])}: "
            "latent attention caches no K and V for each head."
        )
    heads_key, num_heads = _required(text, _HEADS)
    hidden_key, hidden_size = _required(text, _HIDDEN)
    kv_key, num_kv_heads = _kv_heads(text, num_heads)
    _check_groups(heads_key, num_heads, kv_key, num_kv_heads)
    if text.get("head_dim") is not None:
        head_size = positive_int("head_dim", text["head_dim"])
    elif hidden_size % num_heads == 0:
        head_size = hidden_size // num_heads
    else:
        raise ConfigError(
            f"{hidden_key} must be a multiple of {heads_key} where head_dim is absent, "
            f"not {hidden_size} for {num_heads} heads."
        )
    return ModelConfig(
        name=_name(config, fallback_name),
        num_layers=_required(text, _LAYERS)[1],
        num_query_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        hidden_size=hidden_size,
        max_model_len=_required(text, _LENGTH)[1],
        dtype=_dtype(text, config),
    )


def _name(config: Mapping[str, Any], fallback: str) -> str:
    for key in ("_name_or_path", "model_type"):
        value = config.get(key)
        if isinstance(value, str) and value:
            return value
    return fallback


def _required(config: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, int]:
    for key in keys:
        if key in config:
            return key, positive_int(key, config[key])
    raise ConfigError(
        f"{keys[0]} must be a positive integer, but the config has neither it nor "
        f"{' or '.join(keys[1:])}."
    )


def _kv_heads(config: Mapping[str, Any], num_heads: int) -> tuple[str, int]:
    multi_query = config.get("multi_query")
    if multi_query is not None and not isinstance(multi_query, bool):
        raise ConfigError(f"multi_query must be true or false, not {short_repr(multi_query)}.")
    # Falcon: the newer architecture counts its KV heads, the older one has 1 or all of them.
    if multi_query and not config.get("new_decoder_architecture"):
        return "multi_query", 1
    nested = config.get("attn_config")  # MPT's and DBRX's
    for source in (config, nested if isinstance(nested, Mapping) else {}):
        for key in _KV_HEADS:
            if source.get(key) is not None:
                return key, positive_int(key, source[key])
    return _KV_HEADS[0], num_heads


def _dtype(*configs: Mapping[str, Any]) -> str:
    for config in configs:
        for key in _DTYPE:
            if config.get(key) is not None:
                return one_of(key, config[key], MODEL_DTYPES)
    return "float32"


def _check_groups(query_key: str, num_heads: int, kv_key: str, num_kv_heads: int) -> None:
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"{query_key} must be a multiple of {kv_key}, "
            f"not {num_heads} query heads for {num_kv_heads} KV heads."
        )


# name: layers, query heads, KV heads, head size, hidden size, maximum length, dtype, parameters,
# from each model's config.json; OPT-175B's, which is not on the hub, from the OPT paper's Table 1.
_PRESETS = {
    name: ModelConfig(name, *row)
    for name, row in {
        "gpt2": (12, 12, 12, 64, 768, 1024, "float32", 124_439_808),
        "opt-125m": (12, 12, 12, 64, 768, 2048, "float16", 125_239_296),
        "opt-13b": (40, 40, 40, 128, 5120, 2048, "float16", 12_853_473_280),
        "opt-66b": (64, 72, 72, 128, 9216, 2048, "float16", 65_719_701_504),
        "opt-175b": (96, 96, 96, 128, 12288, 2048, "float16", 174_604_468_224),
        "llama-2-7b": (32, 32, 32, 128, 4096, 4096, "float16", 6_738_415_616),
        "llama-2-13b": (40, 40, 40, 128, 5120, 4096, "float16", 13_015_864_320),
        "llama-3-8b": (32, 32, 8, 128, 4096, 8192, "bfloat16", 8_030_261_248),
        "llama-3-70b": (80, 64, 8, 128, 8192, 8192, "bfloat16", 70_553_706_496),
        "mistral-7b": (32, 32, 8, 128, 4096, 32768, "bfloat16", 7_248_023_552),
        "qwen3-0.6b": (28, 16, 8, 128, 1024, 40960, "bfloat16", 596_049_920),
        "qwen3-8b": (36, 32, 8, 128, 4096, 40960, "bfloat16", 8_190_735_360),
        "smollm2-135m": (30, 9, 3, 64, 576, 8192, "bfloat16", 134_515_008),
    }.items()
}

_ALIASES = {
    "openai-community/gpt2": "gpt2",
    "facebook/opt-125m": "opt-125m",
    "facebook/opt-13b": "opt-13b",
    "facebook/opt-66b": "opt-66b",
    "meta-llama/llama-2-7b-hf": "llama-2-7b",
    "meta-llama/llama-2-13b-hf": "llama-2-13b",
    "meta-llama/meta-llama-3-8b": "llama-3-8b",
    "meta-llama/meta-llama-3-70b": "llama-3-70b",
    "mistralai/mistral-7b-v0.3": "mistral-7b",
    "qwen/qwen3-0.6b": "qwen3-0.6b",
    "qwen/qwen3-8b": "qwen3-8b",
    "huggingfacetb/smollm2-135m": "smollm2-135m",
}
