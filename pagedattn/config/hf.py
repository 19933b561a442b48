"""Read a Hugging Face ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from reprlib import repr as short_repr
from typing import TYPE_CHECKING, Any

from pagedattn.config.checks import MODEL_DTYPES, ConfigError, check_groups, one_of, positive_int
from pagedattn.config.layers import read_layers, refuse_unknown_memory
from pagedattn.config.model import ModelConfig
from pagedattn.config.parameters import count_parameters

if TYPE_CHECKING:
    from pathlib import Path

_MOST_LAYERS = 10_000
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_LENGTH = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads")
_DTYPE = ("dtype", "torch_dtype")

# What transformers takes where a model's config.json says nothing.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "cohere2": {"sliding_window_pattern": 4, "tie_word_embeddings": True},
    "gemma": {"head_dim": 256, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 256, "sliding_window_pattern": 2, "tie_word_embeddings": True},
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131_072,
        "sliding_window_pattern": 6,
        "vocab_size": 262_208,
        "tie_word_embeddings": True,
    },
    # gpt-oss has no dtype in its config; what is not quantised is stored in bfloat16
    "gpt_oss": {
        "head_dim": 64,
        "sliding_window_pattern": 2,
        "attention_bias": True,
        "dtype": "bfloat16",
    },
    "gpt2": {"tie_word_embeddings": True},
    "opt": {"tie_word_embeddings": True},
    "qwen2": {"use_sliding_window": False},
    "qwen2_moe": {"use_sliding_window": False},
    "qwen3": {"head_dim": 128, "use_sliding_window": False},
    "qwen3_moe": {"use_sliding_window": False},
    "qwen3_next": {"head_dim": 256, "full_attention_interval": 4},
    "smollm3": {"tie_word_embeddings": True},
    "starcoder2": {"tie_word_embeddings": True},
}


def read_json(path: Path) -> Mapping[str, Any]:
    """Return the JSON object of a file; raise :class:`ConfigError` if it holds none."""
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


def model_from_mapping(config: Mapping[str, Any], fallback_name: str) -> ModelConfig:
    """Return the model that a config describes; raise :class:`ConfigError`."""
    text = _text_config(config)
    refuse_unknown_memory(text)
    heads_key, num_heads = _required(text, _HEADS)
    hidden_key, hidden_size = _required(text, _HIDDEN)
    kv_key, num_kv_heads = _kv_heads(text, num_heads)
    check_groups(heads_key, num_heads, kv_key, num_kv_heads)
    if text.get("head_dim") is not None:
        head_size = positive_int("head_dim", text["head_dim"])
    elif hidden_size % num_heads == 0:
        head_size = hidden_size // num_heads
    else:
        raise ConfigError(
            f"{hidden_key} must be a multiple of {heads_key} where head_dim is absent, "
            f"not {hidden_size} for {num_heads} heads."
        )
    layers_key, num_layers = _required(text, _LAYERS)
    if num_layers > _MOST_LAYERS:
        raise ConfigError(
            f"{layers_key} must be at most {_MOST_LAYERS}, not {short_repr(num_layers)}."
        )
    layer_types, window = read_layers(text, num_layers)
    model = ModelConfig(
        name=_name(config, fallback_name),
        num_layers=num_layers,
        num_query_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        hidden_size=hidden_size,
        max_model_len=_required(text, _LENGTH)[1],
        dtype=_dtype(text, config),
        layer_types=layer_types,
        sliding_window=window,
    )
    return count_parameters(model, text, config)


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the language model's part of a config, its architecture's defaults filled in."""
    text = config.get("text_config")
    if text is None:
        text = config
    elif not isinstance(text, Mapping):
        raise ConfigError(f"text_config must be an object, not {short_repr(text)}.")
    kind = text.get("model_type")
    defaults = _DEFAULTS.get(kind, {}) if isinstance(kind, str) else {}
    missing = {key: value for key, value in defaults.items() if text.get(key) is None}
    if any(text.get(key) is not None for key in _DTYPE):
        missing.pop("dtype", None)
    return {**text, **missing}


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
