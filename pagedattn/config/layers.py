"""Which layers of a Hugging Face config see all tokens, which a window, and which keep no KV.

The ways to say it, in the order in which they are looked for:

- a list for each layer: ``layer_types`` (Qwen3, Gemma 3, gpt-oss), ``layers_block_type`` (Zamba2),
  or ``hybrid_override_pattern``, a letter a layer (Nemotron-H);
- which layers of a hybrid have attention: ``attn_layer_indices`` (Bamba), ``attn_layer_period`` and
  ``attn_layer_offset`` (Jamba), ``full_attention_interval`` (Qwen3-Next);
- ``sliding_window``: for the layers from ``max_window_layers`` on where ``use_sliding_window`` is
  there and true (Qwen2), for all but every n-th where ``sliding_window_pattern`` is n (Gemma 3,
  Cohere 2), else for all (Mistral).

The last ``num_kv_shared_layers`` layers use the K and V of earlier ones (Gemma 3n).
"""

from __future__ import annotations

from reprlib import repr as short_repr
from typing import TYPE_CHECKING, Any

from pagedattn.config.checks import ConfigError, positive_int

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_KINDS = {
    "full_attention": "full_attention",
    "attention": "full_attention",
    "hybrid": "full_attention",  # attention beside a recurrent state
    "sliding_attention": "sliding_attention",
    "linear_attention": "without_kv",
    "mamba": "without_kv",
    "mamba2": "without_kv",
    "conv": "without_kv",
    "mlp": "without_kv",
    "moe": "without_kv",
}
_LETTERS = {"*": "full_attention", "M": "mamba", "-": "mlp", "E": "moe"}

_CANNOT_BE_CALCULATED = {
    "kv_lora_rank": "latent attention caches no K and V for each head",
    "attention_chunk_size": "attention in chunks is not one of the layer kinds calculated here",
    "global_head_dim": "layers with heads of two sizes are not calculated here",
    "attn_type_list": "this way to say which layers keep K and V is not read here",
    "block_types": "this way to say which layers keep K and V is not read here",
}


_ENCODERS = (
    *("albert", "bert", "deberta", "deberta-v2", "distilbert", "electra", "modernbert", "roberta"),
    *("vit", "xlm-roberta"),
)


def refuse_unknown_memory(text: Mapping[str, Any]) -> None:
    """Raise :class:`ConfigError` if the config has K and V that cannot be calculated here."""
    for key, reason in _CANNOT_BE_CALCULATED.items():
        if text.get(key) is not None:
            raise ConfigError(f"{key} must be absent, not {short_repr(text[key])}: {reason}.")
    if text.get("model_type") in _ENCODERS:
        raise ConfigError(
            f"model_type must be a decoder's, not {short_repr(text['model_type'])}: an encoder "
            "keeps no KV cache."
        )
    if text.get("is_encoder_decoder"):
        raise ConfigError(
            f"is_encoder_decoder must be false, not {short_repr(text['is_encoder_decoder'])}: only "
            "decoders are calculated here."
        )
    value_size = text.get("v_head_dim")
    if value_size is not None and value_size != text.get("head_dim"):
        raise ConfigError(
            f"v_head_dim must be absent or head_dim, not {short_repr(value_size)}: "
            "K and V of different sizes are not calculated here."
        )


def read_layers(text: Mapping[str, Any], num_layers: int) -> tuple[tuple[str, ...], int | None]:
    """Return the kind of each layer, and the window of the sliding ones or ``None``.

    Raises :class:`ConfigError`.
    """
    layers = _listed(text, num_layers) or _hybrid(text, num_layers)
    window = text.get("sliding_window")
    if layers is None:
        layers = _windowed(text, num_layers)
    elif "sliding_attention" in layers and window is None:
        raise ConfigError(
            "sliding_window must be a positive integer where layer_types has sliding_attention, "
            "not absent."
        )
    num_shared = text.get("num_kv_shared_layers") or 0
    if num_shared:
        num_shared = positive_int("num_kv_shared_layers", num_shared)
        if num_shared >= num_layers:
            raise ConfigError(
                f"num_kv_shared_layers must be less than the {num_layers} layers, not {num_shared}."
            )
        layers = (*layers[: num_layers - num_shared], *["without_kv"] * num_shared)
    if "sliding_attention" not in layers:
        return layers, None
    return layers, positive_int("sliding_window", window)


