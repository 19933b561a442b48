"""The whole shape of well-known models, for an engine that fills them with random weights.

A :class:`~pagedattn.config.ModelConfig` has the numbers that decide what a KV cache costs; an
engine also needs the width of the layers between and the size of the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pagedattn.config import ConfigError, ModelConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

# preset: model type, width of the MLP, vocabulary, what else its config.json says
_SHAPES: dict[str, tuple[str, int, int, Mapping[str, Any]]] = {
    "opt-125m": ("opt", 3072, 50_272, {}),
    "opt-13b": ("opt", 20_480, 50_272, {}),
    "llama-2-7b": ("llama", 11_008, 32_000, {}),
    "llama-2-13b": ("llama", 13_824, 32_000, {}),
    "llama-3-8b": ("llama", 14_336, 128_256, {"rope_theta": 500_000.0}),
    "llama-3-70b": ("llama", 28_672, 128_256, {"rope_theta": 500_000.0}),
    "mistral-7b": ("mistral", 14_336, 32_768, {"rope_theta": 1e6, "sliding_window": None}),
    "qwen2.5-7b": ("qwen2", 18_944, 152_064, {"rope_theta": 1e6}),
    "qwen3-0.6b": ("qwen3", 3072, 151_936, {"rope_theta": 1e6, "tie_word_embeddings": True}),
    "qwen3-8b": ("qwen3", 12_288, 151_936, {"rope_theta": 1e6}),
    "qwen3-32b": ("qwen3", 25_600, 151_936, {"rope_theta": 1e6}),
    "smollm2-135m": ("llama", 1536, 49_152, {"rope_theta": 1e5, "tie_word_embeddings": True}),
}
_CLASSES = {
    "opt": "OPTForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def shape_names() -> tuple[str, ...]:
    """Names of the presets whose whole shape is known."""
    return tuple(_SHAPES)


def hf_config(name: str) -> dict[str, Any]:
    """Return what the ``config.json`` of a preset says, as far as an engine needs it.

    `name` is a preset's short name or hub id. Raises :class:`ConfigError` for another, and for a
    preset whose whole shape is not known.
    """
    model = ModelConfig.preset(name)
    if model.name not in _SHAPES:
        raise ConfigError(
            f"random weights need a preset whose whole shape is known, one of "
            f"{', '.join(_SHAPES)}, not {name!r}."
        )
    kind, width, vocabulary, more = _SHAPES[model.name]
    config: dict[str, Any] = {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_query_heads,
        "max_position_embeddings": model.max_model_len,
        "vocab_size": vocabulary,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": model.dtype,
    }
    if kind == "opt":
        config |= {
            "ffn_dim": width,
            "word_embed_proj_dim": model.hidden_size,
            "do_layer_norm_before": True,
            "activation_function": "relu",
            "pad_token_id": 1,
            "tie_word_embeddings": True,
        }
    else:
        config |= {
            "intermediate_size": width,
            "num_key_value_heads": model.num_kv_heads,
            "head_dim": model.head_size,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        }
    return config | dict(more)