def _listed(text: Mapping[str, Any], num_layers: int) -> tuple[str, ...] | None:
    for key in ("layer_types", "layers_block_type", "hybrid_override_pattern"):
        listed = text.get(key)
        if listed is None:
            continue
        if key == "hybrid_override_pattern" and isinstance(listed, str):
            listed = [_LETTERS.get(letter, letter) for letter in listed]
        if not isinstance(listed, list | tuple):
            raise ConfigError(f"{key} must be a list, not {short_repr(listed)}.")
        for kind in listed:
            if not isinstance(kind, str) or kind not in _KINDS:
                raise ConfigError(f"{key} must hold {', '.join(_KINDS)}, not {short_repr(kind)}.")
        if len(listed) != num_layers:
            raise ConfigError(
                f"{key} must name the {num_layers} layers of the model, not {len(listed)}."
            )
        return tuple(_KINDS[kind] for kind in listed)
    return None


def _hybrid(text: Mapping[str, Any], num_layers: int) -> tuple[str, ...] | None:
    """Return the kinds where some layers have attention and the others a state of fixed size."""
    if text.get("attn_layer_indices") is not None:
        indices = text["attn_layer_indices"]
        if not isinstance(indices, list) or not all(
            type(i) is int and 0 <= i < num_layers for i in indices
        ):
            raise ConfigError(
                f"attn_layer_indices must be a list of layers from 0 to {num_layers - 1}, "
                f"not {short_repr(indices)}."
            )
        return _only(indices, num_layers)
    if text.get("attn_layer_period") is not None:
        period = positive_int("attn_layer_period", text["attn_layer_period"])
        offset = text.get("attn_layer_offset", 0)
        if type(offset) is not int or not 0 <= offset < period:
            raise ConfigError(
                f"attn_layer_offset must be 0 to {period - 1}, not {short_repr(offset)}."
            )
        return _only(range(offset, num_layers, period), num_layers)
    if text.get("full_attention_interval") is not None:
        interval = positive_int("full_attention_interval", text["full_attention_interval"])
        return _only(range(interval - 1, num_layers, interval), num_layers)
    return None


def _only(with_attention: Iterable[int], num_layers: int) -> tuple[str, ...]:
    chosen = set(with_attention)
    return tuple("full_attention" if i in chosen else "without_kv" for i in range(num_layers))


def _windowed(text: Mapping[str, Any], num_layers: int) -> tuple[str, ...]:
    use = text.get("use_sliding_window")
    if use is not None and not isinstance(use, bool):
        raise ConfigError(f"use_sliding_window must be true or false, not {short_repr(use)}.")
    if text.get("sliding_window") is None or use is False:
        return ("full_attention",) * num_layers
    if use and text.get("max_window_layers") is not None:
        first = text["max_window_layers"]
        if type(first) is not int or first < 0:
            raise ConfigError(
                f"max_window_layers must be a number of layers, not {short_repr(first)}."
            )
        return tuple(
            "sliding_attention" if i >= first else "full_attention" for i in range(num_layers)
        )
    if text.get("sliding_window_pattern") is not None:
        pattern = positive_int("sliding_window_pattern", text["sliding_window_pattern"])
        full = _only(range(pattern - 1, num_layers, pattern), num_layers)
        return tuple("sliding_attention" if kind == "without_kv" else kind for kind in full)
    return ("sliding_attention",) * num_layers
